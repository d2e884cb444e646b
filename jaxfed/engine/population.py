"""All clients' data on the device, flat, and the sums that a round needs of it."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxfed.base import Aggregator, ClientUpdate
from jaxfed.client.batches import ClientRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Population:
    """The rows of all clients.

    Attributes:
        arrays: ``[examples, ...]`` by key, sorted by client.
        starts: ``[N]`` each client's first row.
        sizes: ``[N]`` how many rows it holds.
        weight: The sum of the aggregator's weights over all clients.
        capacity: The most rows that any client holds.
        fixed: Whether a round's loops have trip counts that the program knows, as reverse-mode differentiation needs.
    """

    arrays: dict[str, jax.Array]
    starts: jax.Array
    sizes: jax.Array
    weight: jax.Array | float
    capacity: int = dataclasses.field(metadata={"static": True})
    fixed: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def count(self) -> int:
        """``N``."""
        return self.starts.shape[0]

    def client(self, client: jax.Array, work: jax.Array) -> ClientRows:
        """One client's rows; a padding lane's number is clamped and its work is 0."""
        client = jnp.minimum(client, self.count - 1)
        return ClientRows(self.arrays, self.starts[client], self.sizes[client], work, self.capacity, self.fixed)


def make_population(arrays: dict[str, Any], starts: Any, sizes: Any, client: ClientUpdate, aggregator: Aggregator) -> Population:
    """Places the data on the device and weighs the population as the aggregator weighs a full round of each client."""
    capacity = int(max(sizes))
    placed = {key: jnp.asarray(x) for key, x in arrays.items()}
    sizes = jnp.asarray(sizes, jnp.int32)
    weight = weigh(client, aggregator, sizes, capacity=capacity)
    return Population(placed, jnp.asarray(starts, jnp.int32), sizes, weight, capacity)


@partial(jax.jit, static_argnames=("capacity",))
def weigh(client: ClientUpdate, aggregator: Aggregator, sizes: jax.Array, *, capacity: int) -> jax.Array:
    """The sum of the aggregator's weights over clients of ``sizes [N]`` that do all their work."""
    metrics = {
        "examples": sizes.astype(float),
        "steps": client.num_steps(sizes, jnp.ones(()), capacity).astype(float),
        "loss": jnp.zeros(sizes.shape),
    }
    return jnp.where(sizes > 0, jax.vmap(aggregator.weigh)(metrics), 0).sum()
