"""Which rows a local step sees: a client's rows, and a policy that is a Part."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxfed import checks, part
from jaxfed.part import Part
from jaxfed.permutation import permute

# Streams of the key of one client's round. The orders of passes are hashed from the key itself.
STEP, PASS, PERSONAL, ORDER, OPTIMIZER, ATTACK = range(6)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClientRows:
    """One client's rows inside flat arrays.

    Attributes:
        arrays: ``[examples, ...]`` by key, the rows of all clients.
        start: The client's first row.
        size: How many rows it holds.
        work: How much of its local work it does, as a factor: 1.0 is all, 0.0 none.
        capacity: The most rows that any client holds; sizes a full batch.
        fixed: Whether loops have a trip count that the program knows, as reverse-mode differentiation needs.
    """

    arrays: dict[str, jax.Array]
    start: jax.Array | int
    size: jax.Array | int
    work: jax.Array | float = 1.0
    capacity: int = dataclasses.field(default=1, metadata={"static": True})
    fixed: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def of(cls, arrays: dict[str, Any]) -> Self:
        """The rows of one client alone, as a deployment has them: arrays ``[n, ...]`` by key."""
        rows = len(next(iter(arrays.values())))
        return cls({key: jnp.asarray(x) for key, x in arrays.items()}, 0, rows, 1.0, rows)

    def take(self, rows: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        """A batch: the rows ``[B]`` (numbers within the client) of every array, and the mask ``[B]``."""
        index = self.start + jnp.clip(rows, 0, jnp.maximum(self.size - 1, 0))
        return {key: jnp.take(x, index, axis=0, mode="clip") for key, x in self.arrays.items()} | {"mask": mask}


class BatchPolicy(Part, kind="batches"):
    """How many local steps a client takes in a round and which rows each step sees."""

    batch_size: int | None = part.size(optional=True)

    def width(self, rows: ClientRows) -> int:
        """``B``, static: the batch size, or the largest client's rows where it is None."""
        return rows.capacity if self.batch_size is None else self.batch_size

    def num_steps(self, size: ArrayLike, work: ArrayLike, capacity: int) -> jax.Array:
        """Local steps of a client with ``size`` rows, an integer; 0 without rows."""
        raise NotImplementedError(f"{type(self).__name__} defines no num_steps(size, work, capacity).")

    def choose(self, key: jax.Array, step: jax.Array, rows: ClientRows) -> tuple[jax.Array, jax.Array]:
        """The rows ``[B]`` of a step, numbers within the client, and the mask ``[B]``."""
        raise NotImplementedError(f"{type(self).__name__} defines no choose(key, step, rows).")

    def of(self, rows: ClientRows, key: jax.Array) -> "Batches":
        """The batches of one client's round."""
        return Batches(self, rows, key)


class _Passes(BatchPolicy, register=False):
    """Passes over the client's rows, each in a new order; the last batch of a pass is partial."""

    shuffle: bool = part.static(default=True)

    def per_pass(self, size: ArrayLike, capacity: int) -> jax.Array:
        """Steps of one pass: ``ceil(size / B)``."""
        width = capacity if self.batch_size is None else self.batch_size
        return (jnp.asarray(size) + width - 1) // width

    def choose(self, key: jax.Array, step: jax.Array, rows: ClientRows) -> tuple[jax.Array, jax.Array]:
        """The step's slice of its pass's order; rows past the end repeat the last one and are masked."""
        width, per_pass = self.width(rows), jnp.maximum(self.per_pass(rows.size, rows.capacity), 1)
        positions = (step % per_pass) * width + jnp.arange(width)
        mask = positions < rows.size
        positions = jnp.minimum(positions, jnp.maximum(rows.size - 1, 0))
        if not self.shuffle:
            return positions, mask
        return permute(key, positions, rows.size, tweak=step // per_pass), mask


class Epochs(_Passes):
    """``epochs`` passes over the client's rows in batches of ``batch_size``.

    ``epochs * ceil(n / B)`` steps; the order of each pass is a fresh keyed permutation.

    Args:
        batch_size: ``B``; None takes all rows at once (full-batch steps).
        shuffle: Whether rows are reordered; without it every pass goes in the order of the data.
        epochs: Passes a round, at least 1.

    Example:
        >>> Epochs(batch_size=20).num_steps(45, 1.0, 100).item()
        3
    """

    name = "epochs"
    epochs: int = part.count(default=1, at_least=1)

    def num_steps(self, size: ArrayLike, work: ArrayLike, capacity: int) -> jax.Array:
        """``epochs * work`` passes, rounded to whole steps."""
        return jnp.round(self.per_pass(size, capacity) * (self.epochs * jnp.asarray(work, jnp.float32))).astype(jnp.int32)


class Steps(_Passes):
    """A fixed number of local steps; a small client wraps into new passes.

    Args:
        batch_size: ``B``; None takes all rows at once.
        shuffle: Whether rows are reordered.
        steps: Local steps a round, at least 1.

    Example:
        >>> Steps(batch_size=20, steps=50).num_steps(45, 1.0, 100).item()
        50
    """

    name = "steps"
    steps: int = part.count(default=1, at_least=1)

    def num_steps(self, size: ArrayLike, work: ArrayLike, capacity: int) -> jax.Array:
        """``steps * work``, rounded; none without rows."""
        del capacity
        return _fixed_steps(self.steps, size, work)


class Poisson(BatchPolicy):
    """Steps whose batches hold each row with probability ``rate``, independently: what privacy accounting assumes.

    The number of rows is drawn from Binomial(n, rate) and cut at ``batch_size``; which rows, by a keyed permutation.

    Args:
        batch_size: The most rows of a batch, ``B``.
        steps: Local steps a round.
        rate: The probability of a row to be in a batch, above 0 and at most 1.
    """

    name = "poisson"
    steps: int = part.count(default=1, at_least=1)
    rate: float = part.number(default=0.1, above=0, at_most=1)

    def num_steps(self, size: ArrayLike, work: ArrayLike, capacity: int) -> jax.Array:
        """``steps * work``, rounded; none without rows."""
        del capacity
        return _fixed_steps(self.steps, size, work)

    def choose(self, key: jax.Array, step: jax.Array, rows: ClientRows) -> tuple[jax.Array, jax.Array]:
        """A uniformly random subset whose size is binomial."""
        order_key, count_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, ORDER), step))
        positions = jnp.arange(self.width(rows))
        # How many rows are drawn has no derivative, and the sampler is a loop that reverse mode does not pass.
        rate = jax.lax.stop_gradient(self.rate)
        drawn = jax.random.binomial(count_key, jnp.asarray(rows.size, jnp.float32), rate)
        mask = positions < jnp.minimum(drawn, rows.size)
        positions = jnp.minimum(positions, jnp.maximum(rows.size - 1, 0))
        return permute(order_key, positions, rows.size), mask


def _fixed_steps(steps: ArrayLike, size: ArrayLike, work: ArrayLike) -> jax.Array:
    done = jnp.round(jnp.asarray(steps) * jnp.asarray(work, jnp.float32)).astype(jnp.int32)
    return jnp.where(jnp.asarray(size) > 0, done, 0)


class Batches:
    """The batches of one client's round, and the only loop over local steps that an algorithm writes."""

    def __init__(self, policy: BatchPolicy, rows: ClientRows, key: jax.Array):
        self.policy, self.rows, self.key = policy, rows, key
        # A key that nobody uses costs nothing.
        self.step_key, self.pass_key = jax.random.fold_in(key, STEP), jax.random.fold_in(key, PASS)
        self.steps = policy.num_steps(rows.size, rows.work, rows.capacity)

    def batch(self, step: jax.Array | int) -> dict[str, jax.Array]:
        """The batch of a local step: arrays ``[B, ...]`` by key, and ``"mask"`` ``[B]``."""
        return self.rows.take(*self.policy.choose(self.key, jnp.asarray(step), self.rows))

    def fold(self, step: Callable[[Any, dict, jax.Array], Any], carry: Any) -> Any:
        """``carry = step(carry, batch, key)`` for every local step, compiled, with a trip count that is data."""

        def body(k: jax.Array, carry: Any) -> Any:
            return step(carry, self.batch(k), jax.random.fold_in(self.step_key, k))

        return _repeat(self.steps, body, carry, self._most(self.policy))

    def fold_all(self, step: Callable[[Any, dict], Any], carry: Any) -> Any:
        """``carry = step(carry, batch)`` once over all the client's rows, in the order of the data."""
        every = Epochs(batch_size=self.policy.batch_size, shuffle=False)
        passes = every.num_steps(self.rows.size, jnp.where(self.steps > 0, 1.0, 0.0), self.rows.capacity)

        def body(k: jax.Array, carry: Any) -> Any:
            return step(carry, self.rows.take(*every.choose(self.key, k, self.rows)))

        return _repeat(passes, body, carry, self._most(every))

    def _most(self, policy: BatchPolicy) -> int | None:
        """The most steps that any client takes by a policy, where trip counts are to be known."""
        if not self.rows.fixed:
            return None
        capacity = self.rows.capacity
        with jax.ensure_compile_time_eval():
            most = policy.num_steps(capacity, 1.0, capacity)
        if checks.is_traced(most):
            remedy = "Close over the algorithm instead of passing its epochs or steps through jit, vmap or grad"
            raise TypeError(f"Differentiable rounds need a number of local steps that the program knows. {remedy}.")
        return int(most)


def _repeat(times: jax.Array, body: Callable[[jax.Array, Any], Any], carry: Any, most: int | None) -> Any:
    """``carry = body(k, carry)`` for k below ``times``, which is data; a scan of ``most`` trips where that is given.

    Reverse mode passes the scan. It keeps the carries alone; what a step computes inside is computed again on the way back.
    """
    if most is None:
        return jax.lax.fori_loop(0, times, body, carry)

    @jax.checkpoint
    def trip(carry: Any, k: jax.Array) -> tuple[Any, None]:
        # Not a ``where``: without lanes a trip past the end costs nothing, and has no infinite slope to be multiplied by 0.
        return jax.lax.cond(k < times, lambda: body(k, carry), lambda: carry), None

    return jax.lax.scan(trip, carry, jnp.arange(most, dtype=times.dtype))[0]
