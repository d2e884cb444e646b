"""Metrics of one model over all rows of a population, added up by client."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxfed import trees
from jaxfed.base import Broadcast, ClientUpdate, Cohort, Model, Params, Stats
from jaxfed.client.batches import Epochs
from jaxfed.engine.lanes import Outcome, Tables, fold_clients
from jaxfed.engine.population import Population


@partial(jax.jit, static_argnames=("num_clients", "batch_size"))
def sum_metrics(
    model: Model,
    params: Params,
    stats: Stats,
    arrays: dict[str, jax.Array],
    clients: jax.Array,
    num_clients: int,
    batch_size: int,
) -> dict[str, jax.Array]:
    """The sums ``[N]`` of every per-example metric, client by client.

    Args:
        model: The model; its ``metrics`` are evaluated.
        params: The weights.
        stats: The model's statistics.
        arrays: ``[examples, ...]`` by key.
        clients: ``[examples]`` whose row it is.
        num_clients: ``N``, static.
        batch_size: Rows at a time, static; at most the number of rows.
    """
    rows = clients.shape[0]

    def metrics_at(start: jax.Array) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
        # The last batch is moved back to end with the data; what was counted before is masked.
        first = jnp.minimum(start, rows - batch_size)
        take = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=batch_size)
        mask = jnp.arange(batch_size) + first >= start
        batch = {key: take(x) for key, x in arrays.items()} | {"mask": mask}
        return model.metrics(params, stats, batch), mask, take(clients)

    def step(k: jax.Array, sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
        values, mask, owner = metrics_at(k * batch_size)
        kept = {name: jnp.where(mask, value.astype(sums[name].dtype), 0) for name, value in values.items()}
        return {name: sums[name].at[owner].add(value) for name, value in kept.items()}

    example = jax.eval_shape(metrics_at, jnp.zeros((), jnp.int32))[0]
    zeros = {name: jnp.zeros(num_clients, jnp.promote_types(x.dtype, jnp.float32)) for name, x in example.items()}
    return jax.lax.fori_loop(0, -(-rows // batch_size), step, zeros)


@partial(jax.jit, static_argnames=("lanes", "batch_size"))
def sum_personal_metrics(
    client: ClientUpdate,
    start: Broadcast,
    populations: tuple[Population, Population],
    tables: Tables,
    key: jax.Array,
    *,
    lanes: int,
    batch_size: int,
) -> dict[str, jax.Array]:
    """The sums ``[N]`` of every per-example metric, each client's by what it predicts with itself.

    Args:
        client: Personalizes, and computes metrics of the result.
        start: The global model, as it would be sent.
        populations: The clients' training rows, which personalization may use, and the rows to evaluate on; aligned by client.
        tables: What clients keep.
        key: Decides the draws of personalization.
        lanes: ``L``, static.
        batch_size: Rows at a time, static.
    """
    train, test = populations

    def one(id: jax.Array, valid: jax.Array, work: jax.Array, kept: Any, seen: jax.Array) -> Outcome:
        run_key, first_key, order_key = jax.random.split(jax.random.fold_in(key, id), 3)
        kept = trees.select(seen, kept, client.init_kept(start.params, first_key))
        personal = client.personalize(start, kept, train.client(id, work), run_key)
        batches = Epochs(batch_size=batch_size, shuffle=False).of(test.client(id, work), order_key)

        def step(sums: dict[str, jax.Array], batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            values = client.metrics(personal, batch)
            return {name: sums[name] + jnp.where(batch["mask"], value, 0).sum().astype(float) for name, value in values.items()}

        example = jax.eval_shape(lambda: client.metrics(personal, batches.batch(0)))
        sums = batches.fold_all(step, {name: jnp.zeros(()) for name in example})
        return Outcome((), kept, sums, jnp.array(False))

    count = train.count
    everyone = Cohort(jnp.arange(count), jnp.ones(count, bool), jnp.ones(count))
    return fold_clients(one, everyone, test.sizes, tables, lanes)[2][0]
