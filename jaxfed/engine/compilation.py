"""Rounds as compiled programs: with the options that suit a model, and without what the compiler leaves behind."""

import contextlib
import ctypes
from functools import cache
from typing import Any

import jax

from jaxfed.engine.lanes import is_small
from jaxfed.engine.round import RoundInfo
from jaxfed.engine.rounds import run_rounds
from jaxfed.messages import RunState
from jaxfed.programs import loop_work

_OPTIONS: dict[str, Any] = {"static_argnames": ("chunk", "lanes"), "donate_argnames": ("tables",)}
# Rounds, clients, steps: what lies inside of three loops is done in every local step.
_STEP = 3
# Nanoseconds that a number takes longer in a scalar loop, where it passes through tanh or sqrt and where it is only added to, as
# weights are in every step; and the flops of a core in a nanosecond. So much of its time a step may lose.
_CURVED, _CARRIED, _FLOPS, _LOST = 3.0, 0.4, 100.0, 0.05
# Handing a part of an operation to another core takes several microseconds. Where a step's operations give fewer numbers than
# this in all, that is lost: on two cores rounds then take 10% to 30% less time on one thread.
_HANDED_OVER = 400_000
# XLA takes a gather for one that reads its whole table, so with many clients it would hand over the half of ten numbers.
_ONE_THREAD = {"xla_cpu_multi_thread_eigen": False, "xla_disable_hlo_passes": "cpu-parallel-task-assigner"}


class Rounds:
    """:func:`~jaxfed.engine.rounds.run_rounds`, compiled with the options that suit its arguments.

    A CPU's compiler has two ways to write a kernel. The older takes a third less time and 200 MB less, but a kernel that writes
    over its own input, as those of weights, of Adam's moments and of a recurrent cell's gates do, goes number by number. Where
    products take nearly all of a step's time its program takes the older way; so do those with the package's recurrent layers,
    which write gates elsewhere.

    Small steps run on one thread: what they would hand to another core is done before that one has begun.

    Compiling a large program frees 200 MB that the C library keeps; they are given back before the program runs.
    """

    def __init__(self):
        self._programs: dict[tuple, Any] = {}

    def __call__(self, *arguments: Any, **options: int) -> tuple[RunState, RoundInfo]:
        """Runs them; ``chunk`` and ``lanes`` that have not been seen are compiled first."""
        shape = tuple(options.values())
        if shape not in self._programs:
            program = rounds_program(*arguments, **options)
            program.lower(*arguments, **options).compile()
            _give_back_memory()
            self._programs[shape] = program
        return self._programs[shape](*arguments, **options)


def rounds_program(*arguments: Any, **options: int) -> Any:
    """The jitted function of which :class:`Rounds` takes the program."""
    default = _program(quickly=False, multi_thread=True)
    if jax.default_backend() != "cpu":
        return default
    work = loop_work(default.trace(*arguments, **options).jaxpr.jaxpr, _STEP)
    lost = _CURVED * work.curved + _CARRIED * work.carried
    quickly = is_small(arguments[1].params) or lost < _LOST * work.flops / _FLOPS
    return _program(quickly=quickly, multi_thread=work.results > _HANDED_OVER)


@cache
def _program(*, quickly: bool, multi_thread: bool) -> Any:
    wanted = ({"xla_cpu_use_fusion_emitters": False} if quickly else {}) | ({} if multi_thread else _ONE_THREAD)
    return jax.jit(run_rounds, compiler_options=_if_known(wanted) or None, **_OPTIONS)


@cache
def _known(option: str, value: bool | str) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={option: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _if_known(options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that this version of XLA has."""
    return {option: value for option, value in options.items() if _known(option, value)}


def _give_back_memory() -> None:
    """Gives freed memory back to the system, where the C library can (glibc)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
