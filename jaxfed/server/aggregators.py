"""Aggregators that are sums: prepare at each client, add, finalize at the server."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxfed import checks, part, trees
from jaxfed.base import Aggregator
from jaxfed.messages import CohortInfo, Params, Upload


def as_weighting(where: str, value: Any) -> str:
    """The name of what a client weighs; declearn's ``steps_weighted`` is a bool."""
    value = {True: "steps", False: "uniform"}[value] if isinstance(value, bool) else value
    return checks.choice(where, value, ("examples", "steps", "uniform"))


class WeightedAggregator(Aggregator, register=False):
    """An aggregator whose clients weigh by their examples, their local steps, or alike."""

    # declearn's spelling: steps_weighted=True or False.
    aliases: ClassVar[Mapping[str, str]] = {"steps_weighted": "by", "weights": "by"}
    by: str = part.field(as_weighting, default="steps", is_static=True)

    def weigh(self, metrics: dict[str, jax.Array]) -> jax.Array:
        """The client's weight."""
        return jnp.ones_like(metrics["examples"]) if self.by == "uniform" else metrics[self.by]


class Mean(WeightedAggregator):
    r"""The weighted mean of the updates.

    .. math:: u = \sum_i n_i u_i / \sum_i n_i

    Args:
        by: What a client weighs: ``"examples"`` it holds, local ``"steps"`` it took (declearn's default), or ``"uniform"``.

    Example:
        >>> print(Mean("examples").aggregate(jnp.array([[1.0], [5.0]]), jnp.array([3.0, 1.0])))
        [2.]

    References:
        McMahan et al., `Communication-Efficient Learning of Deep Networks <https://arxiv.org/abs/1602.05629>`_, 2017
    """

    name = "averaging"

    def prepare(self, upload: Upload, sent: Any) -> Params:
        """``n_i u_i``."""
        return trees.scale(self.weigh(upload.metrics), trees.widen(upload.delta))

    def finalize(self, total: Params, state: Any, info: CohortInfo) -> tuple[Params, Any]:
        """Divides by the sum of the weights."""
        return over_weight(total, info.weight), state


class Sum(Aggregator):
    r"""The sum of the updates.

    .. math:: u = \sum_i u_i

    Example:
        >>> print(Sum().aggregate(jnp.array([[1.0], [5.0]]), jnp.ones(2)))
        [6.]
    """

    name = "sum"

    def prepare(self, upload: Upload, sent: Any) -> Params:
        """``u_i``."""
        return trees.widen(upload.delta)

    def finalize(self, total: Params, state: Any, info: CohortInfo) -> tuple[Params, Any]:
        """The sum as it is."""
        return total, state


class GradientMaskedMean(WeightedAggregator):
    r"""Gradient-masked averaging: coordinates on whose sign clients disagree are shrunk.

    .. math:: u = s \cdot \sum_i n_i u_i / \sum_i n_i, \quad a = |\sum_i n_i \mathrm{sign}(u_i)| / \sum_i n_i

    where :math:`s = 1` if :math:`a > \tau`, else :math:`a`.

    Args:
        by: What a client weighs, as in :class:`Mean`.
        threshold: :math:`\tau`, from 0 to 1.

    Example:
        >>> updates = jnp.array([[1.0, 1.0], [3.0, -1.0], [2.0, 3.0]])
        >>> print(GradientMaskedMean("uniform").aggregate(updates, jnp.ones(3)))
        [2.         0.33333334]

    References:
        Tenison et al., `Gradient Masked Averaging for Federated Learning <https://arxiv.org/abs/2201.11986>`_, 2022
    """

    name = "gradient-masked-averaging"
    threshold: float = part.number(default=1.0, at_least=0, at_most=1)

    def prepare(self, upload: Upload, sent: Any) -> tuple[Params, Params]:
        """``n_i u_i`` and ``n_i sign(u_i)``."""
        weight, delta = self.weigh(upload.metrics), trees.widen(upload.delta)
        return trees.scale(weight, delta), trees.scale(weight, jax.tree.map(jnp.sign, delta))

    def finalize(self, total: tuple[Params, Params], state: Any, info: CohortInfo) -> tuple[Params, Any]:
        """The masked mean."""
        means, signs = over_weight(total, info.weight)

        def mask(mean: jax.Array, sign: jax.Array) -> jax.Array:
            agreement = jnp.abs(sign)
            return jnp.where(agreement > trees.cast(self.threshold, agreement), mean, agreement * mean)

        return jax.tree.map(mask, means, signs), state


def over_weight(total: Any, weight: ArrayLike) -> Any:
    """``total / weight``, a tree; zeros for a weight of 0: a round in which nobody counted.

    A product with a rounded ``1 / weight`` would miss exact means.
    """
    weight = jnp.asarray(weight)
    return trees.divide(trees.select(weight > 0, total, trees.zeros_like(total)), jnp.where(weight > 0, weight, 1))


def list_aggregators() -> dict[str, type]:
    """The aggregators by name, third-party ones included.

    >>> "averaging" in list_aggregators()
    True
    """
    return part.registered("aggregator")
