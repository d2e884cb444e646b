"""What is added up over a cohort: the aggregator's summand, weighted statistics, and auxiliary variables as they declare."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfed import trees
from jaxfed.base import Stats, Upload
from jaxfed.engine.algorithm import Algorithm
from jaxfed.server.aggregators import reciprocal


class Summand(NamedTuple):
    """One client's share of the sums; all zeros if it does not count."""

    update: Any
    stats: Stats
    aux: dict[str, Any]
    weight: jax.Array
    clients: jax.Array


def summand_of(algorithm: Algorithm, upload: Upload, sent: Any, valid: jax.Array) -> tuple[Summand, jax.Array]:
    """A client's summand, and whether it counts: valid, with local steps done, and finite throughout.

    A client that is not finite is left out on its own side, through ``where``: 0 times NaN would be NaN.
    """
    weight = algorithm.aggregator.weigh(upload.metrics)
    aux = {name: _weigh(value, weight, algorithm.client.aux_reductions[name]) for name, value in upload.aux.items()}
    update = trees.widen(algorithm.aggregator.prepare(upload, sent))
    summand = Summand(update, trees.scale(weight, _floating(upload.stats)), aux, weight, jnp.ones(()))
    counts = valid & (upload.metrics["steps"] > 0) & trees.all_finite(summand)
    return trees.select(counts, summand, trees.zeros_like(summand)), counts


def mean_stats(total: Summand, old: Stats) -> Stats:
    """The weighted mean of floating statistics; others stay the server's."""
    mean = trees.scale(reciprocal(total.weight), total.stats)
    return jax.tree.map(lambda m, s: m.astype(s.dtype) if jnp.issubdtype(s.dtype, jnp.inexact) else s, mean, old)


def reduced_aux(algorithm: Algorithm, total: Summand) -> dict[str, Any]:
    """The auxiliary variables as the server's modules receive them: sums, or means by the aggregator's weights."""
    inverse = reciprocal(total.weight)
    return {name: _reduce(value, inverse, algorithm.client.aux_reductions[name]) for name, value in total.aux.items()}


def _weigh(aux: Any, weight: jax.Array, reduction: str | Mapping[str, str]) -> Any:
    if isinstance(reduction, str):
        return trees.scale(weight, trees.widen(aux)) if reduction == "mean" else trees.widen(aux)
    return {key: _weigh(value, weight, reduction[key]) for key, value in aux.items()}


def _reduce(total: Any, inverse: jax.Array, reduction: str | Mapping[str, str]) -> Any:
    if isinstance(reduction, str):
        return trees.scale(inverse, total) if reduction == "mean" else total
    return {key: _reduce(value, inverse, reduction[key]) for key, value in total.items()}


def _floating(stats: Stats) -> Stats:
    """Statistics to be averaged; a leaf of another type leaves a zero in its place."""
    return jax.tree.map(lambda s: s if jnp.issubdtype(s.dtype, jnp.inexact) else jnp.zeros(()), trees.widen(stats))
