"""Aggregation for fairness: clients or domains that fare badly weigh more."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxfed import part, trees
from jaxfed.messages import CohortInfo, Params, Upload
from jaxfed.server.aggregators import WeightedAggregator, as_weighting, over_weight

# What a loss is at least: powers of 0 would have no slope.
_SMALLEST_LOSS = 1e-10


class QFair(WeightedAggregator):
    r"""q-FedAvg: clients weigh by a power of their loss, and the step is scaled by a bound on the objective's curvature.

    .. math::
        u = \frac{\sum_i n_i F_i^q \, \delta_i}{\sum_i n_i (q F_i^{q-1} \|\delta_i\|^2 + F_i^q / \eta)}, \qquad
        \delta_i = \frac{w_t - w_i}{\eta}

    where :math:`F_i` is the client's loss at :math:`w_t`, at least 0. This minimises :math:`\sum_i n_i F_i^{q+1} / (q + 1)`,
    exactly so with one local step over all of a client's rows; more local steps drift as those of FedAvg do. With :math:`q = 0`
    it is :class:`Mean` with the same ``by``, bit for bit. The client must measure ``"start_loss"``.

    :math:`F_i^q` must be a number of float32: a client of which it overflows (a loss of 10 with q = 40) does not count, and where
    all vanish (losses of 0.1 with q = 40) nothing moves.

    Args:
        by: What a client weighs beside, ``n_i``: ``"examples"``, ``"steps"`` or ``"uniform"`` (the paper's cohorts are drawn in
            proportion to the examples instead).
        q: The degree of fairness, at least 0.
        lrate: The client's learning rate :math:`\eta`, of which ``1 / lrate`` bounds the curvature of the losses.

    Example:
        >>> print(QFair("uniform", q=0.0, lrate=0.5).aggregate(jnp.array([[1.0], [5.0]]), jnp.ones(2)))
        [3.]

    References:
        Li et al., `Fair Resource Allocation in Federated Learning <https://arxiv.org/abs/1905.10497>`_, 2020
    """

    name = "q-fair"
    reads: ClassVar[tuple[str, ...]] = ("start_loss",)
    by: str = part.field(as_weighting, default="examples", is_static=True)
    q: float = part.number(default=1.0, at_least=0)
    lrate: float = part.number(default=0.1, above=0)

    def prepare(self, upload: Upload, sent: Any) -> tuple[Params, jax.Array]:
        """The client's terms of both sums, times ``lrate``: ``n_i F_i^q (w_t - w_i)`` and what divides it."""
        loss, way = jnp.maximum(upload.metrics["start_loss"], _SMALLEST_LOSS), trees.widen(upload.delta)
        power = self.weigh(upload.metrics) * loss**self.q
        curvature = 1 + self.q * jnp.square(trees.norm(way)) / (self.lrate * loss)
        return trees.scale(power, way), power * curvature

    def finalize(self, total: tuple[Params, jax.Array], state: Any, info: CohortInfo) -> tuple[Params, Any]:
        """The quotient of the sums."""
        return over_weight(total[0], total[1]), state


class DomainSums(NamedTuple):
    """Sums over the clients of each domain: weighted updates ``[D, ...]``, weights ``[D]``, weighted losses ``[D]``."""

    updates: Params
    weights: jax.Array
    losses: jax.Array


class Agnostic(WeightedAggregator):
    r"""Agnostic federated averaging: domains share the update by weights that grow where the loss is high.

    .. math::
        u = \frac{\sum_d \lambda_d u_d}{\sum_d \lambda_d}, \qquad
        u_d = \frac{\sum_{i \in d} n_i (w_t - w_i)}{\sum_{i \in d} n_i}, \qquad
        \lambda_d \leftarrow \lambda_d \, e^{\gamma F_d} / Z

    over the domains that the cohort holds, where :math:`F_d` is the domain's mean loss at :math:`w_t`. Descent in :math:`w` and
    ascent in :math:`\lambda` meet at :math:`\min_w \max_d F_d`. With ``ascent="projected"`` :math:`\lambda` becomes the point of
    the simplex nearest to :math:`\lambda + \gamma F`. Domains to which no client of the round belongs keep their share.

    The client must measure ``"start_loss"`` and ``"domain"``: the data hold a number from 0 to D - 1 under the key ``"domain"``.
    A client of any other domain does not count, and is reported so. The sum takes the memory of D models.

    Args:
        by: What a client weighs within its domain, ``n_i``: ``"examples"``, ``"steps"`` or ``"uniform"``.
        domains: D; clients may be domains of their own.
        rate: The rate of ascent, :math:`\gamma`.
        ascent: ``"exponentiated"`` or ``"projected"``.

    References:
        Mohri et al., `Agnostic Federated Learning <https://arxiv.org/abs/1902.00146>`_, 2019;
        Ro et al., `Communication-Efficient Agnostic Federated Averaging <https://arxiv.org/abs/2104.02748>`_, 2021
    """

    name = "agnostic"
    reads: ClassVar[tuple[str, ...]] = ("start_loss", "domain")
    by: str = part.field(as_weighting, default="examples", is_static=True)
    domains: int = part.size(default=2, at_least=2)
    rate: float = part.number(default=0.1, at_least=0)
    ascent: str = part.static(default="exponentiated", choices=("exponentiated", "projected"))

    def init(self, params: Params) -> jax.Array:
        """Equal shares ``[D]``."""
        return jnp.full(self.domains, 1 / self.domains)

    def prepare(self, upload: Upload, sent: Any) -> DomainSums:
        """The client's part, in its domain's row."""
        row = upload.metrics["domain"] == jnp.arange(self.domains)
        # What is not finite is left out and reported; a row of zeros would be silence.
        weights = jnp.where(row.any(), row * self.weigh(upload.metrics), jnp.nan)
        updates = jax.vmap(lambda weight: trees.scale(weight, trees.widen(upload.delta)))(weights)
        return DomainSums(updates, weights, weights * upload.metrics["start_loss"])

    def finalize(self, total: DomainSums, state: jax.Array, info: CohortInfo) -> tuple[Params, jax.Array]:
        """The mean of the domains' means, and the shares after the ascent."""
        seen = total.weights > 0
        shares = jnp.where(seen, state, 0)
        factors = over_weight(over_weight(shares, shares.sum()), total.weights)
        gradient = jax.tree.map(lambda x: x.sum(0), jax.vmap(trees.scale)(factors, total.updates))
        climb = climb_projected if self.ascent == "projected" else climb_exponentiated
        slopes = self.rate * over_weight(total.losses, total.weights)
        return gradient, jnp.where(seen, climb(shares, slopes, seen), state)


def climb_exponentiated(shares: jax.Array, slopes: jax.Array, seen: jax.Array) -> jax.Array:
    """Exponentiated ascent ``[D]`` over the domains that were seen; their sum stays, and no share of theirs becomes 0.

    >>> shares = climb_exponentiated(jnp.array([0.5, 0.5]), jnp.log(jnp.array([1.0, 3.0])), jnp.ones(2, bool))
    >>> [round(share, 3) for share in shares.tolist()]
    [0.25, 0.75]
    """
    smallest = jnp.finfo(shares.dtype).tiny
    # By logarithms, and never 0: a domain whose share has underflown could not rise again when its loss does.
    heights = jnp.log(jnp.maximum(shares, smallest)) + slopes
    raised = jnp.exp(jnp.where(seen, heights - heights.max(where=seen, initial=-jnp.inf), -jnp.inf))
    return jnp.where(seen, jnp.maximum(shares.sum() * over_weight(raised, raised.sum()), smallest), 0)


def climb_projected(shares: jax.Array, slopes: jax.Array, seen: jax.Array) -> jax.Array:
    """Ascent ``[D]`` over the domains that were seen, back to the nearest point with the old sum and no negative share.

    >>> print(climb_projected(jnp.array([0.5, 0.5]), jnp.array([0.25, 0.75]), jnp.ones(2, bool)))
    [0.25 0.75]
    """
    raised = jnp.where(seen, shares + slopes, -jnp.inf)
    ordered = jnp.sort(raised, descending=True)
    excess = (jnp.cumsum(jnp.where(jnp.isfinite(ordered), ordered, 0)) - shares.sum()) / jnp.arange(1, len(ordered) + 1)
    positive = jnp.maximum((ordered > excess).sum(), 1)
    return jnp.maximum(raised - excess[positive - 1], 0)
