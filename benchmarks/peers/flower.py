"""Flower 1.41, its simulation on Ray, PyTorch clients. The server names each message's client, so that the schedule is ours.

Workers keep data and model between messages. One thread of PyTorch for each of as many workers as there are cores; memory is
that of all processes. It has no SCAFFOLD.
"""

import argparse
import functools
import logging
import os
import warnings
from collections.abc import Iterable
from typing import Any

from timing import MU, SERVER_ADAM, Clock, TreeMemory, parser, print_line
from workloads import Workload, load

# Workers read these when they start, and their modules lie beside this one.
os.environ |= {
    "PYTHONPATH": os.getcwd(),
    "OMP_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
warnings.simplefilter("ignore")

import torch  # noqa: E402
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.serverapp.strategy import FedAdam, FedAvg, FedProx  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402
from peers import models_torch  # noqa: E402


@functools.cache
def resources(workload: str) -> tuple[Workload, torch.nn.Module]:
    """Data and network, once in each worker."""
    torch.set_num_threads(1)
    return load(workload), models_torch.make(workload)


def train(message: Message, workload: str, shuffle: bool) -> Message:
    """One client's epoch."""
    work, net = resources(workload)
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    config = message.content["config"]
    x, y = models_torch.tensors(workload, *work.client(int(config["client"])))
    mu = float(config.get("proximal-mu", 0.0))
    start = [p.detach().clone() for p in net.parameters()] if mu else []
    optimizer = torch.optim.SGD(net.parameters(), lr=work.lrate)
    order = torch.randperm(len(x)) if shuffle else torch.arange(len(x))
    for rows in order.split(work.batch_size):
        optimizer.zero_grad()
        loss = models_torch.batch_loss(net(x[rows]), y[rows])
        if mu:
            loss = loss + mu / 2 * sum(((p - q) ** 2).sum() for p, q in zip(net.parameters(), start))
        loss.backward()
        optimizer.step()
    content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": len(x)})}
    return Message(content=RecordDict(content), reply_to=message)


def client_app(workload: str, shuffle: bool) -> ClientApp:
    """The clients' side."""
    app = ClientApp()

    @app.train()
    def _(message: Message, context: Context) -> Message:
        # Imported by name in the worker, so that the module's cache is the worker's own.
        from peers import flower

        return flower.train(message, workload, shuffle)

    return app


class Scheduled:
    """Mixed into Flower's strategies: names the clients of a round, and reads the clock."""

    work: Workload
    clock: Clock

    def configure_train(self, server_round: int, *arguments: Any) -> list[Message]:
        if server_round == 1:
            self.clock.begin()
        messages = super().configure_train(server_round, *arguments)  # type: ignore[misc]
        return [_addressed(m, client) for m, client in zip(messages, self.work.schedule[server_round - 1])]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        replies = list(replies)
        if errors := [reply.error for reply in replies if reply.has_error()]:
            raise RuntimeError(f"A client failed: {errors[0]}")
        result = super().aggregate_train(server_round, replies)  # type: ignore[misc]
        self.clock.tick()
        return result


def _addressed(message: Message, client: int) -> Message:
    config = ConfigRecord({**dict(message.content["config"]), "client": int(client)})
    content = RecordDict({"arrays": message.content["arrays"], "config": config})
    return Message(content, message_type=message.metadata.message_type, dst_node_id=message.metadata.dst_node_id)


def make_strategy(work: Workload, clock: Clock, algorithm: str) -> Any:
    """Flower's own strategy under our schedule."""
    adam = {"eta": SERVER_ADAM["lrate"], "beta_1": SERVER_ADAM["beta_1"], "beta_2": SERVER_ADAM["beta_2"]}
    kind, more = {
        "fedavg": (FedAvg, {}),
        "fedprox": (FedProx, {"proximal_mu": MU}),
        "fedadam": (FedAdam, {**adam, "tau": SERVER_ADAM["eps"]}),
    }[algorithm]
    clients, cohort = len(work.sizes), work.schedule.shape[1]
    strategy = type("Strategy", (Scheduled, kind), {"work": work, "clock": clock})
    counts = {"fraction_train": cohort / clients, "min_train_nodes": cohort, "min_available_nodes": clients}
    return strategy(**counts, fraction_evaluate=0.0, **more)


def server_app(work: Workload, clock: Clock, options: argparse.Namespace, found: dict[str, float]) -> ServerApp:
    """The server's side; ``found`` gets the final loss."""
    app = ServerApp()

    @app.main()
    def _(grid: Grid, context: Context) -> None:
        net = models_torch.make(work.name, work.params)
        strategy = make_strategy(work, clock, options.algorithm)
        result = strategy.start(grid=grid, initial_arrays=ArrayRecord(net.state_dict()), num_rounds=options.rounds)
        net.load_state_dict(result.arrays.to_torch_state_dict())
        found["loss"] = models_torch.mean_loss(work.name, net, *work.evaluation())

    return app


def main() -> None:
    """Trains and prints the line."""
    options = parser(__doc__, ("fedavg", "fedprox", "fedadam")).parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    work, clock, memory, found = load(options.workload), Clock(), TreeMemory(), {}
    memory.start()
    ray = {"num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False, "logging_level": "error"}
    run_simulation(
        server_app=server_app(work, clock, options, found),
        client_app=client_app(options.workload, bool(options.shuffle)),
        num_supernodes=len(work.sizes),
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": ray},
    )
    peak = {"rss_mb": round(memory.rss, 1), "pss_mb": round(memory.pss, 1), "processes": memory.processes}
    print_line("flower", options, work, clock, found["loss"], ("flwr", "ray", "torch", "numpy"), **peak)


if __name__ == "__main__":
    main()
