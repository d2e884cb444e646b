"""A cohort of any size in fixed memory: waves of L clients side by side, the longest first."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfed.base import Cohort, Params


class Tables(NamedTuple):
    """What clients keep between rounds ``[N, ...]``, and which have taken part ``[N]``."""

    kept: Any
    seen: jax.Array


class Outcome(NamedTuple):
    """What one client gives: its share of the sums, its kept row, and what is wanted of each client apart."""

    summand: Any
    kept: Any
    apart: Any
    counts: jax.Array


Client = Callable[[jax.Array, jax.Array, jax.Array, Any, jax.Array], Outcome]
"""``(id, valid, work, kept row, seen) -> Outcome``, all for one client."""


def fold_clients(
    client: Client, cohort: Cohort, steps: jax.Array, tables: Tables, lanes: int, fixed: bool = False
) -> tuple[Any, Tables, Any]:
    """Runs every client of a cohort and adds up the summands.

    Clients are sorted by their local steps, so that those of a wave end together: work grows with the examples, not with C times
    the longest client. Each wave takes and puts back its kept rows in place.

    Args:
        client: What one client does.
        cohort: ``[C]``; C need not be a multiple of the lanes.
        steps: ``[C]`` local steps.
        tables: The kept rows.
        lanes: ``L``, static. One lane runs without ``vmap``, at no cost for it.
        fixed: Whether to run empty waves too, so that reverse mode passes the loop; a client's insides are then computed again.

    Returns:
        The sum of the summands, the new tables, and ``(apart, counts)`` with a leading ``[C]``.
    """
    client = jax.checkpoint(client) if fixed else client
    population, size = tables.seen.shape[0], cohort.ids.shape[0]
    order = jnp.argsort(jnp.where(cohort.valid, steps, -1), descending=True)
    waves = -(-size // lanes)
    # A padding lane has the number N: its gathers are clamped, its scatters dropped, its work is none.
    padded = [_pad(x[order], waves * lanes, fill).reshape(waves, lanes) for x, fill in zip(cohort, (population, False, 0))]
    ids, valid, work = (x[0, 0] for x in padded)
    example = jax.eval_shape(lambda: client(ids, valid, work, *_gather(tables, ids)))
    outcomes = (example.apart, example.counts)
    buffers = jax.tree.map(lambda x: jnp.zeros((waves, lanes, *x.shape), x.dtype), outcomes)
    carry = (jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example.summand), tables, buffers)

    def wave(number: jax.Array, carry: tuple) -> tuple:
        total, tables, buffers = carry
        ids, valid, work = (x[number] for x in padded)
        outcome = _side_by_side(client, ids, valid, work, tables)
        total = jax.tree.map(lambda t, x: t + x.sum(0, dtype=t.dtype), total, outcome.summand)
        rows = jnp.where(outcome.counts, ids, population)
        buffers = jax.tree.map(lambda b, x: b.at[number].set(x), buffers, (outcome.apart, outcome.counts))
        return total, _scatter(tables, rows, outcome.kept), buffers

    needed = waves if fixed else -(-cohort.valid.sum() // lanes)
    total, tables, buffers = jax.lax.fori_loop(0, needed, wave, carry)
    by_client = jax.tree.map(lambda b: _unsort(b.reshape(waves * lanes, *b.shape[2:])[:size], order), buffers)
    return total, tables, by_client


def default_lanes(params: Params, cohort_size: int) -> int:
    """A number of lanes by sizes: small models gain from running side by side, large ones fill the machine alone.

    On two CPU cores logistic regression is fastest with 10, a CNN and an LSTM with 1; an accelerator takes up to 64.
    """
    weights = sum(x.size for x in jax.tree.leaves(params))
    if jax.default_backend() != "cpu":
        return min(cohort_size, 64)
    return min(cohort_size, 10) if weights < 20_000 else 1


def _side_by_side(client: Client, ids: jax.Array, valid: jax.Array, work: jax.Array, tables: Tables) -> Outcome:
    if ids.shape[0] == 1:
        outcome = client(ids[0], valid[0], work[0], *_gather(tables, ids[0]))
        return jax.tree.map(lambda x: jnp.asarray(x)[None], outcome)
    return jax.vmap(client)(ids, valid, work, *_gather(tables, ids))


def _gather(tables: Tables, ids: jax.Array) -> tuple[Any, jax.Array]:
    ids = jnp.minimum(ids, tables.seen.shape[0] - 1)
    return jax.tree.map(lambda x: x[ids], tables.kept), tables.seen[ids]


def _scatter(tables: Tables, rows: jax.Array, kept: Any) -> Tables:
    put = jax.tree.map(lambda x, new: x.at[rows].set(new.astype(x.dtype), mode="drop"), tables.kept, kept)
    return Tables(put, tables.seen.at[rows].set(True, mode="drop"))


def _pad(values: jax.Array, length: int, fill: Any) -> jax.Array:
    return jnp.concatenate([values, jnp.full((length - values.shape[0],), fill, values.dtype)])


def _unsort(values: jax.Array, order: jax.Array) -> jax.Array:
    return jnp.zeros_like(values).at[order].set(values)
