"""Settings of a simulation side by side: the compiled program of a sweep, and how settings are laid out in it.

A block is a grid, seeds by settings. ``vmap`` over seeds holds ``vmap`` over the settings of a seed, which have cohort and
batches in common: rows are gathered and orders are drawn once for all of them, and their loops end together.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfed import checks, hyperparameters
from jaxfed.data.federated import FederatedData
from jaxfed.differentiable import population_for
from jaxfed.engine.cohort import Tables
from jaxfed.engine.evaluation import sum_metrics, sum_personal_metrics
from jaxfed.engine.lanes import default_lanes
from jaxfed.engine.population import Population
from jaxfed.engine.round import RoundInfo, run_round
from jaxfed.hyperparameters import SEED, Field, Setting
from jaxfed.messages import Broadcast, Params, RunState
from jaxfed.placement import Placement
from jaxfed.simulation import Simulation

_EVALUATION_ROWS = 256
Grid = list[list[int]]
"""The numbers of settings, by seed and within a seed; a number may come twice to fill the grid."""


class Run(NamedTuple):
    """One setting: the seed, and values by field as the parts store them."""

    seed: int
    values: dict[Field, Any]


class Layout(NamedTuple):
    """What the compiled program is made for, beside the shapes of its arguments."""

    fields: tuple[Field, ...]
    seeds: int
    settings: int
    lanes: int


def runs_of(simulation: Simulation, settings: list[Setting], seed: int) -> list[Run]:
    """The settings with their values checked.

    Raises:
        TypeError, ValueError: With the name of the value that is wrong.
    """
    tree = {"": simulation.algorithm, "selector": simulation.selector}

    def one(setting: Setting) -> Run:
        values = {name: value for name, value in setting.items() if name != SEED}
        return Run(_seed(setting.get(SEED, seed)), hyperparameters.checked(tree, values))

    return [one(setting) for setting in settings]


def plan(runs: Mapping[int, Run], most: int) -> list[Grid]:
    """Grids of at most so many settings, of few different shapes, that hold every run.

    >>> runs = {number: Run(number // 3, {}) for number in range(6)}
    >>> plan(runs, 6), plan(runs, 2)
    ([[[0, 1, 2], [3, 4, 5]]], [[[0, 1]], [[2, 2]], [[3, 4]], [[5, 5]]])
    """
    by_seed: dict[int, list[int]] = {}
    for number, run in runs.items():
        by_seed.setdefault(run.seed, []).append(number)
    # Seeds with as many settings each fill a grid, whatever the settings are.
    by_length: dict[int, Grid] = {}
    for numbers in by_seed.values():
        by_length.setdefault(len(numbers), []).append(numbers)
    grids = []
    for length, rows in by_length.items():
        if length <= most:
            grids += _split(rows, most // length)
        else:
            grids += [[piece] for row in rows for piece in _split(row, most)]
    return grids


class Rows(NamedTuple):
    """Rows to evaluate on, placed once.

    Attributes:
        data: Whose rows.
        population: The same on the devices.
    """

    data: FederatedData
    population: Population

    @classmethod
    def of(cls, simulation: Simulation, data: FederatedData | None) -> "Rows":
        """Those of ``data``; None means the training data."""
        if data is None:
            return cls(simulation.data, simulation.population)
        simulation._check_rows("eval_data", data)
        return cls(data, Placement(data, simulation.algorithm, simulation.devices).whole())


class Block:
    """A grid of settings that is trained and evaluated side by side.

    Args:
        simulation: Where the other numbers come from.
        runs: All settings.
        grid: Which of them.
        params: The weights to begin with, or None.
        stats: The model's statistics, where ``params`` are given.

    Attributes:
        done: Rounds done.
        state: Leaves ``[seeds, settings, ...]``, without key and round, which settings have in common; None before :meth:`start`.
    """

    def __init__(self, simulation: Simulation, runs: Mapping[int, Run], grid: Grid, params: Params | None, stats: Any):
        rows = [[runs[number] for number in row] for row in grid]
        fields = tuple(rows[0][0].values)
        numbers = tuple(jnp.asarray([[run.values[field] for run in row] for row in rows]) for field in fields)
        self._begin = [[partial(_first_state, simulation, run, params, stats) for run in row] for row in rows]
        self._template = self._begin[0][0]()
        lanes = _lanes(simulation, self._template.params, len(rows) * len(rows[0]))
        self._layout = Layout(fields, len(rows), len(rows[0]), lanes)
        self._given = ({"": simulation.algorithm, "selector": simulation.selector}, simulation.population, numbers)
        self.chunk, self.grid = simulation.chunk, grid
        self._keys = jnp.broadcast_to(self._template.key, len(rows))
        self.state: Any = None
        self.done = 0

    def start(self) -> None:
        """Makes the states before the first round."""
        rows = [[begin() for begin in row] for row in self._begin]
        self._keys = jnp.stack([row[0].key for row in rows])
        self.state = _stacked([_stacked([_apart(state) for state in row]) for row in rows])

    def bytes_needed(self) -> int:
        """Memory that training takes beside the data, by the compiler's account."""
        shape = (self._layout.seeds, self._layout.settings)
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*shape, *x.shape), x.dtype), _apart(self._template))
        arguments = (*self._given, self._keys, state, *map(jnp.int32, (0, 0)))
        memory = _advance.lower(*arguments, layout=self._layout, chunk=self.chunk).compile().memory_analysis()
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        return 0 if memory is None else held + memory.temp_size_in_bytes + memory.output_size_in_bytes

    def advance(self, rounds: int) -> RoundInfo:
        """Up to ``chunk`` rounds of every setting; infos ``[seeds, settings, chunk, ...]`` on the host."""
        arguments = (*self._given, self._keys, self.state, *map(jnp.int32, (self.done, rounds)))
        self.state, infos = _advance(*arguments, layout=self._layout, chunk=self.chunk)
        self.done += rounds
        return jax.device_get(infos)

    def evaluate(self, rows: Rows) -> dict[str, Any]:
        """The sums ``[seeds, settings, N]`` of every per-example metric, on the host."""
        arguments = (*self._given, self._keys, self.state, jnp.int32(self.done), rows.population)
        return jax.device_get(_evaluate(*arguments, layout=self._layout))


def bytes_available() -> float:
    """Free memory of the device, as far as can be told; infinity where it cannot."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return float("inf")


@partial(jax.jit, static_argnames=("layout", "chunk"), donate_argnames=("state",))
def _advance(
    tree: Any,
    population: Population,
    numbers: tuple,
    keys: jax.Array,
    state: RunState,
    round: jax.Array,
    rounds: jax.Array,
    *,
    layout: Layout,
    chunk: int,
) -> tuple[RunState, RoundInfo]:
    def one(numbers: tuple, key: jax.Array, state: RunState) -> tuple[RunState, RoundInfo]:
        parts = hyperparameters.replace(tree, dict(zip(layout.fields, numbers)))
        algorithm, selector = parts[""], parts["selector"]
        weighed = population_for(algorithm, population)

        def step(state: RunState) -> tuple[RunState, RoundInfo]:
            return run_round(algorithm, selector, weighed, state, layout.lanes)

        def body(number: jax.Array, carry: tuple[RunState, RoundInfo]) -> tuple[RunState, RoundInfo]:
            state, info = step(carry[0])
            return state, jax.tree.map(lambda b, x: b.at[number].set(x), carry[1], info)

        state = state._replace(round=round, key=key)
        infos = jax.tree.map(lambda x: jnp.zeros((chunk, *x.shape), x.dtype), jax.eval_shape(step, state)[1])
        state, infos = jax.lax.fori_loop(0, rounds, body, (state, infos))
        return _apart(state), infos

    return _over_grid(one, layout)(numbers, keys, state)


@partial(jax.jit, static_argnames=("layout",))
def _evaluate(
    tree: Any,
    population: Population,
    numbers: tuple,
    keys: jax.Array,
    state: RunState,
    round: jax.Array,
    rows: Population,
    *,
    layout: Layout,
) -> dict[str, jax.Array]:
    def one(numbers: tuple, key: jax.Array, state: RunState) -> dict[str, jax.Array]:
        algorithm = hyperparameters.replace(tree, dict(zip(layout.fields, numbers)))[""]
        if not algorithm.client.personalizes:
            return sum_metrics(algorithm.client.model, state.params, state.stats, rows, at_once=_EVALUATION_ROWS)
        start = Broadcast(state.params, state.stats, algorithm.server.send(state.server), round)
        options = {"lanes": layout.lanes, "batch_size": min(_EVALUATION_ROWS, rows.capacity)}
        tables, key = Tables(state.kept, state.seen), jax.random.fold_in(key, round)
        return sum_personal_metrics(algorithm.client, start, key, (population, rows), tables, jnp.arange(rows.count), **options)

    return _over_grid(one, layout)(numbers, keys, state)


def _over_grid(one: Callable, layout: Layout) -> Callable:
    """``(numbers [seeds, settings], keys [seeds], state [seeds, settings, ...])``; an axis of one costs nothing."""
    return _along(_along(one, layout.settings, (0, None, 0)), layout.seeds, (0, 0, 0))


def _along(function: Callable, size: int, axes: tuple) -> Callable:
    if size > 1:
        return jax.vmap(function, axes)

    def only(*arguments: Any) -> Any:
        first = [x if axis is None else jax.tree.map(lambda leaf: leaf[0], x) for x, axis in zip(arguments, axes)]
        return jax.tree.map(lambda x: jnp.asarray(x)[None], function(*first))

    return only


def _first_state(simulation: Simulation, run: Run, params: Params | None, stats: Any) -> RunState:
    parts = hyperparameters.replace({"": simulation.algorithm, "selector": simulation.selector}, run.values)
    own = copy.copy(simulation)
    own.algorithm, own.selector = parts[""], parts["selector"]
    return own.init(params, key=jax.random.key(run.seed), stats=stats)


def _apart(state: RunState) -> Any:
    return state._replace(round=(), key=())  # type: ignore[arg-type]


def _stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def _lanes(simulation: Simulation, params: Params, settings: int) -> int:
    """Settings are lanes of their own, so that clients need fewer."""
    if settings == 1:
        return simulation.lanes(params)
    return max(1, default_lanes(params, simulation.cohort_size) // settings)


def _split(items: list, most: int) -> list[list]:
    """Pieces of one length, as even as can be; the last is filled with its last item."""
    length = -(-len(items) // -(-len(items) // most))
    pieces = [items[i : i + length] for i in range(0, len(items), length)]
    return [piece + piece[-1:] * (length - len(piece)) for piece in pieces]


def _seed(value: Any) -> int:
    return int(checks.count(f"over: {SEED}", value, checks.Bounds(at_least=0, below=2**32)))
