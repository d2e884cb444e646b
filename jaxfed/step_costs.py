"""What a local step and the server's step cost, each as a program of its own. Host side."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxfed import trees
from jaxfed.client.batches import ClientRows
from jaxfed.client.local import LocalTraining
from jaxfed.costs import Cost, cost_of
from jaxfed.engine.algorithm import Algorithm
from jaxfed.engine.population import Population
from jaxfed.engine.round import SURVEY, server_step, state_layout
from jaxfed.engine.sums import Reduced
from jaxfed.engine.survey import survey_cohort
from jaxfed.messages import Broadcast, CohortInfo, RoundStart, RunState
from jaxfed.personal.wrapper import Wrapper
from jaxfed.simulation import Simulation


def step_costs(simulation: Simulation, population: Population, state: RunState) -> tuple[Cost, Cost]:
    """Of one local step of one client, and of one step of the server, each compiled alone.

    For a client that is not :class:`~jaxfed.LocalTraining`, a step is its whole visit with each loop of unknown length counted
    once.
    """
    seen = jax.eval_shape(partial(_as_client_sees, simulation), population, state)
    client = simulation.algorithm.client
    while isinstance(client, Wrapper) and type(client).run is Wrapper.run:
        client = client.client
    if isinstance(client, LocalTraining) and type(client).run is LocalTraining.run:
        step = cost_of(partial(_local_step, client), seen.start, *jax.eval_shape(partial(_step_inputs, client), *seen), seen.key)
    else:
        step = cost_of(lambda *visit: client.run(*visit), *seen)
    reduced, info = jax.eval_shape(partial(_reduced, simulation.algorithm), state, seen)
    return step, cost_of(partial(server_step, simulation.algorithm), _tableless(state), reduced, info)


def server_steps(simulation: Simulation, population: Population, state: RunState) -> Callable[[int], Any]:
    """A number of the server's steps in one compiled call, waited for."""
    seen, devices = jax.eval_shape(partial(_as_client_sees, simulation), population, state), simulation.devices
    shapes = jax.eval_shape(partial(_reduced, simulation.algorithm), state, seen)
    reduced, info = jax.tree.map(lambda x: jnp.full(x.shape, 1e-3, x.dtype), shapes)
    first = _tableless(state)

    @jax.jit
    def run(algorithm: Algorithm, state: RunState, reduced: Reduced, info: CohortInfo, times: jax.Array) -> RunState:
        # As sums arrive: each device has its part of a large leaf.
        reduced = reduced._replace(gradient=devices.constrain(reduced.gradient, devices.split(reduced.gradient)))

        def step(_: jax.Array, state: RunState) -> RunState:
            return devices.constrain(server_step(algorithm, state, reduced, info), state_layout(state, devices))

        return jax.lax.fori_loop(0, times, step, state)

    placed = devices.place(first, state_layout(first, devices))
    return lambda times: jax.block_until_ready(run(simulation.algorithm, placed, reduced, info, jnp.int32(times)))


class _Seen(NamedTuple):
    """What a client's visit begins with."""

    start: Broadcast
    kept: Any
    rows: ClientRows
    key: jax.Array


def _as_client_sees(simulation: Simulation, population: Population, state: RunState) -> _Seen:
    algorithm = simulation.algorithm
    start = Broadcast(state.params, state.stats, algorithm.server.send(state.server), state.round)
    if algorithm.survey is not None:
        cohort = simulation.selector.select(state.selector, state.key, state.round, population.count)
        key = jax.random.fold_in(state.key, SURVEY)
        start = start._replace(survey=survey_cohort(algorithm, population, start, cohort, key, 1))
    kept = algorithm.client.init_kept(start, state.key)
    return _Seen(start, kept, population.client(jnp.zeros((), jnp.int32), jnp.ones(())), state.key)


def _step_inputs(client: LocalTraining, start: Broadcast, kept: Any, rows: ClientRows, key: jax.Array) -> tuple[Any, Any, Any]:
    """Weights, the Optimizer's state and a batch."""
    batch = client.batches.of(rows, key).batch(0)
    return start.params, client.optimizer.start_round(kept, _anchor(start, key)), batch


def _local_step(client: LocalTraining, start: Broadcast, params: Any, optimizer: Any, batch: Any, key: jax.Array) -> Any:
    # Of a full batch: where rows are missing, some layers do less, by loops whose length is not known here.
    batch = batch | {"mask": np.ones(batch["mask"].shape, bool)}
    rule = client.gradient.start_round(_anchor(start, key))
    loss, stats, gradient = rule(client.loss, params, start.stats, batch, key)
    updates, optimizer = client.optimizer.update(gradient, optimizer, params)
    return optax.apply_updates(params, updates), stats, optimizer, loss


def _anchor(start: Broadcast, key: jax.Array) -> RoundStart:
    # A pass over all rows belongs to no step.
    return RoundStart(start.params, start.stats, start.aux, start.round, key, trees.zeros_like, start.survey)


def _tableless(state: RunState) -> RunState:
    return state._replace(kept=(), seen=())  # type: ignore[arg-type]


def _reduced(algorithm: Algorithm, state: RunState, seen: _Seen) -> tuple[Reduced, CohortInfo]:
    """What the server's step takes, in shapes."""
    upload, _ = algorithm.client.run(*seen)
    gradient = trees.widen(algorithm.client.shared(state.params))
    one = jnp.ones(())
    info = CohortInfo(state.round, jnp.zeros((), jnp.int32), one, one, one)
    return Reduced(gradient, state.stats, trees.widen(upload.aux), state.aggregator), info
