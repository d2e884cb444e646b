"""Recipes: which parts make which algorithm. They use the papers' constants and weigh clients by their examples."""

import inspect
from collections.abc import Callable
from typing import Any

from jaxfed import checks
from jaxfed.client.batches import BatchPolicy, Epochs, Steps
from jaxfed.client.local import LocalTraining
from jaxfed.engine.algorithm import Algorithm
from jaxfed.optimizer.adaptive import Adagrad, Adam, Yogi
from jaxfed.optimizer.momentum import Momentum
from jaxfed.optimizer.optimizer import as_optimizer
from jaxfed.optimizer.paired import AdaAlterClient, AdaAlterServer, ScaffoldClient, ScaffoldServer
from jaxfed.optimizer.regularizers import FedProx
from jaxfed.server.aggregators import Mean
from jaxfed.server.asynchronous import Buffered
from jaxfed.server.private import PrivateMean


def fedavg(
    loss: Any,
    *,
    lrate: Any,
    batch_size: int | None,
    epochs: int | None = None,
    steps: int | None = None,
    server_lrate: Any = 1.0,
    weights: str = "examples",
    gradient: Any = "mean",
    measures: Any = (),
) -> Algorithm:
    """Federated averaging: local SGD, then the weighted mean.

    Args:
        loss: A loss ``(params, batch, key) -> values [B]``, or a Model.
        lrate: The client's learning rate, a schedule, rates by label, or a whole Optimizer.
        batch_size: ``B``; None takes all of a client's rows at once.
        epochs: Passes over the client's rows in a round (1 unless ``steps`` is given).
        steps: Local steps in a round, instead of ``epochs``.
        server_lrate: The server's learning rate, or a whole Optimizer.
        weights: What a client weighs: ``"examples"``, ``"steps"`` or ``"uniform"``.
        gradient: How clients take gradients: ``"mean"``, ``"half-precision"``, or a rule of your own.
        measures: Metrics that clients send beside those that always travel, for whatever reads them: ``["loss_rms"]``.

    Raises:
        ValueError: If both ``epochs`` and ``steps`` are given.

    References:
        McMahan et al., `Communication-Efficient Learning of Deep Networks <https://arxiv.org/abs/1602.05629>`_, 2017
    """
    client = LocalTraining(loss, as_optimizer("lrate", lrate), local_work(batch_size, epochs, steps), gradient, measures)
    return Algorithm(client, as_optimizer("server_lrate", server_lrate), Mean(weights))


def fedprox(loss: Any, *, mu: float = 0.1, **options: Any) -> Algorithm:
    r"""FedAvg whose clients are pulled towards the weights that their round began with.

    Each adds :math:`\frac{\mu}{2} \|w - w_t\|^2` to its loss.

    Args:
        loss: As in :func:`fedavg`.
        mu: The strength of the pull, at least 0.
        **options: As in :func:`fedavg`.

    References:
        Li et al., `Federated Optimization in Heterogeneous Networks <https://arxiv.org/abs/1812.06127>`_, 2020
    """
    client = as_optimizer("lrate", _lrate(options))
    client = client.replace(regularizers=(FedProx(mu), *client.regularizers))
    return fedavg(loss, lrate=client, **options)


def fedavgm(loss: Any, *, momentum: float = 0.9, server_lrate: Any = 1.0, **options: Any) -> Algorithm:
    """FedAvg with momentum at the server.

    Args:
        loss: As in :func:`fedavg`.
        momentum: The server's momentum, at least 0 and below 1.
        server_lrate: As in :func:`fedavg`.
        **options: As in :func:`fedavg`.

    References:
        Hsu et al., `Measuring the Effects of Non-Identical Data Distribution <https://arxiv.org/abs/1909.06335>`_, 2019
    """
    return _with_server_module(loss, Momentum(momentum), server_lrate, options)


def fedadagrad(loss: Any, *, tau: float = 1e-3, server_lrate: Any = 0.1, **options: Any) -> Algorithm:
    """FedAvg with Adagrad at the server, as Reddi et al. write it: the accumulator starts at ``tau ** 2``.

    Args:
        loss: As in :func:`fedavg`.
        tau: The degree of adaptivity, above 0.
        server_lrate: As in :func:`fedavg`.
        **options: As in :func:`fedavg`.

    References:
        Reddi et al., `Adaptive Federated Optimization <https://arxiv.org/abs/2003.00295>`_, 2021
    """
    return _with_server_module(loss, Adagrad.paper(tau=tau), server_lrate, options)


def fedadam(
    loss: Any, *, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3, server_lrate: Any = 0.01, **options: Any
) -> Algorithm:
    """FedAvg with Adam at the server, as Reddi et al. write it: no bias correction, ``v`` starts at ``tau ** 2``.

    Args:
        loss: As in :func:`fedavg`.
        beta_1: The decay of the first moment.
        beta_2: The decay of the second.
        tau: The degree of adaptivity, above 0.
        server_lrate: As in :func:`fedavg`.
        **options: As in :func:`fedavg`.

    References:
        Reddi et al., `Adaptive Federated Optimization <https://arxiv.org/abs/2003.00295>`_, 2021
    """
    return _with_server_module(loss, Adam.paper(tau=tau, beta_1=beta_1, beta_2=beta_2), server_lrate, options)


def fedyogi(
    loss: Any, *, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3, server_lrate: Any = 0.01, **options: Any
) -> Algorithm:
    """FedAvg with Yogi at the server, as Reddi et al. write it. Arguments as in :func:`fedadam`.

    References:
        Reddi et al., `Adaptive Federated Optimization <https://arxiv.org/abs/2003.00295>`_, 2021
    """
    return _with_server_module(loss, Yogi.paper(tau=tau, beta_1=beta_1, beta_2=beta_2), server_lrate, options)


def scaffold(loss: Any, *, option: str = "II", denominator: str = "population", **options: Any) -> Algorithm:
    """SCAFFOLD: control variates remove the drift of local training.

    Args:
        loss: As in :func:`fedavg`.
        option: How a client renews its control variate: ``"II"`` (mean of its gradients) or ``"I"`` (its full gradient).
        denominator: ``"population"``, or ``"seen"`` as declearn has it.
        **options: As in :func:`fedavg`. With ``weights="uniform"`` it is the paper's.

    References:
        Karimireddy et al., `SCAFFOLD: Stochastic Controlled Averaging <https://arxiv.org/abs/1910.06378>`_, 2020
    """
    return with_pair(loss, ScaffoldClient(option), ScaffoldServer(denominator), options)


def adaalter(loss: Any, *, eps: float = 1.0, init_v: float = 1.0, **options: Any) -> Algorithm:
    """Local AdaAlter: AdaGrad whose accumulator is averaged over clients, and used with a round's delay.

    Args:
        loss: As in :func:`fedavg`.
        eps: Stands in for the squares of the running round.
        init_v: Where the accumulator starts.
        **options: As in :func:`fedavg`.

    References:
        Xie et al., `Local AdaAlter <https://arxiv.org/abs/1911.09030>`_, 2019
    """
    return with_pair(loss, AdaAlterClient(eps), AdaAlterServer(init_v), options)


def fedbuff(loss: Any, *, power: float = 0.5, weights: str = "uniform", **options: Any) -> Algorithm:
    r"""FedBuff: FedAvg whose late updates weigh less, :math:`(1 + \tau)^{-a}`. For rounds that :class:`Asynchronous` selects.

    Args:
        loss: As in :func:`fedavg`.
        power: ``a``, at least 0.
        weights: As in :func:`fedavg`; ``"uniform"`` is the paper's.
        **options: As in :func:`fedavg`.

    References:
        Nguyen et al., `Federated Learning with Buffered Asynchronous Aggregation <https://arxiv.org/abs/2106.06639>`_, 2022
    """
    return fedavg(loss, weights=weights, **options).replace(aggregator=Buffered(weights, power))


def dpfedavg(loss: Any, *, max_norm: float = 1.0, noise_multiplier: float = 1.0, expected: int, **options: Any) -> Algorithm:
    """FedAvg that is differentially private by client: clipped updates, and noise on their sum.

    Clients are to be drawn by :class:`PoissonSampling`; :mod:`jaxfed.accounting` says what a run spends.

    Args:
        loss: As in :func:`fedavg`, of a model without statistics.
        max_norm: The greatest norm of a client's update.
        noise_multiplier: The noise's standard deviation over ``max_norm``, on the sum.
        expected: Clients a round, on average.
        **options: As in :func:`fedavg`, but for ``weights``: all weigh alike.

    Raises:
        ValueError: If ``weights`` are given that are not uniform.

    References:
        McMahan et al., `Learning Differentially Private Recurrent Language Models <https://arxiv.org/abs/1710.06963>`_, 2018
    """
    if (weights := options.pop("weights", "uniform")) != "uniform":
        raise ValueError(f"dpfedavg: expected weights='uniform', as other weights could not be hidden, got {weights!r}.")
    return fedavg(loss, **options).replace(aggregator=PrivateMean(expected, max_norm, noise_multiplier))


RECIPES: dict[str, Callable[..., Algorithm]] = {
    recipe.__name__: recipe
    for recipe in (fedavg, fedprox, fedavgm, fedadagrad, fedadam, fedyogi, scaffold, adaalter, fedbuff, dpfedavg)
}
"""The recipes by name."""


def local_work(batch_size: int | None, epochs: int | None, steps: int | None) -> BatchPolicy:
    """``Epochs`` or ``Steps``, whichever is given; one epoch if neither is."""
    if epochs is not None and steps is not None:
        raise ValueError(f"Expected epochs or steps, got both: epochs={epochs}, steps={steps}. Drop one.")
    if steps is not None:
        return Steps(batch_size=batch_size, steps=steps)
    return Epochs(batch_size=batch_size, epochs=1 if epochs is None else epochs)


def _lrate(options: dict[str, Any]) -> Any:
    if "lrate" not in options:
        raise TypeError("A recipe needs lrate=, the client's learning rate or Optimizer.")
    return options.pop("lrate")


def _with_server_module(loss: Any, module: Any, server_lrate: Any, options: dict[str, Any]) -> Algorithm:
    server = as_optimizer("server_lrate", server_lrate)
    return fedavg(loss, server_lrate=server.replace(modules=(*server.modules, module)), **options)


def with_pair(loss: Any, client_half: Any, server_half: Any, options: dict[str, Any]) -> Algorithm:
    """FedAvg with a module in two halves: the client's comes first there, the server's last."""
    client, server = as_optimizer("lrate", _lrate(options)), as_optimizer("server_lrate", options.pop("server_lrate", 1.0))
    client = client.replace(modules=(client_half, *client.modules))
    return fedavg(loss, lrate=client, server_lrate=server.replace(modules=(*server.modules, server_half)), **options)


def build_recipe(name: str, loss: Any, **options: Any) -> Algorithm:
    """A recipe by its name, with options checked by name.

    Raises:
        ValueError: If the name or an option is unknown.
    """
    checks.known_name("algorithm", name, RECIPES)
    checks.known_options(name, options, accepted_options(RECIPES[name]))
    return RECIPES[name](loss, **options)


def accepted_options(recipe: Callable[..., Algorithm]) -> tuple[str, ...]:
    """The keyword options that a recipe accepts, its own and those of :func:`fedavg`.

    >>> accepted_options(fedprox)[:2]
    ('mu', 'lrate')
    """
    own = (name for name, p in inspect.signature(recipe).parameters.items() if p.kind is p.KEYWORD_ONLY)
    shared = ("lrate", "batch_size", "epochs", "steps", "server_lrate", "weights", "gradient", "measures")
    return tuple(dict.fromkeys((*(name for name in own if name not in shared), *shared)))
