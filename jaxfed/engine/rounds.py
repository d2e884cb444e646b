"""Several rounds in one compiled call."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxfed.base import Params, RunState, Selector
from jaxfed.engine.algorithm import Algorithm
from jaxfed.engine.lanes import is_small
from jaxfed.engine.population import Population
from jaxfed.engine.round import RoundInfo, run_round


def rounds_program(params: Params) -> Callable[..., tuple[RunState, RoundInfo]]:
    """:func:`run_rounds`, compiled as it suits a model of this size.

    A CPU's compiler shares an operation between cores by the size of the arrays it sees, and counts all the data where a batch of
    them is gathered. For a small model handing the work over takes longer than doing it, so all of a program stays on one core.
    What it then does is quick, and to compile it as thoroughly as a large model's operations would take most of a first round.
    """
    return _for_small_models() if is_small(params) and jax.default_backend() == "cpu" else _for_large_models


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
_OPTIONS: dict[str, Any] = {"static_argnames": ("chunk", "lanes"), "donate_argnames": ("tables",)}
_for_large_models = jax.jit(run_rounds, **_OPTIONS)


@cache
def _for_small_models() -> Callable[..., tuple[RunState, RoundInfo]]:
    options = {"xla_cpu_multi_thread_eigen": False} | _if_known({"xla_cpu_use_fusion_emitters": False})
    return jax.jit(run_rounds, compiler_options=options, **_OPTIONS)


def _if_known(options: dict[str, Any]) -> dict[str, Any]:
    """The options, or none if this version of XLA has not all of them."""
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options
