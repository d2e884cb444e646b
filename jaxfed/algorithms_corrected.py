"""Recipes that correct the drift of local training, or weigh clients for fairness.

They share the options of :func:`~jaxfed.algorithms.fedavg`.
"""

from typing import Any

from jaxfed.algorithms import RECIPES, fedavg, with_pair
from jaxfed.client.local import LocalTraining
from jaxfed.engine.algorithm import Algorithm
from jaxfed.optimizer.feddyn import FedDynClient, FedDynServer
from jaxfed.server.aggregators import Mean
from jaxfed.server.normalized import FedNova


def fednova(loss: Any, **options: Any) -> Algorithm:
    """FedAvg that does not favour clients who take more local steps.

    Args:
        loss: As in :func:`fedavg`.
        **options: As in :func:`fedavg`; ``lrate`` may be an Optimizer with momentum or a proximal term, whose reach is reckoned.

    References:
        Wang et al., `Tackling the Objective Inconsistency Problem <https://arxiv.org/abs/2007.07481>`_, 2020
    """
    algorithm = fedavg(loss, **options)
    client, mean = _taken_apart(algorithm)
    plain = not client.optimizer.parts and isinstance(client.optimizer.w_decay, float) and client.optimizer.w_decay == 0
    steps_alone = plain and isinstance(client.optimizer.lrate, float)
    return algorithm.replace(aggregator=FedNova(mean.by, None if steps_alone else client.optimizer))


def feddyn(loss: Any, *, alpha: float = 0.01, **options: Any) -> Algorithm:
    """FedDyn: each client's own linear term makes the common optimum the solution of every local problem.

    Args:
        loss: As in :func:`fedavg`.
        alpha: The strength of the linear and the proximal term, above 0.
        **options: As in :func:`fedavg`. With ``weights="uniform"`` it is the paper's.

    References:
        Acar et al., `Federated Learning Based on Dynamic Regularization <https://arxiv.org/abs/2111.04263>`_, 2021
    """
    return with_pair(loss, FedDynClient(alpha), FedDynServer(), options)


def _taken_apart(algorithm: Algorithm) -> tuple[LocalTraining, Mean]:
    """What :func:`fedavg` made: its client and its aggregator."""
    return algorithm.client, algorithm.aggregator  # type: ignore[return-value]


CORRECTED_RECIPES = {recipe.__name__: recipe for recipe in (fednova, feddyn)}
"""The recipes of this page by name; they are among :data:`~jaxfed.algorithms.RECIPES`, too."""

RECIPES.update(CORRECTED_RECIPES)
