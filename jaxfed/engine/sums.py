"""What is added up over a cohort: the aggregator's summand, weighted statistics, and auxiliary variables as they declare."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfed import trees
from jaxfed.engine.algorithm import Algorithm
from jaxfed.messages import CohortInfo, RunState, Stats, Upload
from jaxfed.server.aggregators import over_weight


class Summand(NamedTuple):
    """One client's share of the sums; all zeros if it does not count."""

    update: Any
    stats: Stats
    aux: dict[str, Any]
    weight: jax.Array
    clients: jax.Array


class Reduced(NamedTuple):
    """What the server takes from a cohort: pseudo-gradient, statistics, auxiliary variables, the aggregator's state."""

    gradient: Any
    stats: Stats
    aux: dict[str, Any]
    aggregator: Any


def share_of(algorithm: Algorithm, upload: Upload, kept: Any, sent: Any) -> tuple[Summand, Any, jax.Array]:
    """A client's summand, what an aggregator that stacks wants of it apart, and whether it counts.

    A client counts if it did local steps, and what it sends and what it is to keep are finite throughout. One that does not is
    left out on its own side, through ``where``: 0 times NaN would be NaN.
    """
    if algorithm.aggregator.stacks:
        stacked = trees.widen(upload._replace(stats=_floating(upload.stats)))
        share = (Summand((), (), {}, algorithm.aggregator.weigh(upload.metrics), jnp.ones(())), stacked)
    else:
        share = (_summand(algorithm, upload, sent), ())
    counts = (upload.metrics["steps"] > 0) & trees.all_finite((share, kept))
    return *trees.select(counts, share, trees.zeros_like(share)), counts


def reduce_cohort(
    algorithm: Algorithm, total: Summand, stacked: Any, weights: jax.Array, state: RunState, info: CohortInfo
) -> Reduced:
    """Finalizes the sums, or combines what was stacked ``[C, ...]``."""
    if algorithm.aggregator.stacks:
        one, aggregator = algorithm.aggregator.combine(stacked, weights, state.aggregator, info)
        return Reduced(one.delta, _like_old(one.stats, state.stats), one.aux, aggregator)
    gradient, aggregator = algorithm.aggregator.finalize(total.update, state.aggregator, info)
    how = algorithm.client.aux_reductions
    aux = {name: _reduce(value, total.weight, how[name]) for name, value in total.aux.items()}
    return Reduced(gradient, _like_old(over_weight(total.stats, total.weight), state.stats), aux, aggregator)


def _summand(algorithm: Algorithm, upload: Upload, sent: Any) -> Summand:
    weight = algorithm.aggregator.weigh(upload.metrics)
    aux = {name: _weigh(value, weight, algorithm.client.aux_reductions[name]) for name, value in upload.aux.items()}
    update = trees.widen(algorithm.aggregator.prepare(upload, sent))
    return Summand(update, trees.scale(weight, _floating(upload.stats)), aux, weight, jnp.ones(()))


def _like_old(stats: Stats, old: Stats) -> Stats:
    """Reduced floating statistics in their old dtypes; others stay the server's."""
    return jax.tree.map(lambda m, s: m.astype(s.dtype) if jnp.issubdtype(s.dtype, jnp.inexact) else s, stats, old)


def _weigh(aux: Any, weight: jax.Array, reduction: str | Mapping[str, str]) -> Any:
    if isinstance(reduction, str):
        return trees.scale(weight, trees.widen(aux)) if reduction == "mean" else trees.widen(aux)
    return {key: _weigh(value, weight, reduction[key]) for key, value in aux.items()}


def _reduce(total: Any, weight: jax.Array, reduction: str | Mapping[str, str]) -> Any:
    if isinstance(reduction, str):
        return over_weight(total, weight) if reduction == "mean" else total
    return {key: _reduce(value, weight, reduction[key]) for key, value in total.items()}


def _floating(stats: Stats) -> Stats:
    """Statistics to be averaged; a leaf of another type leaves a zero in its place."""
    return jax.tree.map(lambda s: s if jnp.issubdtype(s.dtype, jnp.inexact) else jnp.zeros(()), trees.widen(stats))
