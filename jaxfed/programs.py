"""Traced programs: how they nest, and what their loops do (pure JAX)."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

_COSTLY = frozenset(
    "acos acosh asin asinh atan atan2 atanh cbrt cos cosh erf erf_inv erfc exp exp2 expm1 lgamma log log1p logistic pow rsqrt "
    "sin sinh sqrt tan tanh".split()
)


class LoopWork(NamedTuple):
    """What one pass through the innermost loops of a program does; of loops within, a scan counts as often as it runs.

    Attributes:
        flops: Floating-point operations of its matrix products and convolutions; a multiplication with an addition counts as two.
            Those of an inner loop over the rows of an array count for every row.
        curved: Numbers that pass through a function such as ``exp``, ``tanh`` or ``sqrt``, but for those that are only written
            into a larger array; those of an inner loop over rows count for every row, too.
        results: Numbers that its operations give, a loop's own two included.
        carried: Numbers that one pass hands to the next.
    """

    flops: float
    curved: float
    results: float
    carried: float


def inner_programs(eqn: Any) -> Iterator[core.Jaxpr]:
    """The programs inside of an equation: those of loops, branches and nested calls."""
    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner


def loop_work(program: core.Jaxpr, depth: int) -> LoopWork:
    """What is done inside of ``depth`` loops, one in the other, or more.

    Args:
        program: As ``jax.make_jaxpr`` traces it.
        depth: How many loops must lie around an operation for it to count.

    Example:
        >>> import jax.numpy as jnp
        >>> def steps(w, count):
        ...     return jax.lax.fori_loop(0, count, lambda _, w: jnp.tanh(w @ w), jnp.exp(w))
        >>> loop_work(jax.make_jaxpr(steps)(jnp.ones((3, 3)), 5).jaxpr, depth=1)
        LoopWork(flops=54.0, curved=9.0, results=20.0, carried=11.0)
    """
    flops = curved = results = carried = 0.0
    written = _written(program)
    for eqn in program.eqns:
        name, programs = eqn.primitive.name, list(inner_programs(eqn))
        if depth <= 0:
            flops += _FLOPS[name](eqn) if name in _FLOPS else 0.0
            curved += _size(eqn) if name in _COSTLY and eqn.outvars[0] not in written else 0
            results += 0 if programs else _results(eqn)
        elif depth == 1 and name in _LOOPS:
            carried += _numbers(eqn.outvars[: eqn.params.get("num_carry")])
        length = eqn.params["length"] if name == "scan" and depth <= 1 else 1
        times = _rows_of(eqn) if name == "while" and depth <= 0 else length
        for inner in programs:
            more = loop_work(inner, depth - (name in _LOOPS))
            flops, curved = flops + times * more.flops, curved + times * more.curved
            results, carried = results + length * more.results, carried + more.carried
    return LoopWork(flops, curved, results, carried)


def _rows_of(loop: Any) -> int:
    """How often a loop over the rows of an array runs at most; others may run as often as they like and count once."""
    pieces = [eqn for eqn in loop.params["body_jaxpr"].jaxpr.eqns if eqn.primitive.name in ("dynamic_slice", "gather")]
    return max((eqn.invars[0].aval.size // max(1, _size(eqn)) for eqn in pieces), default=1)


def _written(program: core.Jaxpr) -> set[Any]:
    """The variables that nothing reads but what writes them into a larger array: they never take the place of another number."""
    readers = Counter(id(value) for value in [*program.outvars, *(value for eqn in program.eqns for value in eqn.invars)])
    written: set[Any] = set()
    for eqn in reversed(program.eqns):
        name, place = eqn.primitive.name, _UPDATE.get(eqn.primitive.name, 0)
        if place or (name in ("broadcast_in_dim", "reshape") and eqn.outvars[0] in written):
            value = eqn.invars[place]
            written |= {value} if isinstance(value, core.Var) and readers[id(value)] == 1 else set()
    return written


def _product_flops(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2.0 * _size(eqn) * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)


def _convolution_flops(eqn: Any) -> float:
    kernel = eqn.invars[1].aval
    return 2.0 * _size(eqn) * kernel.size / kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]


def _results(eqn: Any) -> int:
    if eqn.primitive.name == "optimization_barrier":
        return 0
    # What is written into a larger array leaves the rest of it as it is.
    place = _UPDATE.get(eqn.primitive.name)
    return _numbers(eqn.outvars if place is None else [eqn.invars[place]])


def _numbers(values: Sequence[Any]) -> int:
    return sum(math.prod(getattr(value.aval, "shape", ())) for value in values)


_LOOPS = ("while", "scan")
# Which operand is written into the first; with several lanes JAX turns the one into the other, and dynamic_slice into gather.
_UPDATE = {"dynamic_update_slice": 1, "scatter": 2}
_FLOPS = {"dot_general": _product_flops, "conv_general_dilated": _convolution_flops}


def _size(eqn: Any) -> int:
    return eqn.outvars[0].aval.size
