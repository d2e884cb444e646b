"""Several rounds in one compiled call."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxfed.base import Selector
from jaxfed.engine.algorithm import Algorithm
from jaxfed.engine.population import Population
from jaxfed.engine.round import RoundInfo, run_round
from jaxfed.messages import RunState


def run_rounds(
    parts: tuple[Algorithm, Selector, Population], state: RunState, tables: tuple, rounds: jax.Array, *, chunk: int, lanes: int
) -> tuple[RunState, RoundInfo]:
    """Up to ``chunk`` rounds; how many is data.

    Args:
        parts: What the rounds are made of.
        state: Without ``kept`` and ``seen``.
        tables: These two, which are donated.
        rounds: How many rounds, at most ``chunk``.
        chunk: Static.
        lanes: ``L``, static.

    Returns:
        The state, and infos with a leading ``[chunk]``.
    """
    state = state._replace(kept=tables[0], seen=tables[1])
    one_round = partial(_traced_once, *parts, lanes=lanes)
    example = jax.eval_shape(lambda s: one_round(s)[1], state)
    infos = jax.tree.map(lambda x: jnp.zeros((chunk, *x.shape), x.dtype), example)

    def body(number: jax.Array, carry: tuple[RunState, RoundInfo]) -> tuple[RunState, RoundInfo]:
        state, infos = carry
        state, info = one_round(state)
        return state, jax.tree.map(lambda b, x: b.at[number].set(x), infos, info)

    return jax.lax.fori_loop(0, rounds, body, (state, infos))


# The shapes of its report are asked for before the loop.
_traced_once = jax.jit(run_round, static_argnames=("lanes",))
