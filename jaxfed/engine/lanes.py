"""Clients of any number in fixed memory on one device: waves of L side by side."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfed.messages import Params

_SMALL = 20_000


class Outcome(NamedTuple):
    """What one client gives.

    Attributes:
        summand: Its share of the sums.
        kept: Its kept row.
        row: A few numbers that are wanted of each client.
        stacked: What is wanted of each client though it is as large as the model.
        counts: Whether its kept row is to be stored.
    """

    summand: Any
    kept: Any
    row: Any
    stacked: Any
    counts: jax.Array


class Lane(NamedTuple):
    """What tells a client apart in its lane: key, slot, place of its kept row in the table, whether it was seen, work, age."""

    key: jax.Array
    slot: jax.Array
    place: jax.Array
    seen: jax.Array
    work: jax.Array
    age: Any = ()


Visit = Callable[[Lane, Any], Outcome]
"""``(lane, kept row) -> Outcome``, for one client."""


def fold_waves(visit: Visit, lanes: Lane, waves: jax.Array | int, table: Any) -> tuple[Any, Any, Outcome]:
    """Visits every client and adds up the summands.

    Each wave takes and puts back its kept rows in place. It lasts as long as its longest client, so clients should come sorted by
    their work.

    Args:
        visit: What one client does.
        lanes: ``[W, L]`` who comes when. One lane runs without ``vmap``, at no cost for it.
        waves: How many of the W waves there are; reverse mode passes the loop where the program knows it.
        table: The kept rows; a place outside is clamped for reading and dropped for writing.

    Returns:
        The sum of the summands, the new table, and the outcomes' ``row``, ``stacked`` and ``counts`` ``[W, L, ...]``, without the
        rest.
    """
    # Its shapes are asked for before the loop: what is jitted is traced once for both.
    visit = jax.jit(visit)
    example = jax.eval_shape(lambda: visit(*_first(lanes, table)))
    buffers = _zeros(example._replace(summand=(), kept=()), lanes.slot.shape)
    carry = (_zeros(example.summand), table, buffers)

    def wave(number: jax.Array, carry: tuple) -> tuple:
        total, table, buffers = carry
        lane = jax.tree.map(lambda x: x[number], lanes)
        outcome = _side_by_side(visit, lane, table)
        total = jax.tree.map(lambda t, x: t + x.sum(0, dtype=t.dtype), total, outcome.summand)
        table = _put(table, jnp.where(outcome.counts, lane.place, _length(table)), outcome.kept)
        buffers = jax.tree.map(lambda b, x: b.at[number].set(x), buffers, outcome._replace(summand=(), kept=()))
        return total, table, buffers

    return jax.lax.fori_loop(0, waves, wave, carry)


def default_lanes(params: Params, cohort_size: int) -> int:
    """A number of lanes by sizes: small models gain from running side by side, large ones fill the machine alone.

    On two CPU cores logistic regression is fastest with 10, a CNN and an LSTM with 1; an accelerator takes up to 64.
    """
    if jax.default_backend() != "cpu":
        return min(cohort_size, 64)
    return min(cohort_size, 10) if is_small(params) else 1


def is_small(params: Params) -> bool:
    """Whether a model's operations are so short that starting them is what takes time: below 20,000 weights.

    >>> is_small({"w": jnp.zeros((784, 10))}), is_small({"w": jnp.zeros((784, 64))})
    (True, False)
    """
    return sum(x.size for x in jax.tree.leaves(params)) < _SMALL


def _side_by_side(visit: Visit, lane: Lane, table: Any) -> Outcome:
    if lane.slot.shape[0] == 1:
        one = jax.tree.map(lambda x: x[0], lane)
        return jax.tree.map(lambda x: jnp.asarray(x)[None], visit(one, _take(table, one.place)))
    return jax.vmap(visit)(lane, _take(table, lane.place))


def _first(lanes: Lane, table: Any) -> tuple[Lane, Any]:
    lane = jax.tree.map(lambda x: x[0, 0], lanes)
    return lane, _take(table, lane.place)


def _take(table: Any, places: jax.Array) -> Any:
    def rows(x: jax.Array) -> jax.Array:
        # A row in one piece: copied axis by axis, a row that is in no cache is waited for again and again.
        pieces = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        return pieces[jnp.clip(places, 0, x.shape[0] - 1)].reshape(*places.shape, *x.shape[1:])

    return jax.tree.map(rows, table)


def _put(table: Any, places: jax.Array, rows: Any) -> Any:
    return jax.tree.map(lambda x, new: x.at[places].set(new.astype(x.dtype), mode="drop"), table, rows)


def _length(table: Any) -> int:
    return max((x.shape[0] for x in jax.tree.leaves(table)), default=0)


def _zeros(tree: Any, leading: tuple[int, ...] = ()) -> Any:
    return jax.tree.map(lambda x: jnp.zeros((*leading, *x.shape), x.dtype), tree)
