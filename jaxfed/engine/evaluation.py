"""Metrics of one model over all rows of a population, added up by client."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxfed.base import Model, Params, Stats


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
