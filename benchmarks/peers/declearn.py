"""declearn 2.9.1, PyTorch models: the server and all clients are coroutines of one process that talk over localhost.

It has no simulator beside this. With its default heartbeat of 1 s every round takes a multiple of 1 s; here it is 0.01 s.
It weighs clients by their local steps, so its losses differ slightly.
"""

import argparse
import asyncio
import logging
import os
import socket
import traceback
import warnings
from typing import Any

warnings.simplefilter("ignore")

import torch  # noqa: E402
from declearn.aggregator import AveragingAggregator  # noqa: E402
from declearn.client_sampler import ClientSampler  # noqa: E402
from declearn.communication import NetworkClientConfig, NetworkServerConfig  # noqa: E402
from declearn.dataset import InMemoryDataset  # noqa: E402
from declearn.main import FederatedClient, FederatedServer  # noqa: E402
from declearn.main.config import FLOptimConfig, FLRunConfig  # noqa: E402
from declearn.model.torch import TorchModel  # noqa: E402
from declearn.utils import set_device_policy  # noqa: E402
from peers import models_torch  # noqa: E402
from timing import MU, SERVER_ADAM, Clock, parser, print_line  # noqa: E402
from workloads import Workload, load  # noqa: E402


class Scheduled(ClientSampler, register=False):
    """The clients of each round, by name."""

    strategy = "schedule"
    secagg_compatible = True

    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.rounds = iter(work.schedule)

    def sample(self, eligible_clients: Any) -> set[str]:
        return {_name(number) for number in next(self.rounds)}


class Loss(torch.nn.Module):
    """declearn sets ``reduction`` where it wants a value for each example."""

    reduction = "mean"

    def forward(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        values = models_torch.example_losses(outputs, labels)
        return values.mean() if self.reduction == "mean" else values


class TimedServer(FederatedServer):
    """Reads the clock around each training round, and does not evaluate."""

    clock: Clock

    async def training_round(self, *arguments: Any) -> None:
        if not self.clock.seconds:
            self.clock.begin()
        await super().training_round(*arguments)
        self.clock.tick()

    async def evaluation_round(self, *arguments: Any, **options: Any) -> None:
        return None


def make_optimizers(work: Workload, algorithm: str) -> FLOptimConfig:
    """Both sides' optimizers."""
    client: dict[str, Any] = {"lrate": work.lrate}
    server: Any = 1.0
    if algorithm == "fedprox":
        client["regularizers"] = [("fedprox", {"alpha": MU})]
    elif algorithm == "scaffold":
        client["modules"] = ["scaffold-client"]
        server = {"lrate": 1.0, "modules": ["scaffold-server"]}
    elif algorithm == "fedadam":
        adam = {"beta_1": SERVER_ADAM["beta_1"], "beta_2": SERVER_ADAM["beta_2"], "eps": SERVER_ADAM["eps"]}
        server = {"lrate": SERVER_ADAM["lrate"], "modules": [("adam", adam)]}
    return FLOptimConfig.from_params(aggregator=AveragingAggregator(), client_opt=client, server_opt=server)


def make_server(work: Workload, options: argparse.Namespace, port: int) -> TimedServer:
    """The server, which waits for clients at a port of this machine."""
    model = TorchModel(models_torch.make(work.name, work.params), Loss())
    network = NetworkServerConfig("websockets", "127.0.0.1", port, heartbeat=options.heartbeat)
    optimizers = make_optimizers(work, options.algorithm)
    return TimedServer(model, network, optimizers, client_sampler=Scheduled(work))


def make_client(work: Workload, number: int, port: int) -> FederatedClient:
    """One client with its rows."""
    x, y = (tensor.numpy() for tensor in models_torch.tensors(work.name, *work.client(number)))
    network = NetworkClientConfig("websockets", f"ws://127.0.0.1:{port}", _name(number))
    return FederatedClient(network, train_data=InMemoryDataset(x, y), valid_data=None, share_metrics=True, verbose=False)


def run_config(work: Workload, options: argparse.Namespace) -> FLRunConfig:
    """Rounds, registration and batches."""
    clients = len(work.sizes)
    batches = {"n_epoch": 1, "batch_size": work.batch_size, "shuffle": bool(options.shuffle), "drop_remainder": False}
    register = {"min_clients": clients, "max_clients": clients, "timeout": 600}
    evaluate = {"batch_size": 512, "frequency": 10**6}
    return FLRunConfig.from_params(rounds=options.rounds, register=register, training=batches, evaluate=evaluate)


async def federate(server: TimedServer, config: FLRunConfig, clients: list[FederatedClient]) -> None:
    """Server and clients together."""

    async def serve() -> None:
        try:
            await server.async_run(config)
        # The clients would wait for ever.
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    # Clients may see the socket close at the end.
    await asyncio.gather(serve(), *(client.async_run() for client in clients), return_exceptions=True)


def main() -> None:
    """Trains and prints the line."""
    options = parser(__doc__)
    options.add_argument("--heartbeat", type=float, default=0.01, help="seconds between the server's looks at its clients")
    options = options.parse_args()
    set_device_policy(gpu=False)
    work, port = load(options.workload), _free_port()
    server = make_server(work, options, port)
    server.clock = Clock()
    clients = [make_client(work, number, port) for number in range(len(work.sizes))]
    logging.disable(logging.WARNING)
    asyncio.run(federate(server, run_config(work, options), clients))
    net = server.model.get_wrapped_model()
    loss = models_torch.mean_loss(work.name, net, *work.evaluation())
    packages = ("declearn", "websockets", "torch", "numpy")
    print_line("declearn", options, work, server.clock, loss, packages, heartbeat=options.heartbeat)


def _name(number: int) -> str:
    return f"c{number:05d}"


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


if __name__ == "__main__":
    main()
