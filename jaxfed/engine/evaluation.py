"""Metrics of one model over all rows of a population, added up by client."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxfed import trees
from jaxfed.base import ClientUpdate, Model
from jaxfed.client.batches import ClientRows, Epochs
from jaxfed.engine.cohort import Tables, fold_clients
from jaxfed.engine.lanes import Lane, Outcome
from jaxfed.engine.mesh import BY_MACHINE, EVERYWHERE
from jaxfed.engine.population import Population
from jaxfed.messages import Broadcast, Cohort, Params, Stats


@partial(jax.jit, static_argnames=("at_once",))
def sum_metrics(model: Model, params: Params, stats: Stats, population: Population, *, at_once: int) -> dict[str, jax.Array]:
    """The sums ``[slots]`` of every per-example metric, client by client.

    Args:
        model: The model; its ``metrics`` are evaluated.
        params: The weights.
        stats: The model's statistics.
        population: Whose rows.
        at_once: Rows at a time, static.
    """
    devices = population.devices
    everywhere = partial(jax.tree.map, lambda _: EVERYWHERE)
    args = (population, model, params, stats)
    layout = dataclasses.replace(everywhere(population), arrays=dict.fromkeys(population.arrays, BY_MACHINE))
    return devices.run(partial(_sum_on_device, at_once=at_once), args, (layout, *everywhere(args[1:])), EVERYWHERE)


def _sum_on_device(population: Population, model: Model, params: Params, stats: Stats, *, at_once: int) -> dict[str, jax.Array]:
    devices, slots = population.devices, population.starts.shape[0]
    sizes = jnp.where(population.owners == devices.machine(), population.sizes, 0)
    rows = next(iter(population.arrays.values())).shape[0]
    batch_size = min(at_once, rows)
    owners = jnp.repeat(jnp.arange(slots), sizes, total_repeat_length=rows)

    def metrics_at(start: jax.Array) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
        # The last batch is moved back to end with the data; what was counted before is masked.
        first = jnp.minimum(start, rows - batch_size)
        take = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=batch_size)
        numbers = jnp.arange(batch_size) + first
        mask = (numbers >= start) & (numbers < sizes.sum())
        batch = {key: take(x) for key, x in population.arrays.items()} | {"mask": mask}
        return model.metrics(params, stats, batch), mask, take(owners)

    def step(k: jax.Array, sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
        values, mask, owner = metrics_at((k * devices.per_machine + devices.index()) * batch_size)
        kept = {name: jnp.where(mask, value.astype(sums[name].dtype), 0) for name, value in values.items()}
        return {name: sums[name].at[owner].add(value) for name, value in kept.items()}

    example = jax.eval_shape(metrics_at, jnp.zeros((), jnp.int32))[0]
    zeros = {name: jnp.zeros(slots, jnp.promote_types(x.dtype, jnp.float32)) for name, x in example.items()}
    return devices.total(jax.lax.fori_loop(0, -(-rows // (batch_size * devices.per_machine)), step, zeros))


@partial(jax.jit, static_argnames=("lanes", "batch_size"))
def sum_personal_metrics(
    client: ClientUpdate,
    start: Broadcast,
    key: jax.Array,
    populations: tuple[Population, Population],
    tables: Tables,
    ids: jax.Array,
    *,
    lanes: int,
    batch_size: int,
) -> dict[str, jax.Array]:
    """The sums ``[C]`` of every per-example metric, each client's by what it predicts with itself.

    Args:
        client: Personalizes, and computes metrics of the result.
        start: The global model, as it would be sent.
        key: Decides the draws of personalization.
        populations: The clients' training rows, which personalization may use, and the rows to evaluate on; aligned by client.
        tables: What clients keep.
        ids: ``[C]`` which clients.
        lanes: ``L``, static.
        batch_size: Rows at a time, static.
    """
    train, test = populations
    everyone = Cohort(ids, jnp.ones(ids.shape, bool), jnp.ones(ids.shape))
    one = Partial(partial(_sum_at_client, batch_size=batch_size), client, start)
    return fold_clients(one, everyone, test.sizes[test.slots(ids)], key, tables, (train, test), lanes).rows


def _sum_at_client(
    client: ClientUpdate,
    start: Broadcast,
    lane: Lane,
    kept: Any,
    own: ClientRows,
    rows: ClientRows,
    *,
    batch_size: int,
) -> Outcome:
    run_key, first_key, order_key = (jax.random.fold_in(lane.key, stream) for stream in range(3))
    kept = trees.select(lane.seen, kept, client.init_kept(start, first_key))
    personal = client.personalize(start, kept, own, run_key)
    batches = Epochs(batch_size=batch_size, shuffle=False).of(rows, order_key)

    def step(sums: dict[str, jax.Array], batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        values = client.metrics(personal, batch)
        return {name: sums[name] + jnp.where(batch["mask"], value, 0).sum().astype(float) for name, value in values.items()}

    example = jax.eval_shape(lambda: client.metrics(personal, batches.batch(0)))
    sums = batches.fold_all(step, {name: jnp.zeros(()) for name in example})
    return Outcome((), kept, sums, (), jnp.array(False))
