"""Recipes that correct the drift of local training, or weigh clients for fairness.

They share the options of :func:`~jaxfed.algorithms.fedavg`.
"""

from typing import Any

from jaxfed.algorithms import RECIPES, fedavg, with_pair
from jaxfed.client.gradients import SVRG
from jaxfed.client.local import LocalTraining
from jaxfed.client.surveys import FullGradient
from jaxfed.engine.algorithm import Algorithm
from jaxfed.optimizer.feddyn import FedDynClient, FedDynServer
from jaxfed.optimizer.mime import MimeClient, MimeServer
from jaxfed.server.aggregators import Mean
from jaxfed.server.fair import Agnostic, QFair
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


def mimelite(loss: Any, *, base: Any = "ewma", **options: Any) -> Algorithm:
    """MimeLite: the server keeps the state of an optimizer, and every local step applies it without changing it.

    Args:
        loss: As in :func:`fedavg`.
        base: The optimizer, a module: ``"ewma"`` is the paper's SGD with momentum, ``"mime-adam"`` its Adam.
        **options: As in :func:`fedavg`; ``lrate`` is the rate of ``base``. With ``weights="uniform"`` it is the paper's.

    References:
        Karimireddy et al., `Breaking the centralized barrier <https://arxiv.org/abs/2008.03606>`_, 2021
    """
    return with_pair(loss, MimeClient(), MimeServer(base), options)


def mime(loss: Any, *, base: Any = "ewma", **options: Any) -> Algorithm:
    """Mime: MimeLite whose gradients are corrected by the cohort's mean gradient at the broadcast weights, found in a first pass.

    Args:
        loss: As in :func:`fedavg`.
        base: As in :func:`mimelite`.
        **options: As in :func:`mimelite`.

    References:
        Karimireddy et al., `Breaking the centralized barrier <https://arxiv.org/abs/2008.03606>`_, 2021
    """
    algorithm = mimelite(loss, base=base, **options)
    client, _ = _taken_apart(algorithm)
    return algorithm.replace(client=client.replace(gradient=SVRG(client.gradient)), survey=FullGradient())


def qfedavg(loss: Any, *, q: float = 1.0, **options: Any) -> Algorithm:
    """q-FedAvg: clients with a higher loss weigh more, so that losses become more alike.

    Args:
        loss: As in :func:`fedavg`; at least 0.
        q: The degree of fairness; 0 is FedAvg with the same weights.
        **options: As in :func:`fedavg`; ``lrate`` must be a number, since its inverse is the bound on the curvature.

    Raises:
        TypeError: If ``lrate`` is a schedule or by label.

    References:
        Li et al., `Fair Resource Allocation in Federated Learning <https://arxiv.org/abs/1905.10497>`_, 2020
    """
    algorithm = fedavg(loss, **options)
    client, mean = _taken_apart(algorithm)
    aggregator = QFair(mean.by, q, client.optimizer.lrate)
    return algorithm.replace(client=_measuring(client, aggregator.reads), aggregator=aggregator)


def afl(loss: Any, *, domains: int = 2, ascent_rate: float = 0.1, ascent: str = "exponentiated", **options: Any) -> Algorithm:
    """Agnostic federated averaging: the worst mixture of domains, which the data name under the key ``"domain"``.

    Args:
        loss: As in :func:`fedavg`.
        domains: How many domains there are.
        ascent_rate: How fast the weights of the domains move.
        ascent: ``"exponentiated"`` or ``"projected"``.
        **options: As in :func:`fedavg`; ``weights`` are those of clients within their domain.

    References:
        Mohri et al., `Agnostic Federated Learning <https://arxiv.org/abs/1902.00146>`_, 2019
    """
    algorithm = fedavg(loss, **options)
    client, mean = _taken_apart(algorithm)
    aggregator = Agnostic(mean.by, domains, ascent_rate, ascent)
    return algorithm.replace(client=_measuring(client, aggregator.reads), aggregator=aggregator)


def _measuring(client: LocalTraining, names: tuple[str, ...]) -> LocalTraining:
    """The client with measures of these names beside its own."""
    return client.replace(measures=(*client.measures, *(name for name in names if name not in client.measured)))


def _taken_apart(algorithm: Algorithm) -> tuple[LocalTraining, Mean]:
    """What :func:`fedavg` made: its client and its aggregator."""
    return algorithm.client, algorithm.aggregator  # type: ignore[return-value]


CORRECTED_RECIPES = {recipe.__name__: recipe for recipe in (fednova, feddyn, mimelite, mime, qfedavg, afl)}
"""The recipes of this page by name; they are among :data:`~jaxfed.algorithms.RECIPES`, too."""

RECIPES.update(CORRECTED_RECIPES)
