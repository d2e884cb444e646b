"""The clients' data on the devices, flat, and the sums that a round needs of it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from jaxfed.base import Aggregator, ClientUpdate
from jaxfed.client.batches import ClientRows
from jaxfed.engine.mesh import Devices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Population:
    """The rows of all clients, or of one cohort's, a page.

    A client's *slot* is where its rows are written down: its number, or in a page its place in the cohort.

    Attributes:
        arrays: ``[examples, ...]`` by key, sorted by slot; on several machines each holds the rows of its own clients.
        starts: ``[slots]`` each slot's first row, counted on its machine.
        sizes: ``[slots]`` how many rows it holds.
        owners: ``[slots]`` which machine has them.
        weight: The sum of the aggregator's weights over all clients.
        capacity: The most rows that any client holds.
        count: ``N``, all clients.
        paged: Whether slots are places in the cohort.
        devices: Where the rows are.
        fixed: Whether a round's loops have trip counts that the program knows, as reverse-mode differentiation needs.
    """

    arrays: dict[str, jax.Array]
    starts: jax.Array
    sizes: jax.Array
    owners: jax.Array
    weight: jax.Array | float
    capacity: int = dataclasses.field(metadata={"static": True})
    count: int = dataclasses.field(metadata={"static": True})
    paged: bool = dataclasses.field(default=False, metadata={"static": True})
    devices: Devices = dataclasses.field(default=Devices(), metadata={"static": True})
    fixed: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def per_machine(self) -> int:
        """How many clients each machine has; the last may have fewer."""
        return -(-self.count // self.devices.machines)

    def places(self, ids: jax.Array) -> jax.Array:
        """``[C]`` where their machine's table of kept rows has the clients of a cohort."""
        return jnp.arange(ids.shape[0]) if self.paged else jnp.clip(ids, 0, self.count - 1) % self.per_machine

    def slots(self, ids: jax.Array) -> jax.Array:
        """``[C]`` the slots of a cohort; a number outside is clamped."""
        return jnp.arange(ids.shape[0]) if self.paged else jnp.clip(ids, 0, self.count - 1)

    def client(self, slot: jax.Array, work: jax.Array) -> ClientRows:
        """The rows of the client in a slot."""
        return ClientRows(self.arrays, self.starts[slot], self.sizes[slot], work, self.capacity, self.fixed)


@partial(jax.jit, static_argnames=("capacity",))
def weigh_population(client: ClientUpdate, aggregator: Aggregator, sizes: jax.Array, *, capacity: int) -> jax.Array:
    """The sum over all clients of what the aggregator would weigh a full round of each."""
    metrics = {
        "examples": sizes.astype(float),
        "steps": client.num_steps(sizes, jnp.ones(()), capacity).astype(float),
        "loss": jnp.zeros(sizes.shape),
    }
    return jnp.where(sizes > 0, jax.vmap(aggregator.weigh)(metrics), 0).sum()


def table_length(rows: int, devices: Devices) -> int:
    """How long a table of kept rows is that gives ``rows`` to each machine, in equal parts for its devices.

    >>> table_length(10, Devices())
    10
    """
    return devices.machines * devices.per_machine * -(-rows // devices.per_machine)
