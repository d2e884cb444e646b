"""Aggregators that withstand clients who send anything, by the distances between whole updates.

They look at the update alone. A weighing rule gives each client a weight, which then holds for all that it sent, so that wrong
statistics beside a harmless update get through; rules by coordinates and Bulyan guard all leaves.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxfed import part, trees
from jaxfed.base import Aggregator
from jaxfed.messages import CohortInfo, Params, Upload
from jaxfed.server.aggregators import WeightedAggregator, as_weighting
from jaxfed.server.robust import by_coordinate, median


class WeighingRule(WeightedAggregator, register=False):
    """A rule that gives clients new weights from their updates; a subclass defines ``reweigh``.

    Args:
        by: What a client weighs to begin with. What it claims to hold cannot be checked, so all weigh alike unless asked.
    """

    stacks = True
    by: str = part.field(as_weighting, default="uniform", is_static=True, kw_only=True)

    def reweigh(self, updates: Params, weights: jax.Array) -> jax.Array:
        """New weights ``[C]`` from the updates ``[C, ...]`` and the old ones; 0 stays 0."""
        raise NotImplementedError(f"{type(self).__name__} defines no reweigh(updates, weights).")

    def combine(self, uploads: Upload, weights: jax.Array, state: Any, info: CohortInfo) -> tuple[Upload, Any]:
        """The mean of all that was sent, by the new weights."""
        return trees.weighted_mean(uploads, self.reweigh(uploads.delta, weights)), state


class Krum(WeighingRule):
    r"""The update that lies closest to its neighbours, or the mean of several such (multi-Krum).

    .. math:: s_i = \sum_{j \in N_i} \lVert u_i - u_j \rVert_2^2

    where :math:`N_i` are the :math:`n - f - 2` clients nearest to :math:`i`, at least one. The ``chosen`` clients of the smallest
    scores are averaged, at most :math:`n - f` where some do not count, so that no liar is needed to fill up their number. Of
    equal scores the one is taken whose squared distances to all add up to less, then the first.

    Args:
        byzantine: :math:`f`, how many clients may lie.
        chosen: How many are averaged.
        by: What those weigh, as in :class:`Mean`.

    Raises:
        ValueError: While tracing, for a cohort of fewer than :math:`2f + 3` clients, or of fewer than ``chosen + f``.

    Example:
        >>> updates = jnp.array([[0.0], [1.0], [1.1], [1.3], [9.0]])
        >>> print(Krum(byzantine=1).aggregate(updates, jnp.ones(5)))
        [1.1]

    References:
        Blanchard et al., `Machine Learning with Adversaries <https://arxiv.org/abs/1703.02757>`_, 2017
    """

    name = "krum"
    byzantine: int = part.size(at_least=0)
    chosen: int = part.size(default=1)

    def reweigh(self, updates: Params, weights: jax.Array) -> jax.Array:
        """The weights of the chosen, 0 for others."""
        _need_clients(self.name, len(weights), 2, self.byzantine)
        if self.chosen + self.byzantine > len(weights):
            what = f"krum averages chosen={self.chosen} of {len(weights)} clients, of which byzantine={self.byzantine} may lie"
            raise ValueError(f"{what}. Choose at most {len(weights) - self.byzantine}.")
        counts = weights > 0
        best = krum_order(squared_distances(updates), counts, self.byzantine)[: self.chosen]
        taken = jnp.arange(self.chosen) < jnp.maximum(counts.sum() - self.byzantine, 1)
        return jnp.zeros_like(weights).at[best].set(jnp.where(taken, weights[best], 0))


class Bulyan(Aggregator):
    r"""Krum again and again, then the mean of what lies closest to the median of every coordinate.

    The client that Krum finds is set aside, and Krum runs on the rest, until :math:`n - 2f` are selected. Of these every
    coordinate, of all that was sent, takes the mean of the :math:`n - 4f` values that are closest to their median: a client
    cannot hide one wrong coordinate in an update that is close as a whole.

    Args:
        byzantine: :math:`f`, how many clients may lie.

    Raises:
        ValueError: While tracing, for a cohort of fewer than :math:`4f + 3` clients.

    Example:
        >>> updates = jnp.array([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0], [1e30]])
        >>> print(Bulyan(byzantine=1).aggregate(updates, jnp.ones(7)))
        [2.]

    References:
        El Mhamdi et al., `The Hidden Vulnerability of Distributed Learning <https://arxiv.org/abs/1802.07927>`_, 2018
    """

    stacks = True
    name = "bulyan"
    byzantine: int = part.size(at_least=0)

    def combine(self, uploads: Upload, weights: jax.Array, state: Any, info: CohortInfo) -> tuple[Upload, Any]:
        """Selects by the updates, then reduces every coordinate of every leaf."""
        _need_clients(self.name, len(weights), 4, self.byzantine)
        counts = weights > 0
        keep = jnp.maximum(counts.sum() - 4 * self.byzantine, 1)
        return by_coordinate(partial(_mean_near_median, keep=keep), uploads, self.select(uploads.delta, counts)), state

    def select(self, updates: Params, counts: jax.Array) -> jax.Array:
        """``[C]`` which clients repeated Krum selects."""
        distances = squared_distances(updates)

        def set_best_aside(_: jax.Array, rest: jax.Array) -> jax.Array:
            return rest.at[krum_order(distances, rest, self.byzantine)[0]].set(False)

        rest = jax.lax.fori_loop(0, jnp.maximum(counts.sum() - 2 * self.byzantine, 1), set_best_aside, counts)
        return counts & ~rest


class GeometricMedian(WeighingRule):
    r"""The point from which the sum of distances to the updates is least (RFA), by smoothed Weiszfeld steps.

    .. math:: u = \mathrm{argmin}_v \sum_i n_i \lVert u_i - v \rVert_2, \quad
        v \leftarrow \frac{\sum_i \beta_i u_i}{\sum_i \beta_i}, \; \beta_i = \frac{n_i}{\max(\nu, \lVert u_i - v \rVert_2)}

    It withstands liars of less than half of the weight. Steps begin at the median of every coordinate, not at the mean as in the
    paper: a liar at 1e30 cannot make them start far away.

    Args:
        smoothing: :math:`\nu`, a distance below which clients are no longer told apart.
        iterations: Weiszfeld steps.
        by: What a client weighs, as in :class:`Mean`.

    Example:
        >>> updates = jnp.array([[0.0, 0.0], [4.0, 0.0], [2.0, 1.0], [2.0, 1e6]])
        >>> print(jnp.round(GeometricMedian(iterations=50).aggregate(updates, jnp.ones(4)), 2))
        [2. 1.]

    References:
        Pillutla et al., `Robust Aggregation for Federated Learning <https://arxiv.org/abs/1912.13445>`_, 2022
    """

    name = "geometric-median"
    smoothing: float = part.number(default=1e-6, above=0)
    iterations: int = part.count(default=10, at_least=1)

    def reweigh(self, updates: Params, weights: jax.Array) -> jax.Array:
        """The weights of the last step."""

        def pull(centre: Params) -> jax.Array:
            return weights / jnp.maximum(distances_to(centre, updates), self.smoothing)

        def step(_: jax.Array, pulls: jax.Array) -> jax.Array:
            return pull(trees.weighted_mean(updates, pulls))

        return jax.lax.fori_loop(1, self.iterations, step, pull(by_coordinate(median, updates, weights > 0)))


class CentredClipping(WeighingRule):
    r"""Updates are clipped about the last round's aggregate, and averaged.

    .. math:: v \leftarrow v + \sum_i n_i (u_i - v) \min\Big(1, \frac{\tau}{\lVert u_i - v \rVert_2}\Big) \Big/ \sum_i n_i

    :math:`v` starts at the aggregate of the round before, which is the aggregator's state, and at 0 in the first. Statistics and
    auxiliary variables have no such centre: their mean takes the factors with which the updates are clipped about the result.

    Args:
        radius: :math:`\tau`, how far one client can pull in one iteration.
        iterations: Steps from the last aggregate.
        by: What a client weighs, as in :class:`Mean`.

    Example:
        >>> updates = jnp.array([[1.0], [2.0], [1e6]])
        >>> print(CentredClipping(radius=3.0).aggregate(updates, jnp.ones(3)))
        [2.]

    References:
        Karimireddy et al., `Learning from History for Byzantine Robust Optimization <https://arxiv.org/abs/2012.10333>`_, 2021
    """

    name = "centred-clipping"
    radius: float = part.number(above=0)
    iterations: int = part.count(default=1, at_least=1)

    def init(self, params: Params) -> Params:
        """Zeros, like the update."""
        return trees.zeros_like(trees.widen(params))

    def combine(self, uploads: Upload, weights: jax.Array, state: Any, info: CohortInfo) -> tuple[Upload, Any]:
        """The clipped mean, which is also the new state."""

        def factors(centre: Params) -> jax.Array:
            return self.radius / jnp.maximum(distances_to(centre, uploads.delta), self.radius)

        def step(_: jax.Array, centre: Params) -> Params:
            gaps = jax.vmap(trees.subtract, in_axes=(0, None))(uploads.delta, centre)
            pulls = jax.vmap(trees.scale)(factors(centre), gaps)
            return jax.tree.map(jnp.add, centre, trees.weighted_mean(pulls, weights))

        centre = jax.lax.fori_loop(0, self.iterations, step, state)
        return trees.weighted_mean(uploads, weights * factors(centre))._replace(delta=centre), centre


def squared_distances(updates: Params) -> jax.Array:
    """``[C, C]`` between updates, over all leaves together."""
    # By differences, one client at a time: inner products would be faster, but near clients would cancel in float32.
    return jax.lax.map(lambda one: jnp.square(distances_to(one, updates)), updates)


def distances_to(centre: Params, updates: Params) -> jax.Array:
    """``[C]`` from one update to each of ``updates [C, ...]``, over all leaves together."""
    return jax.vmap(lambda one: trees.norm(trees.subtract(one, centre)))(updates)


def krum_order(distances: jax.Array, counts: jax.Array, byzantine: int) -> jax.Array:
    """Clients ``[C]`` from the smallest Krum score to the largest, at the end those that do not count."""
    size, number = len(counts), counts.sum()
    others = counts[None, :] & ~jnp.eye(size, dtype=bool)
    nearest, rank = jnp.sort(jnp.where(others, distances, jnp.inf), axis=1), jnp.arange(size)
    neighbours = jnp.minimum(jnp.maximum(number - byzantine - 2, 1), number - 1)
    scores, totals = (jnp.where((rank < n)[None, :], nearest, 0).sum(1) for n in (neighbours, number - 1))
    # A distance that overflows is still that of a client that counts.
    scores = jnp.where(counts, jnp.minimum(scores, jnp.finfo(scores.dtype).max), jnp.inf)
    # With one neighbour, two that are each other's have the same score: all distances then tell which is more in the middle.
    return jnp.lexsort((totals, scores))


def _mean_near_median(values: jax.Array, counts: jax.Array, keep: jax.Array) -> jax.Array:
    """The mean of the ``keep`` values that are closest to their median; of two as close the smaller."""
    gaps = jnp.where(counts, jnp.abs(values - median(values, counts)), jnp.inf)
    _, nearest = jax.lax.sort((gaps, values), num_keys=2)
    return jnp.where(jnp.arange(len(values)) < jnp.minimum(keep, counts.sum()), nearest, 0).sum() / keep


def _need_clients(name: str, got: int, factor: int, byzantine: int) -> None:
    needed = factor * byzantine + 3
    if got < needed:
        remedy = f"Raise the cohort size{f' or lower byzantine={byzantine}' if byzantine else ''}."
        formula = f"{factor} * byzantine + 3 = {needed}"
        raise ValueError(f"{name} needs at least {formula} clients, got cohort size {got}. {remedy}")
