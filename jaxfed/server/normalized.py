"""Aggregation that undoes unequal amounts of local work."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxfed import part, trees
from jaxfed.base import CohortInfo, Params, RoundStart, Upload
from jaxfed.optimizer.optimizer import Optimizer, as_optimizer
from jaxfed.server.aggregators import WeightedAggregator, as_weighting, reciprocal


def _as_optional_optimizer(where: str, value: Any) -> Optimizer | None:
    return None if value is None else as_optimizer(where, value)


class FedNova(WeightedAggregator):
    r"""FedNova: averages directions, then takes the mean amount of work along their mean.

    .. math:: u = \tau \sum_i p_i \frac{\Delta_i}{a_i}, \qquad \tau = \sum_i p_i a_i, \qquad p_i = n_i / \textstyle\sum_j n_j

    For plain SGD :math:`a_i` is the number of local steps. For an Optimizer that is linear in the gradients (momentum, a proximal
    term, weight decay, a schedule of steps) it is the paper's :math:`\|a_i\|_1`, up to a factor that cancels: how far the
    Optimizer carries a single weight whose gradient is always 1.

    Args:
        by: What a client weighs, ``n_i``: ``"examples"`` (the paper's), ``"steps"`` or ``"uniform"``.
        optimizer: The client's Optimizer where it is not plain SGD with one rate; None counts steps.

    Raises:
        ValueError: If the Optimizer keeps its state between rounds or exchanges auxiliary variables: then no count of steps tells
            how far it goes.

    Example:
        >>> updates, steps = jnp.array([[1.0], [12.0]]), jnp.array([1.0, 3.0])
        >>> print(FedNova("uniform").aggregate(updates, steps))  # directions 1 and 4; 2 steps along their mean
        [5.]

    References:
        Wang et al., `Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization
        <https://arxiv.org/abs/2007.07481>`_, 2020
    """

    name = "fednova"
    by: str = part.field(as_weighting, default="examples", is_static=True)
    optimizer: Optimizer | None = part.field(_as_optional_optimizer, default=None)

    def check(self) -> None:
        """Refuses an Optimizer whose reach depends on more than the steps of a round."""
        optimizer = self.optimizer
        if optimizer is not None and (optimizer.keep_state or optimizer.aux_names):
            reason = "with keep_state or auxiliary variables, steps alone do not tell how far it goes"
            raise ValueError(f"FedNova.optimizer: {reason}. Leave them out, or count steps with optimizer=None.")

    def prepare(self, upload: Upload, sent: Any) -> tuple[Params, jax.Array]:
        """``n_i Delta_i / a_i`` and ``n_i a_i``."""
        weight, reach = self.weigh(upload.metrics), self._reach(upload.metrics["steps"])
        return trees.scale(weight * reciprocal(reach), trees.widen(upload.delta)), weight * reach

    def finalize(self, total: tuple[Params, jax.Array], state: Any, info: CohortInfo) -> tuple[Params, Any]:
        """The mean direction times the mean reach."""
        (directions, reach), inverse = total, reciprocal(info.weight)
        return trees.scale(inverse * (inverse * reach), directions), state

    def _reach(self, steps: jax.Array) -> jax.Array:
        """``a_i``: the steps, or how far the Optimizer carries a weight that begins at 0 under gradients of 1."""
        if self.optimizer is None:
            return steps
        optimizer, zero = self.optimizer, jnp.zeros_like(steps)
        state = optimizer.start_round(optimizer.init_kept(zero, jax.random.key(0)), RoundStart(zero))

        def step(_: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            updates, state = optimizer.update(jnp.ones_like(zero), carry[1], carry[0])
            return carry[0] + updates, state

        return -jax.lax.fori_loop(0, steps.astype(jnp.int32), step, (zero, state))[0]
