"""One federated round, from selection to the server's step. Read this file first; everything else is called from here."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from jaxfed import trees
from jaxfed.base import Selector
from jaxfed.client.batches import ClientRows
from jaxfed.engine.algorithm import Algorithm
from jaxfed.engine.cohort import Tables, fold_clients
from jaxfed.engine.lanes import Lane, Outcome
from jaxfed.engine.mesh import BY_DEVICE, EVERYWHERE, Devices
from jaxfed.engine.population import Population
from jaxfed.engine.sums import Reduced, reduce_cohort, share_of
from jaxfed.engine.survey import survey_cohort
from jaxfed.messages import Broadcast, Cohort, CohortInfo, RunState

# Each use of a round's randomness has a stream of its own, so that adding one leaves the others as they were.
STREAMS = 4
SELECTION, CLIENTS, SURVEY, SERVER = range(STREAMS)
# A client's key is its own; what it first keeps is drawn from a stream that local training and its like do not use.
FIRST_KEPT = 2**16


class RoundInfo(NamedTuple):
    """What is only reported of a round.

    Attributes:
        round: Its number, from 0.
        cohort: The clients ``[C]``.
        metrics: By name, ``[C]``.
        counts: ``[C]`` whose upload counted.
        update_norm: The Euclidean norm of the pseudo-gradient.
        selection: What the selector says of itself, scalars by name.
    """

    round: jax.Array
    cohort: Cohort
    metrics: dict[str, jax.Array]
    counts: jax.Array
    update_norm: jax.Array
    selection: dict[str, jax.Array]


def run_round(
    algorithm: Algorithm, selector: Selector, population: Population, state: RunState, lanes: int
) -> tuple[RunState, RoundInfo]:
    """Select, broadcast, run and prepare at each client, add, finalize, receive, update, observe."""
    # All streams in one call of the generator, each of which takes a while to compile.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(state.key, state.round), jnp.arange(STREAMS))
    cohort = selector.select(state.selector, keys[SELECTION], state.round, population.count)
    cohort = cohort._replace(work=jnp.where(cohort.valid, cohort.work, 0))
    sizes = population.sizes[population.slots(cohort.ids)]
    steps = algorithm.client.num_steps(sizes, cohort.work, population.capacity)

    broadcast = Broadcast(state.params, state.stats, algorithm.server.send(state.server), state.round)
    sent = algorithm.aggregator.send(state.aggregator)
    if algorithm.survey is not None:
        found = survey_cohort(algorithm, population, broadcast, cohort, keys[SURVEY], lanes)
        broadcast = broadcast._replace(survey=found)

    past = remember(state.past, broadcast)
    client = Partial(_visit_client, algorithm, broadcast, past, sent)
    tables = Tables(state.kept, state.seen)
    total, tables, (metrics, weights), stacked, counts = fold_clients(
        client, cohort, steps, keys[CLIENTS], tables, (population,), lanes
    )

    info = CohortInfo(state.round, population.count, population.weight, total.clients, total.weight, keys[SERVER])
    reduced = reduce_cohort(algorithm, total, stacked, weights, state, info)
    state = server_step(algorithm, state, reduced, info)
    observed = selector.observe(state.selector, cohort, metrics)
    report = RoundInfo(
        state.round, cohort._replace(age=(), memo=()), metrics, counts, trees.norm(reduced.gradient), selector.report(observed)
    )
    state = state._replace(round=state.round + 1, selector=observed, kept=tables.kept, seen=tables.seen, past=past)
    return population.devices.constrain(state, state_layout(state, population.devices)), report


def _visit_client(algorithm: Algorithm, now: Broadcast, past: Any, sent: Any, lane: Lane, kept: Any, rows: ClientRows) -> Outcome:
    """All that happens at one client."""
    start, staleness = began_from(now, past, lane.age)
    # As in a deployment, a client that is new starts from this round's weights.
    kept = trees.select(lane.seen, kept, algorithm.client.init_kept(start, jax.random.fold_in(lane.key, FIRST_KEPT)))
    upload, kept = algorithm.client.run(start, kept, rows, lane.key)
    upload = upload._replace(metrics=upload.metrics | staleness)
    summand, stacked, counts = share_of(algorithm, upload, kept, sent)
    weight = jnp.where(counts, algorithm.aggregator.weigh(upload.metrics), 0)
    return Outcome(summand, kept, (upload.metrics, weight), stacked, counts)


def remember(past: Any, now: Broadcast) -> Any:
    """The last broadcasts ``[T, ...]`` with this round's among them, at the place of the oldest; () stays ()."""
    return past and jax.tree.map(lambda all, new: all.at[now.round % all.shape[0]].set(new), past, now)


def began_from(now: Broadcast, past: Any, age: Any) -> tuple[Broadcast, dict[str, jax.Array]]:
    """The broadcast from which a client began, and what it reports of that: ``"staleness"``, where any may be late."""
    if not past:
        return now, {}
    return jax.tree.map(lambda all: all[(now.round - age) % all.shape[0]], past), {"staleness": age.astype(float)}


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


def state_layout(state: RunState, devices: Devices) -> RunState:
    """Where the parts of a state lie: kept rows by client, the server's own states in parts, all else on every device."""
    layout = jax.tree.map(lambda _: EVERYWHERE, state)
    own = {"server": devices.split(state.server), "aggregator": devices.split(state.aggregator)}
    return layout._replace(kept=jax.tree.map(lambda _: BY_DEVICE, state.kept), **own)
