"""Where a round runs, and how its devices talk: the only file that names a device.

Devices form a grid ``("machines", "clients")``: a machine holds the rows of its own clients, and its devices, which all see these
rows, share its part of a cohort. What clients keep lies in equal parts on all devices. One program runs everywhere; its devices
talk when weights go out, when sums come in, and when kept rows travel between their device and the one that trains their client.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxfed import checks

AXES = ("machines", "clients")
EVERYWHERE = PartitionSpec()
BY_MACHINE = PartitionSpec("machines")
BY_DEVICE = PartitionSpec(AXES)
# A leaf with fewer numbers is on every device: a collective would cost more than what it saves.
_SMALLEST_SPLIT = 2**12


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a run; without a mesh, whatever device JAX uses by default.

    Attributes:
        mesh: The grid of devices, or None.
    """

    mesh: Mesh | None = None

    @property
    def machines(self) -> int:
        """How many groups of devices have their own clients."""
        return 1 if self.mesh is None else self.mesh.shape["machines"]

    @property
    def per_machine(self) -> int:
        """How many devices share a machine's clients."""
        return 1 if self.mesh is None else self.mesh.shape["clients"]

    @property
    def count(self) -> int:
        """All devices."""
        return self.machines * self.per_machine

    def memory_stats(self) -> dict[str, Any] | None:
        """What the first of this process's devices says of its memory."""
        return (jax.local_devices()[0] if self.mesh is None else self.mesh.local_devices[0]).memory_stats()

    # Inside the program of one device.

    def machine(self) -> jax.Array | int:
        """Which machine this is."""
        return 0 if self.machines == 1 else jax.lax.axis_index("machines")

    def index(self) -> jax.Array | int:
        """Which of its machine's devices this is."""
        return 0 if self.per_machine == 1 else jax.lax.axis_index("clients")

    def add(self, tree: Any) -> Any:
        """Sums over all devices; leaves that can be split come back split, each device having the sum of its own part."""
        if self.mesh is None:
            return tree

        def one(x: jax.Array) -> jax.Array:
            axis = split_axis(x.shape, self.count)
            if axis is None:
                return jax.lax.psum(x, AXES)
            return jax.lax.psum_scatter(x, AXES, scatter_dimension=axis, tiled=True)

        return jax.tree.map(one, tree)

    def total(self, tree: Any) -> Any:
        """Sums over all devices, which all devices have."""
        return tree if self.mesh is None else jax.lax.psum(tree, AXES)

    def spread(self, tree: Any, places: jax.Array, size: int) -> Any:
        """Rows ``[W, L, ...]`` of each device, put at their places ``[W, L]`` of ``size`` rows that all devices have."""

        def one(x: jax.Array) -> jax.Array:
            numbers = x.astype(jnp.int32) if x.dtype == bool else x
            rows = jnp.zeros((size, *x.shape[2:]), numbers.dtype).at[places].set(numbers, mode="drop")
            return self.total(rows).astype(x.dtype)

        return jax.tree.map(one, tree)

    def exchange(self, tree: Any, places: jax.Array, size: int) -> Any:
        """As :meth:`spread`, but a leaf that can be split comes back with all ``size`` rows of a part of its coordinates."""
        if self.mesh is None:
            return self.spread(tree, places, size)
        everyones = jax.lax.all_gather(places, AXES)

        def one(x: jax.Array) -> jax.Array:
            axis = split_axis(x.shape[2:], self.count)
            if axis is None:
                return self.spread(x, places, size)
            rows = x.reshape(-1, *x.shape[2:])
            parts = jax.lax.all_to_all(rows, AXES, split_axis=axis + 1, concat_axis=0, tiled=True)
            return jnp.zeros((size, *parts.shape[1:]), x.dtype).at[everyones.reshape(-1)].set(parts, mode="drop")

        return jax.tree.map(one, tree)

    def fetch(self, table: Any, rows: jax.Array) -> Any:
        """The rows ``[D, K]`` of a table that lies in parts on a machine's devices: to each device its own ``[K, ...]``."""
        return jax.tree.map(lambda part: _like_data(lambda x: self._fetch(x, rows), part), table)

    def store(self, table: Any, rows: jax.Array, new: Any) -> Any:
        """The table with the rows ``[D, K]`` replaced by what each device has of them, ``[K, ...]``; rows outside are dropped."""
        return jax.tree.map(lambda part, x: _like_data(lambda p, n: self._store(p, rows, n), part, x), table, new)

    def _fetch(self, part: jax.Array, rows: jax.Array) -> jax.Array:
        local, here = self._own(part, rows.reshape(-1))
        kind = jnp.int32 if part.dtype == bool else part.dtype
        found = part[jnp.clip(local, 0, part.shape[0] - 1)].astype(kind)
        found = jnp.where(here.reshape(-1, *[1] * (part.ndim - 1)), found, jnp.zeros((), kind))
        return jax.lax.psum_scatter(found, "clients", scatter_dimension=0, tiled=True).astype(part.dtype)

    def _store(self, part: jax.Array, rows: jax.Array, new: jax.Array) -> jax.Array:
        local, here = self._own(part, rows.reshape(-1))
        everyones = jax.lax.all_gather(new, "clients", tiled=True)
        return part.at[jnp.where(here, local, part.shape[0])].set(everyones.astype(part.dtype), mode="drop")

    def _own(self, part: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        local = rows - self.index() * part.shape[0]
        return local, (local >= 0) & (local < part.shape[0])

    # Around it.

    def run(self, function: Any, args: tuple, in_specs: Any, out_specs: Any) -> Any:
        """The function as the program of each device; a plain number stays one: trip counts that a program must know are some."""
        if self.mesh is None:
            return function(*args)
        leaves, structure = jax.tree.flatten(args)
        known = [isinstance(leaf, int | float) for leaf in leaves]

        def on_device(*others: Any) -> Any:
            rest = iter(others)
            return function(*structure.unflatten(leaf if plain else next(rest) for plain, leaf in zip(known, leaves)))

        specs = tuple(spec for plain, spec in zip(known, structure.flatten_up_to(in_specs)) if not plain)
        others = [leaf for plain, leaf in zip(known, leaves) if not plain]
        return jax.shard_map(on_device, mesh=self.mesh, in_specs=specs, out_specs=out_specs, check_vma=False)(*others)

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """Where an array with this layout lies."""
        assert self.mesh is not None  # a run without a mesh places nothing
        return NamedSharding(self.mesh, spec)

    def place(self, tree: Any, specs: Any) -> Any:
        """Puts arrays where they belong; what lies there already stays. Every process gives the same values."""
        if self.mesh is None:
            return jax.tree.map(_gathered, tree)
        return jax.tree.map(lambda x, spec: _put(x, self.sharding(spec)), tree, specs)

    def place_blocks(self, block: Callable[[int], Any], length: int, spec: PartitionSpec = BY_MACHINE) -> jax.Array:
        """An array ``[machines * length, ...]`` of the rows ``block(machine)``; a process is only asked for its own."""
        if self.machines == 1:
            rows = block(0)
            # Not asarray, which holds the rows twice meanwhile; rows that lie well in memory are used there by a CPU.
            return jax.device_put(rows, None if self.mesh is None else self.sharding(spec))
        mine = block(jax.process_index())
        here = jax.process_index() * length

        def rows_at(index: Any) -> Any:
            return mine[(index[0].start or 0) - here : (index[0].stop or self.machines * length) - here]

        return jax.make_array_from_callback((self.machines * length, *mine.shape[1:]), self.sharding(spec), rows_at)

    def agree(self, number: int) -> Any:
        """The number of process 0, in all of them."""
        return number if self.machines == 1 else multihost_utils.broadcast_one_to_all(jnp.asarray(number))

    def collect(self, tree: Any) -> Any:
        """The same values in arrays that this process has as a whole."""
        if self.machines == 1:
            return tree

        def one(x: jax.Array) -> Any:
            return x if x.is_fully_replicated else multihost_utils.process_allgather(x, tiled=True)

        return jax.tree.map(lambda x: _like_data(one, x), tree)

    def local_rows(self, array: jax.Array) -> Any:
        """This machine's rows of an array that lies by device, on the host."""
        if self.machines == 1:
            return jax.device_get(array)
        shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
        return jax.device_get(jnp.concatenate([shards[start] for start in sorted(shards)]))

    def constrain(self, tree: Any, specs: Any) -> Any:
        """The same values, laid out; inside a compiled function."""
        if self.mesh is None:
            return tree
        return jax.tree.map(lambda x, spec: jax.lax.with_sharding_constraint(x, self.sharding(spec)), tree, specs)

    def split(self, tree: Any) -> Any:
        """The layout in which :meth:`add` leaves a tree."""
        return jax.tree.map(lambda x: _split_spec(x.shape, self.count, 0), tree)

    def split_rows(self, tree: Any) -> Any:
        """The layout in which :meth:`exchange` leaves rows of the tree's shapes."""
        return jax.tree.map(lambda x: _split_spec(x.shape, self.count, 1), tree)


def make_devices(devices: list[Any]) -> Devices:
    """A grid: a row for each process, a column for each of its devices; no grid for JAX's default device alone.

    Raises:
        ValueError: If processes have different numbers of devices.
    """
    if len(devices) == 1 and devices[0] == jax.devices()[0] and jax.process_count() == 1:
        return Devices()
    by_process: dict[int, list[Any]] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    counts = {len(row) for row in by_process.values()}
    if len(counts) != 1:
        raise ValueError(f"devices: expected as many of each process, got {sorted(len(row) for row in by_process.values())}.")
    shape = (len(by_process), counts.pop())
    flat = [device for process in sorted(by_process) for device in by_process[process]]
    return Devices(jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=flat))


def default_devices() -> list[Any]:
    """The devices of a run that names none: all that there are."""
    return jax.devices()


def choose_devices(devices: int | Sequence[Any] | None, cohort_size: int) -> Devices:
    """So many of JAX's devices, or these; None takes all, at most one for each client of a cohort.

    Raises:
        ValueError: If there are fewer, or one is given twice.
        TypeError: For anything else.
    """
    if devices is None:
        everyone = default_devices()
        return make_devices(everyone[:cohort_size] if jax.process_count() == 1 else everyone)
    everyone = jax.devices()
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        chosen = [
            checks.instance("devices", device, jax.Device, "Give some of jax.devices(), or how many.") for device in devices
        ]
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"devices: expected one or more, each once, got {chosen}.")
        return make_devices(chosen)
    count = checks.count("devices", devices, checks.Bounds(at_least=1))
    if count > len(everyone):
        remedy = 'On a CPU, make more with  jax.config.update("jax_num_cpu_devices", 8)  before anything else.'
        raise ValueError(f"devices: expected at most the {len(everyone)} that there are, got {count}. {remedy}")
    return make_devices(everyone[:count])


def split_axis(shape: tuple[int, ...], parts: int) -> int | None:
    """The longest axis that divides into ``parts``; None if there is none, or the array is small.

    >>> split_axis((512, 100), 4), split_axis((513, 100), 4), split_axis((513, 101), 4), split_axis((4, 4), 4)
    (0, 1, None, None)
    """
    size = 1
    for length in shape:
        size *= length
    fitting = [axis for axis, length in enumerate(shape) if length % parts == 0]
    if parts == 1 or size < _SMALLEST_SPLIT or not fitting:
        return None
    return max(fitting, key=lambda axis: shape[axis])


def _split_spec(shape: tuple[int, ...], parts: int, leading: int) -> PartitionSpec:
    axis = split_axis(shape, parts)
    return EVERYWHERE if axis is None else PartitionSpec(*[None] * (axis + leading), AXES)


def _gathered(x: Any) -> jax.Array:
    # Left where it is, one array on several devices would make the whole program run on all of them.
    several = isinstance(x, jax.Array) and len(x.sharding.device_set) > 1
    return _like_data(lambda data: jnp.asarray(jax.device_get(data)), x) if several else jnp.asarray(x)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    # Before every call: what lies there is told at once, by the first question nearly always.
    if isinstance(x, jax.Array) and (x.sharding == sharding or x.sharding.is_equivalent_to(sharding, x.ndim)):
        return x
    return _like_data(lambda data: _moved(data, sharding), x)


def _moved(x: Any, sharding: NamedSharding) -> jax.Array:
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    x = jnp.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _like_data(function: Any, *keys: Any) -> jax.Array:
    """A function of arrays on typed PRNG keys, by their data."""
    if not hasattr(keys[0], "dtype") or not jnp.issubdtype(keys[0].dtype, jax.dtypes.prng_key):
        return function(*keys)
    return jax.random.wrap_key_data(function(*map(jax.random.key_data, keys)), impl=jax.random.key_impl(keys[0]))
