"""Where the clients' rows lie: on the devices as a whole, or on the host, with a page on the devices for each round's cohort."""

import math
import os
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxfed.data.federated import FederatedData
from jaxfed.data.rows import clients_of_shard
from jaxfed.engine.algorithm import Algorithm
from jaxfed.engine.mesh import EVERYWHERE, Devices
from jaxfed.engine.population import Population, table_length, weigh_population

# Rows are numbered in int32 on the devices; a larger number would turn into another row without a word.
_MOST_ROWS = 2**31 - 1


class Placement:
    """A data set and the devices that train on it. On several machines each reads the rows of its own clients alone.

    Args:
        data: The clients' rows; arrays may be memory-mapped files. On several machines a shard will do.
        algorithm: Whose aggregator weighs the clients.
        devices: Where rounds run.

    Raises:
        ValueError: For a shard without the rows of this machine's clients.
    """

    def __init__(self, data: FederatedData, algorithm: Algorithm, devices: Devices):
        self.data, self.devices = data, devices
        self.sizes, self.firsts = data.sizes, data.offsets[:-1]
        self.capacity = max(1, data.max_size)
        self.per_machine = len(clients_of_shard(data.num_clients, devices.machines, 0))
        self._check_held()
        sizes = jnp.asarray(self.sizes, jnp.int32)
        self.weight = weigh_population(algorithm.client, algorithm.aggregator, sizes, capacity=self.capacity)

    def fits(self, rows: Any) -> bool:
        """Whether data and a table of kept ``rows`` take at most half of the devices' memory."""
        own = sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in self.data.arrays.values()) * self.data.num_examples
        kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(rows)) * self.data.num_clients
        return own / self.devices.machines + kept / self.devices.count <= _memory(self.devices) / 2

    def whole(self) -> Population:
        """All rows, on the devices."""
        clients = np.arange(self.data.num_clients)
        firsts = np.minimum(np.arange(self.devices.machines + 1) * self.per_machine, self.data.num_clients)
        edges = self.data.offsets[firsts]
        if (most := int(np.diff(edges).max())) > _MOST_ROWS:
            raise ValueError(f"data: expected at most {_MOST_ROWS} rows on a machine, got {most}. Give paged=True.")
        slices = [slice(*edges[machine : machine + 2]) for machine in range(self.devices.machines)]
        arrays = {key: self._place(x, [[s] for s in slices], most) for key, x in self.data.arrays.items()}
        return self._population(arrays, self.firsts - edges[clients // self.per_machine], self.sizes, clients, paged=False)

    def page(self, ids: np.ndarray, length: int) -> Population:
        """The rows of some clients ``[C]``, in arrays of ``length`` rows on each machine: no other cohort compiles anew.

        A number outside holds no rows.
        """
        there = (ids >= 0) & (ids < self.data.num_clients)
        sizes, firsts = np.where(there, self.sizes[ids * there], 0), self.firsts[ids * there]
        starts, slices = np.zeros(len(ids), np.int64), []
        for machine in range(self.devices.machines):
            mine = ids // self.per_machine == machine
            starts[mine] = np.cumsum(sizes[mine]) - sizes[mine]
            slices.append([slice(first, first + size) for first, size in zip(firsts[mine], sizes[mine])])
        arrays = {key: self._place(x, slices, length) for key, x in self.data.arrays.items()}
        return self._population(arrays, starts, sizes, ids, paged=True)

    def by_client(self, table: Any) -> Any:
        """A table of kept rows in the order of the clients ``[N, ...]``, whatever the devices; every process takes part."""
        count, machines = self.data.num_clients, self.devices.machines
        if machines == 1:
            return jax.tree.map(lambda x: x if len(x) == count else x[:count], table)

        def one(x: Any) -> np.ndarray:
            if isinstance(x, np.ndarray):
                first = jax.process_index() * self.per_machine
                mine = np.zeros((self.per_machine, *x.shape[1:]), x.dtype)
                mine[: len(x[first : first + self.per_machine])] = x[first : first + self.per_machine]
                return multihost_utils.process_allgather(mine).reshape(-1, *x.shape[1:])[:count]
            return multihost_utils.process_allgather(x, tiled=True)[self._rows_of_clients(len(x))]

        return jax.tree.map(one, table)

    def by_device(self, table: Any) -> Any:
        """A table :meth:`by_client`, or of one machine with other devices, as rounds want it on these devices.

        One that is so already stays.
        """
        length, count = table_length(self.per_machine, self.devices), self.data.num_clients

        def one(x: Any) -> Any:
            if len(x) == length:
                return x
            if self.devices.machines == 1:
                return jnp.concatenate([x[:count], jnp.zeros((length - count, *x.shape[1:]), x.dtype)])
            rows = np.zeros((length, *x.shape[1:]), x.dtype)
            rows[self._rows_of_clients(length)] = x
            return rows

        return jax.tree.map(one, table)

    def _check_held(self) -> None:
        machine, held = jax.process_index() if self.devices.machines > 1 else 0, self.data.held
        own = clients_of_shard(self.data.num_clients, self.devices.machines, machine)
        if own and not (held.start <= own.start and own.stop <= held.stop):
            wanted = f"expected the rows of clients {own.start} to {own.stop - 1}, this process's part of {self.devices.machines}"
            raise ValueError(f"data: {wanted}, got {self.data}. Give shard(jax.process_count(), jax.process_index()).")

    def _rows_of_clients(self, length: int) -> np.ndarray:
        clients = np.arange(self.data.num_clients)
        return clients // self.per_machine * (length // self.devices.machines) + clients % self.per_machine

    def page_length(self, cohort_size: int) -> int:
        """The most rows that a cohort can have."""
        return int(self._rows_of_largest[min(cohort_size, len(self._rows_of_largest)) - 1])

    @cached_property
    def _rows_of_largest(self) -> np.ndarray:
        """``[N]`` the rows of the largest client, of the two largest, and so on."""
        return np.cumsum(np.sort(self.sizes)[::-1])

    def _population(
        self, arrays: dict[str, jax.Array], starts: np.ndarray, sizes: np.ndarray, ids: np.ndarray, *, paged: bool
    ) -> Population:
        columns = [np.asarray(x, np.int32) for x in (starts, sizes, ids // self.per_machine)]
        placed = self.devices.place((*columns, self.weight), (EVERYWHERE,) * 4)
        return Population(
            arrays, placed[0], placed[1], placed[2], placed[3], self.capacity, self.data.num_clients, paged, self.devices
        )

    def _place(self, array: np.ndarray, slices: list[list[slice]], length: int) -> jax.Array:
        dtype = jax.dtypes.canonicalize_dtype(array.dtype)

        def block(machine: int) -> np.ndarray:
            pieces = [self.data.rows_here(piece) for piece in slices[machine]]
            if len(pieces) == 1 and (only := array[pieces[0]]).shape[0] == length:
                return np.asarray(only, dtype)
            rows, filled = np.zeros((length, *array.shape[1:]), dtype), 0
            for piece in pieces:
                rows[filled : filled + piece.stop - piece.start] = array[piece]
                filled += piece.stop - piece.start
            return rows

        return self.devices.place_blocks(block, length)


def _memory(devices: Devices) -> float:
    """Bytes of memory of each device; the CPU's devices share the machine's."""
    stats = devices.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / devices.per_machine
