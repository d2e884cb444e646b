"""pfl 0.6.0 (pfl-research), PyTorch, its simulator in one process. Clients' rows are shuffled once a visit.

SCAFFOLD runs without weights by examples, which would scale its control variates too.
"""

import itertools
from typing import Any

import numpy as np
import torch
from peers import models_torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.algorithm.fedprox import FedProx, FedProxParams
from pfl.algorithm.scaffold import SCAFFOLD, SCAFFOLDParams
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.user_state import InMemoryUserStateStorage
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from timing import MU, SERVER_ADAM, Clock, parser, print_line
from workloads import Workload, load


class Ticks(TrainingProcessCallback):
    """Reads the clock after every round."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_begin(self, *, model: Any) -> Metrics:
        self.clock.begin()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> tuple[bool, Metrics]:
        self.clock.tick()
        return False, Metrics()


def make_data(work: Workload, shuffle: bool) -> FederatedDataset:
    """Users in the order of the schedule."""
    order, rng = itertools.chain.from_iterable(work.schedule.tolist()), np.random.default_rng(1)

    def user(number: int) -> PyTorchTensorDataset:
        x, y = work.client(number)
        rows = rng.permutation(len(x)) if shuffle else slice(None)
        return PyTorchTensorDataset(models_torch.tensors(work.name, x[rows], y[rows]), user_id=str(number))

    return FederatedDataset(user, lambda: next(order))


def make_model(work: Workload, algorithm: str) -> tuple[Any, PyTorchModel]:
    """The network and pfl's wrapper of it with the server's optimizer."""
    net = models_torch.make(work.name, work.params)
    net.loss = lambda x, y, eval=False: models_torch.batch_loss(net(x), y)
    net.metrics = lambda x, y, eval=True: {}
    server = torch.optim.SGD(net.parameters(), lr=1.0)
    if algorithm == "fedadam":
        betas = (SERVER_ADAM["beta_1"], SERVER_ADAM["beta_2"])
        server = torch.optim.Adam(net.parameters(), lr=SERVER_ADAM["lrate"], betas=betas, eps=SERVER_ADAM["eps"])
    return net, PyTorchModel(net, local_optimizer_create=torch.optim.SGD, central_optimizer=server)


def make_algorithm(work: Workload, name: str, rounds: int) -> tuple[Any, Any, list]:
    """pfl's algorithm, its parameters, and what happens to uploads."""
    common = {
        "central_num_iterations": rounds,
        "evaluation_frequency": 10**9,
        "train_cohort_size": work.schedule.shape[1],
        "val_cohort_size": None,
    }
    if name == "fedprox":
        return FedProx(), FedProxParams(mu=MU, **common), [WeightByDatapoints()]
    if name == "scaffold":
        options = {"population": len(work.sizes), "use_gradient_as_control_variate": False}
        return SCAFFOLD(), SCAFFOLDParams(**options, user_state_storage=InMemoryUserStateStorage(), **common), []
    return FederatedAveraging(), NNAlgorithmParams(**common), [WeightByDatapoints()]


def main() -> None:
    """Trains and prints the line."""
    options = parser(__doc__)
    options.add_argument("--threads", type=int, default=0, help="of PyTorch; 0 leaves its default")
    options = options.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    work, clock = load(options.workload), Clock()
    net, model = make_model(work, options.algorithm)
    algorithm, params, postprocessors = make_algorithm(work, options.algorithm, options.rounds)
    algorithm.run(
        algorithm_params=params,
        backend=SimulatedBackend(make_data(work, bool(options.shuffle)), val_data=None, postprocessors=postprocessors),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=work.lrate, local_batch_size=work.batch_size
        ),
        model_eval_params=None,
        callbacks=[Ticks(clock)],
    )
    loss = models_torch.mean_loss(work.name, net, *work.evaluation())
    print_line("pfl", options, work, clock, loss, ("pfl", "torch", "numpy"), threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
