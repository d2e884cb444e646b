"""A first pass over a round's cohort, whose mean joins the broadcast."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxfed import trees
from jaxfed.base import Broadcast, Cohort
from jaxfed.engine.algorithm import Algorithm
from jaxfed.engine.lanes import Outcome, Tables, fold_clients
from jaxfed.engine.population import Population
from jaxfed.server.aggregators import over_weight


def survey_cohort(
    algorithm: Algorithm, population: Population, start: Broadcast, cohort: Cohort, key: jax.Array, lanes: int
) -> Any:
    """The mean of the clients' answers by the aggregator's weights; clients whose answer is not finite are left out."""
    survey, sizes = algorithm.survey, population.sizes[jnp.clip(cohort.ids, 0, population.count - 1)]
    assert survey is not None  # the caller asked

    def client(id: jax.Array, valid: jax.Array, work: jax.Array, kept: Any, seen: jax.Array) -> Outcome:
        rows = population.client(id, work)
        answer = trees.widen(survey.run(algorithm.client, start, rows, jax.random.fold_in(key, id)))
        steps = algorithm.client.num_steps(rows.size, work, population.capacity)
        weight = algorithm.aggregator.weigh({"examples": jnp.asarray(rows.size, float), "steps": steps.astype(float)})
        counts = valid & (steps > 0) & trees.all_finite(answer)
        share = (trees.scale(weight, answer), weight)
        return Outcome(trees.select(counts, share, trees.zeros_like(share)), kept, (), counts)

    nothing = Tables((), jnp.zeros(population.count, bool))
    (total, weight), _, _ = fold_clients(client, cohort, sizes, nothing, lanes, population.fixed)
    return over_weight(total, weight)
