"""Aggregators that withstand clients who send anything: coordinate by coordinate, and by a bound on each client's pull.

A rule by coordinates looks at one number of each client at a time, in the update, the statistics and the auxiliary variables
alike. Rules that look at whole updates are in :mod:`jaxfed.server.geometric`.

Rules that stack leave out clients that the engine left out: ``n`` is how many counted, and known only as data. They give means
over clients, so auxiliary variables that are sums are refused when the algorithm is built.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxfed import part
from jaxfed.base import Aggregator
from jaxfed.messages import CohortInfo, Params, Upload
from jaxfed.optimizer.clipping import clip
from jaxfed.server.aggregators import Mean, as_weighting


class CoordinateRule(Aggregator, register=False):
    """A rule for one number of each client; a subclass defines ``reduce``. Clients weigh alike."""

    stacks = True

    def reduce(self, values: jax.Array, counts: jax.Array) -> jax.Array:
        """One number from ``values [C]`` of the clients that ``counts [C]`` names; 0 if it names none."""
        raise NotImplementedError(f"{type(self).__name__} defines no reduce(values, counts).")

    def combine(self, uploads: Upload, weights: jax.Array, state: Any, info: CohortInfo) -> tuple[Upload, Any]:
        """The rule at every coordinate of every leaf."""
        return by_coordinate(self.reduce, uploads, weights > 0), state


class Median(CoordinateRule):
    r"""The median of every coordinate; for an even number of clients the mean of the two in the middle.

    .. math:: u_j = \mathrm{median}_i \, u_{ij}

    It stays among the honest clients' values while fewer than half of the clients lie.

    Example:
        >>> updates = jnp.array([[1.0, 5.0], [2.0, 6.0], [3.0, -1e30]])
        >>> print(Median().aggregate(updates, jnp.ones(3)))
        [2. 5.]

    References:
        Yin et al., `Byzantine-Robust Distributed Learning <https://arxiv.org/abs/1803.01498>`_, 2018
    """

    name = "median"

    def reduce(self, values: jax.Array, counts: jax.Array) -> jax.Array:
        """The median."""
        return median(values, counts)


class TrimmedMean(CoordinateRule):
    r"""The mean of every coordinate without its smallest and its largest values.

    .. math:: u_j = \frac{1}{n - 2k} \sum_{i=k+1}^{n-k} u_{(i)j}, \quad k = \lfloor r n \rfloor

    where :math:`u_{(i)j}` is the i-th smallest. Values are sorted and sliced: to subtract the extremes from a sum would keep
    their rounding errors, which for values of 1e30 are all that is left.

    Args:
        ratio: :math:`r`, the share of clients that is cut at each end: at least that of the clients that may lie. With fewer than
            ``1 / ratio`` clients nothing is cut.

    Example:
        >>> updates = jnp.array([[1.0], [2.0], [3.0], [4.0], [1e30]])
        >>> print(TrimmedMean(0.2).aggregate(updates, jnp.ones(5)))
        [3.]

    References:
        Yin et al., `Byzantine-Robust Distributed Learning <https://arxiv.org/abs/1803.01498>`_, 2018
    """

    name = "trimmed-mean"
    ratio: float = part.number(default=0.1, at_least=0, below=0.5)

    def reduce(self, values: jax.Array, counts: jax.Array) -> jax.Array:
        """The mean of the values between."""
        number, rank = counts.sum(), jnp.arange(len(values))
        # 0.29 * 100 is 28.999998 in float32, and a ratio just below a half rounds up to it.
        share = jnp.floor(self.ratio * number * (1 + 1e-6)).astype(number.dtype)
        cut = jnp.maximum(jnp.minimum(share, (number - 1) // 2), 0)
        kept = (rank >= cut) & (rank < number - cut)
        total = jnp.where(kept, _sorted(values, counts), 0).sum()
        return total / jnp.maximum(number - 2 * cut, 1)


class NormBound(Mean):
    r"""The weighted mean of updates that are clipped to a greatest norm. A sum: it needs no memory for C models.

    .. math:: u = \sum_i n_i u_i \min\Big(1, \frac{c}{\lVert u_i \rVert_2}\Big) \Big/ \sum_i n_i

    The bound is on the update alone. Statistics and auxiliary variables are averaged as they come: where clients may lie about
    these, use a rule by coordinates.

    Args:
        max_norm: :math:`c`, the greatest norm over all leaves of an update together.
        by: What a client weighs, as in :class:`Mean`; all alike unless asked.

    Example:
        >>> print(NormBound(max_norm=1.0).aggregate(jnp.array([[3.0, 4.0], [0.0, 0.0]]), jnp.ones(2)))
        [0.3 0.4]

    References:
        Sun et al., `Can You Really Backdoor Federated Learning? <https://arxiv.org/abs/1911.07963>`_, 2019
    """

    name = "norm-bounding"
    by: str = part.field(as_weighting, default="uniform", is_static=True, kw_only=True)
    max_norm: float = part.number(default=1.0, above=0)

    def prepare(self, upload: Upload, sent: Any) -> Params:
        """``n_i u_i`` of the clipped update."""
        return super().prepare(upload._replace(delta=clip(upload.delta, self.max_norm)), sent)


def by_coordinate(rule: Callable[[jax.Array, jax.Array], jax.Array], tree: Any, counts: jax.Array) -> Any:
    """``rule(values [C], counts [C])`` at every coordinate of leaves ``[C, ...]``."""

    def reduce(leaf: jax.Array) -> jax.Array:
        columns = leaf.reshape(len(counts), -1)
        return jax.vmap(rule, in_axes=(1, None))(columns, counts).reshape(leaf.shape[1:])

    return jax.tree.map(reduce, tree)


def median(values: jax.Array, counts: jax.Array) -> jax.Array:
    """The median of the ``values [C]`` that count, the mean of two in the middle; 0 if none does.

    >>> print(median(jnp.array([5.0, 1.0, 9.0, 2.0]), jnp.array([True, True, False, True])))
    2.0
    """
    ordered, number = _sorted(values, counts), counts.sum()
    return jnp.where(number > 0, (ordered[(number - 1) // 2] + ordered[number // 2]) / 2, 0)


def _sorted(values: jax.Array, counts: jax.Array) -> jax.Array:
    return jnp.sort(jnp.where(counts, values, jnp.inf))
