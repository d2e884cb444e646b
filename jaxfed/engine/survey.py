"""A first pass over a round's cohort, whose mean joins the broadcast."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxfed import trees
from jaxfed.client.batches import ClientRows
from jaxfed.engine.algorithm import Algorithm
from jaxfed.engine.cohort import Tables, fold_clients
from jaxfed.engine.lanes import Lane, Outcome
from jaxfed.engine.population import Population
from jaxfed.messages import Broadcast, Cohort
from jaxfed.server.aggregators import over_weight


def survey_cohort(
    algorithm: Algorithm, population: Population, start: Broadcast, cohort: Cohort, key: jax.Array, lanes: int
) -> Any:
    """The mean of the clients' answers by the aggregator's weights; clients whose answer is not finite are left out."""
    sizes = population.sizes[population.slots(cohort.ids)]
    nothing = Tables((), jnp.zeros(population.count, bool))
    client = Partial(_ask_client, algorithm, start)
    total, weight = fold_clients(client, cohort, sizes, key, nothing, (population,), lanes).total
    return over_weight(total, weight)


def _ask_client(algorithm: Algorithm, start: Broadcast, lane: Lane, kept: Any, rows: ClientRows) -> Outcome:
    assert algorithm.survey is not None  # the caller asked
    answer = trees.widen(algorithm.survey.run(algorithm.client, start, rows, lane.key))
    steps = algorithm.client.num_steps(rows.size, rows.work, rows.capacity)
    weight = algorithm.aggregator.weigh({"examples": jnp.asarray(rows.size, float), "steps": steps.astype(float)})
    counts = (steps > 0) & trees.all_finite(answer)
    share = (trees.scale(weight, answer), weight)
    return Outcome(trees.select(counts, share, trees.zeros_like(share)), kept, (), (), counts)
