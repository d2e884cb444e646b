"""Aggregation that undoes unequal amounts of local work."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxfed import part, trees
from jaxfed.messages import CohortInfo, Params, RoundStart, Upload
from jaxfed.optimizer.optimizer import Optimizer, as_optimizer
from jaxfed.server.aggregators import WeightedAggregator, as_weighting, over_weight


def _as_optional_optimizer(where: str, value: Any) -> Optimizer | None:
    return None if value is None else as_optimizer(where, value)


class FedNova(WeightedAggregator):
    r"""FedNova: averages directions, then takes the mean amount of work along their mean.

    .. math:: u = \tau \sum_i p_i \frac{\Delta_i}{a_i}, \qquad \tau = \sum_i p_i a_i, \qquad p_i = n_i / \textstyle\sum_j n_j

    For plain SGD :math:`a_i` is the number of local steps. For an Optimizer that is linear in the gradients (momentum, a proximal
    term, weight decay, a schedule) it is the paper's :math:`\|a_i\|_1`, up to a factor that cancels: how far the Optimizer
    carries a single weight whose gradient is always 1. Leaves with rates of their own have each its own.

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

    def init(self, params: Params) -> Any:
        """The round, for an Optimizer whose rate may depend on it; one behind after a round in which nobody counted."""
        del params
        return () if self.optimizer is None else jnp.zeros((), jnp.int32)

    def send(self, state: Any) -> Any:
        """The round."""
        return state

    def prepare(self, upload: Upload, sent: Any) -> tuple[Params, Params]:
        """``n_i Delta_i / a_i`` and ``n_i a_i``, leaf by leaf."""
        delta, weight = trees.widen(upload.delta), self.weigh(upload.metrics)
        reach = self._reach(delta, upload.metrics["steps"], sent)
        return trees.scale(weight, jax.tree.map(over_weight, delta, reach)), trees.scale(weight, reach)

    def finalize(self, total: tuple[Params, Params], state: Any, info: CohortInfo) -> tuple[Params, Any]:
        """The mean direction times the mean reach."""
        directions, reach = over_weight(total, info.weight)
        coming = () if self.optimizer is None else jnp.asarray(info.round + 1, jnp.int32)
        return jax.tree.map(jnp.multiply, reach, directions), coming

    def _reach(self, delta: Params, steps: jax.Array, round: Any) -> Params:
        """``a_i``, a scalar for each leaf: the steps, or how far the Optimizer carries a weight from 0 under gradients of 1."""
        if self.optimizer is None:
            return jax.tree.map(lambda x: steps.astype(x.dtype), delta)
        optimizer, zeros = self.optimizer, jax.tree.map(lambda x: jnp.zeros((), x.dtype), delta)
        ones, start = trees.full_like(zeros, 1.0), RoundStart(zeros, round=round)
        state = optimizer.start_round(optimizer.init_kept(zeros, jax.random.key(0)), start)

        def step(_: jax.Array, carry: tuple[Params, Any]) -> tuple[Params, Any]:
            updates, state = optimizer.update(ones, carry[1], carry[0])
            return optax.apply_updates(carry[0], updates), state

        ends, _ = jax.lax.fori_loop(0, steps.astype(jnp.int32), step, (zeros, state))
        return trees.scale(-1.0, ends)
