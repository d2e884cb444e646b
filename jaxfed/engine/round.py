"""One federated round, from selection to the server's step. Read this file first; everything else is called from here."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed import trees
from jaxfed.base import Broadcast, Cohort, CohortInfo, RunState, Selector
from jaxfed.engine.algorithm import Algorithm
from jaxfed.engine.lanes import Outcome, Tables, fold_clients
from jaxfed.engine.population import Population
from jaxfed.engine.sums import Reduced, reduce_cohort, share_of
from jaxfed.engine.survey import survey_cohort

# Each use of a round's randomness has a stream of its own, so that adding one leaves the others as they were.
SELECTION, CLIENTS, SURVEY = range(3)


class RoundInfo(NamedTuple):
    """What is only reported of a round.

    Attributes:
        round: Its number, from 0.
        cohort: The clients ``[C]``.
        metrics: By name, ``[C]``.
        counts: ``[C]`` whose upload counted.
        update_norm: The Euclidean norm of the pseudo-gradient.
    """

    round: jax.Array
    cohort: Cohort
    metrics: dict[str, jax.Array]
    counts: jax.Array
    update_norm: jax.Array


def run_round(
    algorithm: Algorithm, selector: Selector, population: Population, state: RunState, lanes: int
) -> tuple[RunState, RoundInfo]:
    """Select, broadcast, run and prepare at each client, add, finalize, receive, update, observe."""
    key = jax.random.fold_in(state.key, state.round)
    cohort = selector.select(state.selector, jax.random.fold_in(key, SELECTION), state.round, population.count)
    work = jnp.where(cohort.valid, cohort.work, 0)
    sizes = population.sizes[jnp.clip(cohort.ids, 0, population.count - 1)]
    steps = algorithm.client.num_steps(sizes, work, population.capacity)

    broadcast = Broadcast(state.params, state.stats, algorithm.server.send(state.server), state.round)
    sent = algorithm.aggregator.send(state.aggregator)
    client_keys = jax.random.fold_in(key, CLIENTS)
    if algorithm.survey is not None:
        found = survey_cohort(
            algorithm, population, broadcast, cohort._replace(work=work), jax.random.fold_in(key, SURVEY), lanes
        )
        broadcast = broadcast._replace(survey=found)

    def client(id: jax.Array, valid: jax.Array, work: jax.Array, kept: Any, seen: jax.Array) -> Outcome:
        run_key, first_key = jax.random.split(jax.random.fold_in(client_keys, id))
        # As in a deployment, a client that is new starts from this round's weights.
        kept = trees.select(seen, kept, algorithm.client.init_kept(state.params, first_key))
        upload, kept = algorithm.client.run(broadcast, kept, population.client(id, work), run_key)
        summand, stacked, counts = share_of(algorithm, upload, sent, valid)
        weight = algorithm.aggregator.weigh(upload.metrics)
        return Outcome(summand, kept, (upload.metrics, stacked, jnp.where(counts, weight, 0)), counts)

    tables = Tables(state.kept, state.seen)
    total, tables, ((metrics, stacked, weights), counts) = fold_clients(
        client, cohort._replace(work=work), steps, tables, lanes, population.fixed
    )

    info = CohortInfo(state.round, population.count, population.weight, total.clients, total.weight)
    reduced = reduce_cohort(algorithm, total, stacked, weights, state, info)
    state = server_step(algorithm, state, reduced, info)
    observed = selector.observe(state.selector, cohort, metrics)
    report = RoundInfo(state.round, cohort, metrics, counts, trees.norm(reduced.gradient))
    return state._replace(round=state.round + 1, selector=observed, kept=tables.kept, seen=tables.seen), report


def server_step(algorithm: Algorithm, state: RunState, reduced: Reduced, info: CohortInfo) -> RunState:
    """The server's half: receive, update. A round in which nobody counted leaves everything as it was."""
    shared = algorithm.client.shared(state.params)
    server = algorithm.server.receive(state.server, reduced.aux, info)
    server = algorithm.server.at_round(server, shared, state.round)
    updates, server = algorithm.server.update(trees.cast_like(reduced.gradient, shared), server, shared)
    params = trees.merge(optax.apply_updates(shared, updates), state.params)
    new = (params, reduced.stats, server, reduced.aggregator)
    old = (state.params, state.stats, state.server, state.aggregator)
    params, stats, server, aggregator = trees.select(info.clients > 0, new, old)
    return state._replace(params=params, stats=stats, server=server, aggregator=aggregator)
