"""What compiled programs cost, by the compiler's account, and what the devices can do at most, measured. Host side."""

import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import PartitionSpec

from jaxfed.engine.mesh import AXES, Devices
from jaxfed.programs import inner_programs

_KINDS = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(_KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
# Side of the matrices and length of the array with which a device is measured: large for its caches, moments of its time.
_SIDES, _LENGTHS = {"cpu": 768}, {"cpu": 2**24}
_SIDE, _LENGTH = 8192, 2**28


class Cost(NamedTuple):
    """Arithmetic and memory traffic of a program.

    Attributes:
        flops: Floating-point operations; a multiplication with an addition counts as two.
        bytes: Bytes that its instructions read and write, in caches or in memory.
    """

    flops: float
    bytes: float

    def plus(self, other: "Cost", times: float = 1.0) -> "Cost":
        """This and another one so many times.

        >>> Cost(1.0, 2.0).plus(Cost(10.0, 20.0), 3)
        Cost(flops=31.0, bytes=62.0)
        """
        return Cost(self.flops + times * other.flops, self.bytes + times * other.bytes)


class Collective(NamedTuple):
    """The collectives of one kind in a program.

    Attributes:
        count: How many.
        bytes: What each device gives or gets, whichever is more, in all of them.
    """

    count: int
    bytes: int


class Peak(NamedTuple):
    """What the devices of a run do at most, all of them at once.

    Attributes:
        flops: Floating-point operations a second of a float32 matrix product.
        bytes: Bytes a second that are read and written where a large array is rewritten.
    """

    flops: float
    bytes: float


def cost_of(function: Callable, *shapes: Any) -> Cost:
    """The compiler's account of a function of these shapes.

    XLA counts the body of a loop once. Here the body of a ``scan`` counts as often as it runs; a loop whose trip count is data
    still counts once.

    Args:
        function: What is compiled.
        shapes: Its arguments, or their shapes and dtypes.

    Example:
        >>> def power(x):
        ...     return jax.lax.scan(lambda x, _: (x @ x, None), x, length=10)[0]
        >>> cost = cost_of(power, jax.ShapeDtypeStruct((8, 8), jnp.float32))
        >>> round(cost.flops / (10 * 2 * 8**3), 1)
        1.0
    """
    return _cost(jax.make_jaxpr(function)(*shapes))


def collectives(text: str, devices: int) -> dict[str, Collective]:
    """The collectives in the text of a compiled program, each counted once wherever it stands.

    Args:
        text: From ``compiled.as_text()``.
        devices: How many take part.

    >>> collectives("%x.1 = f32[10,2]{1,0} all-reduce(%y), channel_id=1", devices=2)
    {'all-reduce': Collective(count=1, bytes=80)}
    """
    found: dict[str, Collective] = {}
    for shapes, kind, started in _COLLECTIVE.findall(text):
        sizes = [_bytes(dtype, bits, lengths) for dtype, bits, lengths in _SHAPE.findall(shapes)]
        # What starts such a collective holds operand and result.
        size = max(sizes, default=0) if started and kind != "all-reduce" else sum(sizes)
        size *= devices if kind == "reduce-scatter" else 1
        before = found.get(kind, Collective(0, 0))
        found[kind] = Collective(before.count + 1, before.bytes + size)
    return found


def measure_peak(devices: Devices, repetitions: int = 5) -> Peak:
    """Times a float32 matrix product and the rewriting of a large array on all devices at once; the best of some repetitions."""
    platform, count = jax.default_backend(), devices.count
    side, length = _SIDES.get(platform, _SIDE), _LENGTHS.get(platform, _LENGTH)
    length //= count if platform == "cpu" else 1
    matrices = _on_each(devices, (count, side, side))
    multiply = jax.jit(lambda x: jnp.einsum("dij,djk->dik", x, x, preferred_element_type=jnp.float32))
    rewrite = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = _on_each(devices, (count, length))

    def rewritten() -> jax.Array:
        nonlocal array
        array = rewrite(array)
        return array

    flops = count * 2 * side**3 / _fastest(lambda: multiply(matrices), repetitions)
    return Peak(flops, 2 * 4 * count * length / _fastest(rewritten, repetitions))


def process_memory() -> int | None:
    """The most memory that this process has had at once, in bytes; None where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _cost(program: ClosedJaxpr) -> Cost:
    cost = _as_counted(program)
    for body, length in _scans(program.jaxpr):
        cost = cost.plus(_cost(body), length).plus(_as_counted(body), -1)
    return cost


def _as_counted(program: ClosedJaxpr) -> Cost:
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in program.in_avals]
    counted: Any = jax.jit(jaxpr_as_fun(program)).lower(*shapes).compile().cost_analysis() or {}
    return Cost(counted.get("flops", 0.0), counted.get("bytes accessed", 0.0))


def _scans(program: Any) -> Iterator[tuple[ClosedJaxpr, int]]:
    """The outermost scans of more than one trip, with their bodies."""
    for equation in program.eqns:
        if equation.primitive.name == "scan":
            # A loop of one trip is no loop for the compiler, and one of none is nothing.
            if equation.params["length"] > 1:
                yield equation.params["jaxpr"], equation.params["length"]
            continue
        for inner in inner_programs(equation):
            yield from _scans(inner)


def _bytes(dtype: str, bits: str, lengths: str) -> int:
    size = 8 if dtype == "pred" else int(bits)
    for length in filter(None, lengths.split(",")):
        size *= int(length)
    return size // 8


def _on_each(devices: Devices, shape: tuple[int, ...]) -> jax.Array:
    sharding = None if devices.mesh is None else devices.sharding(PartitionSpec(AXES))
    return jax.jit(partial(jnp.ones, shape, jnp.float32), out_shardings=sharding)()


def _fastest(call: Callable[[], jax.Array], repetitions: int) -> float:
    call().block_until_ready()
    seconds = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        call().block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
