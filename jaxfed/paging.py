"""Rounds whose data and kept rows stay on the host: a page of them travels to the devices for each cohort.

While a cohort trains, the host reads the next one's page; a client that takes part in both gets its kept row from the devices.
"""

import dataclasses
import errno
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed import checks
from jaxfed.base import Selector
from jaxfed.engine.cohort import Tables
from jaxfed.engine.mesh import BY_DEVICE, EVERYWHERE, Devices
from jaxfed.engine.population import Population, table_length
from jaxfed.engine.round import SELECTION
from jaxfed.messages import Cohort, RunState
from jaxfed.placement import Placement

# Clients whose kept rows are copied at a time.
_BLOCK = 1024
# Disks give room by so many bytes.
_SECTOR = 4096


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """A selector whose next cohort is known: the one whose page is there."""

    selector: Selector
    cohort: Cohort

    def select(self, state: Any, key: jax.Array, round: jax.Array, population: int) -> Cohort:
        """The cohort."""
        del state, key, round, population
        return self.cohort

    def observe(self, state: Any, cohort: Cohort, metrics: dict[str, jax.Array]) -> Any:
        """What ``selector`` learns."""
        return self.selector.observe(state, cohort, metrics)

    def report(self, state: Any) -> dict[str, jax.Array]:
        """What ``selector`` says."""
        return self.selector.report(state)


Round = Callable[[Drawn, Population, RunState], tuple[RunState, Any]]
"""``(selector, page, state whose kept rows are the page's) -> (state, info)``, not waited for; the page's rows may be donated."""


def check_paged(paged: Any) -> bool | Path | None:
    """Whether pages are wanted, or the folder for what clients keep.

    Raises:
        TypeError: For anything else.
        FileNotFoundError: If there is no such folder.
    """
    if paged is None or isinstance(paged, bool):
        return paged
    if not isinstance(paged, str | Path):
        raise TypeError(f"paged: expected True, False, None or a folder, got {checks.describe(paged)}.")
    if not Path(paged).is_dir():
        raise FileNotFoundError(f"paged: there is no folder {str(paged)!r}. Make it, or give True to keep rows in memory.")
    return Path(paged)


class Pager:
    """Brings pages to the devices.

    Args:
        placement: The data and the devices.
        rows: What one client keeps, as shapes and dtypes.
        size: How many clients a page has.
        folder: Where tables of kept rows lie, in memory-mapped files that vanish with the process; None keeps them in memory.
    """

    def __init__(self, placement: Placement, rows: Any, size: int, folder: Path | None = None):
        self.placement, self.rows, self.size, self.folder = placement, rows, size, folder
        self.length = placement.page_length(size)

    @property
    def devices(self) -> Devices:
        """Where pages go."""
        return self.placement.devices

    def table(self, count: int) -> Any:
        """A table for N clients: for each leaf an array ``[N, ...]`` of zeros, which takes memory where it is written."""

        def zeros(row: jax.ShapeDtypeStruct) -> np.ndarray:
            row = jax.eval_shape(_data, row)
            shape = (count, *row.shape)
            if self.folder is None or 0 in shape:
                return np.zeros(shape, row.dtype)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                return np.memmap(file, row.dtype, "w+", shape=shape)

        return jax.tree.map(zeros, self.rows)

    def copy(self, table: Any, seen: jax.Array) -> Any:
        """A table of its own with the rows of the clients that have taken part: the others hold nothing yet."""
        ids, copy = np.flatnonzero(seen), self.table(len(seen))
        for first in range(0, len(ids), _BLOCK):
            some = ids[first : first + _BLOCK]
            self._put(copy, some, jax.tree.map(lambda x: _data(x[some]), table))  # noqa: B023  (called at once)
        return copy

    def population(self, ids: np.ndarray) -> Population:
        """The rows of some clients; a number outside holds none."""
        return self.placement.page(ids, self.length)

    def kept(self, table: Any, ids: np.ndarray) -> Any:
        """Their kept rows, in equal parts on each machine's devices."""
        ids = np.clip(ids, 0, self.placement.data.num_clients - 1)
        length = table_length(self.size, self.devices) // self.devices.machines

        def one(array: np.ndarray, row: jax.ShapeDtypeStruct) -> jax.Array:
            page = np.zeros((length, *array.shape[1:]), array.dtype)
            page[: len(ids)] = array[ids]
            return _undata(self.devices.place_blocks(lambda _: page, length, BY_DEVICE), row)

        return jax.tree.map(one, table, self.rows)

    def example(self, state: RunState) -> tuple[Population, RunState]:
        """The page of the first clients, and the state with their rows: what a round takes."""
        ids = np.arange(self.size)
        return self.population(ids), state._replace(kept=self.kept(state.kept, ids))

    def tables(self, tables: Tables, ids: np.ndarray) -> Tables:
        """The page of some clients, of a table on the host."""
        return tables._replace(kept=self.kept(tables.kept, ids))

    def write(self, table: Any, ids: np.ndarray, counts: jax.Array, kept: Any) -> None:
        """Puts the rows of the clients that counted back into the table, on the machine whose clients they are."""
        machine = jax.process_index() if self.devices.machines > 1 else 0
        places = np.flatnonzero(np.asarray(counts) & (ids // self.placement.per_machine == machine))
        rows = jax.tree.map(lambda x: self.devices.local_rows(_data(x))[places], kept)
        self._put(table, ids[places], rows)

    def _put(self, table: Any, ids: np.ndarray, rows: Any) -> None:
        if self.folder is not None:
            # A hole in a mapped file that the disk cannot fill ends the process without a word.
            needed = sum(len(x) * -(-x[:1].nbytes // _SECTOR) * _SECTOR for x in jax.tree.leaves(rows))
            if needed > shutil.disk_usage(self.folder).free:
                raise OSError(errno.ENOSPC, f"No room for {needed} bytes of what clients keep", str(self.folder))
        for array, new in zip(jax.tree.leaves(table), jax.tree.leaves(rows), strict=True):
            array[ids] = new


class _Visited(NamedTuple):
    """A round under way: who takes part, and their rows after it."""

    ids: np.ndarray
    counts: jax.Array
    kept: Any


def run_paged(pager: Pager, selector: Selector, run: Round, state: RunState, rounds: int) -> tuple[RunState, list[Any]]:
    """Some rounds, the next page being read while a cohort trains. The state's tables are written to.

    A selection that learns from its cohorts (one with a state) is only known when a round is over.
    """
    table, infos, last = state.kept, [], None
    first, key = int(state.round), state.key
    for number in range(first, first + rounds):
        count = pager.placement.data.num_clients
        ids, cohort = _select(selector, state.selector, key, jnp.asarray(number, jnp.int32), count)
        ids, cohort = np.asarray(ids), pager.devices.place(cohort, jax.tree.map(lambda _: EVERYWHERE, cohort))
        page, kept = pager.population(ids), pager.kept(table, ids)
        if last is not None:
            kept = _forward(kept, last.kept, _places_in(last.ids, ids, pager))
        state, info = run(Drawn(selector, cohort), page, state._replace(kept=kept))
        if last is not None:
            pager.write(table, *last)
        last = _Visited(ids, info.counts, state.kept)
        infos.append(info)
    if last is not None:
        pager.write(table, *last)
    return state._replace(kept=table), infos


def sum_by_pages(sum_page: Callable[[np.ndarray], dict[str, Any]], size: int, count: int) -> dict[str, np.ndarray]:
    """The sums ``[N]`` by name, page by page: ``ids [size] -> sums [size]``, with numbers from N on in the last."""
    pages = [jax.device_get(sum_page(np.arange(first, first + size))) for first in range(0, count, size)]
    return {name: np.concatenate([page[name] for page in pages])[:count] for name in pages[0]}


@partial(jax.jit, static_argnames=("population",))
def _select(selector: Selector, state: Any, key: jax.Array, round: jax.Array, population: int) -> tuple[jax.Array, Cohort]:
    """A round's cohort, as the round itself would draw it, and its numbers; N where nobody is valid."""
    key = jax.random.fold_in(jax.random.fold_in(key, round), SELECTION)
    cohort: Cohort = selector.select(state, key, round, population)
    return jnp.where(cohort.valid, cohort.ids, population), cohort


@jax.jit
def _forward(kept: Any, last: Any, places: jax.Array) -> Any:
    """The rows ``[T, ...]`` of this page, replaced by the last page's where ``places [T]`` is not negative."""

    def one(mine: jax.Array, theirs: jax.Array) -> jax.Array:
        found = theirs[jnp.maximum(places, 0)]
        return jnp.where((places >= 0).reshape(-1, *[1] * (mine.ndim - 1)), found, mine)

    return jax.tree.map(one, kept, last)


def _places_in(last: np.ndarray, ids: np.ndarray, pager: Pager) -> jax.Array:
    """Where the last page has the clients of this one; -1 where it does not."""
    count, machines = pager.placement.data.num_clients, pager.devices.machines
    length = table_length(pager.size, pager.devices) // machines
    where = {client: place for place, client in enumerate(last.tolist()) if client < count}
    places = np.full(length, -1, np.int32)
    places[: len(ids)] = [where.get(client, -1) for client in ids.tolist()]
    blocks = [np.where(places >= 0, places + machine * length, -1) for machine in range(machines)]
    return pager.devices.place(np.concatenate(blocks), EVERYWHERE)


def with_keys(table: Any, rows: Any) -> Any:
    """A table for the devices, where keys are keys; on the host they are numbers."""
    return jax.tree.map(lambda x, row: x if x.dtype == row.dtype else _undata(jnp.asarray(x), row), table, rows)


def _data(x: Any) -> Any:
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _undata(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    if not jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return x
    # A shape tells no generator; an array does.
    return jax.random.wrap_key_data(x, impl=jax.random.key_impl(jnp.zeros((), like.dtype)))
