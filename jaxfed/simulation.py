"""Simulation: many rounds, compiled in chunks, with evaluation in between."""

import time
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed import checks, trees
from jaxfed.base import Model, Selector
from jaxfed.data.federated import FederatedData
from jaxfed.engine.algorithm import Algorithm, check_selection
from jaxfed.engine.cohort import Tables
from jaxfed.engine.compilation import Rounds, rounds_program
from jaxfed.engine.evaluation import sum_metrics, sum_personal_metrics
from jaxfed.engine.lanes import default_lanes
from jaxfed.engine.mesh import Devices, choose_devices
from jaxfed.engine.population import Population, table_length
from jaxfed.engine.round import RoundInfo, state_layout
from jaxfed.lane_choice import best_of, climb
from jaxfed.messages import Broadcast, Params, RunState
from jaxfed.models.advice import warn_of_slow_layers
from jaxfed.paging import Pager, check_paged, run_paged, sum_by_pages, with_keys
from jaxfed.placement import Placement
from jaxfed.reports import Evaluation, History, RoundReport
from jaxfed.server.selection import as_selector

_EVALUATION_ROWS = 256
# Clients whose rows are evaluated together, where they come page by page.
_PAGE = 1024
# Measuring lanes takes as long as compiling three or four programs.
_WORTH = 8
# Rounds fold their numbers into the run's key, and count from 0: these are none of theirs.
_MODEL, _SERVER = 2**32 - 1, 2**32 - 2


class Simulation:
    """An algorithm on federated data.

    Args:
        algorithm: A recipe's result, or an :class:`Algorithm` of your own parts.
        data: The clients' training data.
        cohort_size: ``C``, clients drawn uniformly each round; None takes all of them.
        selector: How cohorts are chosen, instead of ``cohort_size``.
        lanes: ``L``, clients that run side by side on each device; None chooses by the sizes of model and cohort, ``"auto"``
            measures once enough rounds are to come (see :meth:`tune`). Results for other lanes differ in their last bits.
        devices: How many of JAX's devices take part, or which; None takes all, at most one for each client of a cohort.
        chunk: The most rounds in one compiled call.
        paged: Keeps data and what clients keep on the host, whence a page goes to the devices for each cohort, the next one's
            while this one trains; a folder keeps the clients' rows there, in memory-mapped files. None does so where the
            devices' memory is too small.

    Raises:
        TypeError, ValueError: For parts of the wrong type, a cohort larger than the population, or data without rows.
        OSError: While rounds run, if the disk of the folder ``paged`` is full.

    Example:
        >>> import jax, jax.numpy as jnp, jaxfed
        >>> def loss(params, batch, key):
        ...     return jnp.square(batch["x"] @ params - batch["y"])
        >>> x = jax.random.normal(jax.random.key(0), (60, 2))
        >>> data = jaxfed.FederatedData.from_arrays({"x": x, "y": x @ jnp.array([1.0, -2.0])}, [i % 6 for i in range(60)])
        >>> simulation = Simulation(jaxfed.fedavg(loss, lrate=0.1, batch_size=5), data, cohort_size=3)
        >>> state, history = simulation.run(simulation.init(jnp.zeros(2), key=jax.random.key(1)), rounds=20)
        >>> print(jnp.round(state.params, 2), len(history))
        [ 1. -2.] 20
    """

    def __init__(
        self,
        algorithm: Algorithm,
        data: FederatedData,
        cohort_size: int | None = None,
        *,
        selector: Selector | None = None,
        lanes: int | Literal["auto"] | None = None,
        devices: int | Sequence[Any] | None = None,
        chunk: int = 10,
        paged: bool | str | Path | None = None,
    ):
        self.algorithm = checks.instance("algorithm", algorithm, Algorithm, "Use a recipe such as fedavg(...).")
        self.data = checks.instance("data", data, FederatedData, "Use FederatedData.from_arrays(arrays, client_ids).")
        self.selector = as_selector(cohort_size, selector)
        check_selection(self.algorithm, self.selector)
        self.cohort_size = self.selector.cohort_size(data.num_clients)
        at_least_one = checks.Bounds(at_least=1)
        self._measures = lanes == "auto"
        self._lanes = None if lanes in (None, "auto") else min(checks.count("lanes", lanes, at_least_one), self.cohort_size)
        self.lane_seconds: dict[int, float] = {}
        self.chunk = checks.count("chunk", chunk, at_least_one)
        self.devices = choose_devices(devices, self.cohort_size)
        self._paged = check_paged(paged)
        self._placement = Placement(data, algorithm, self.devices)
        self._rounds = Rounds()
        self._kept_rows: dict[tuple, Any] = {}
        if data.num_examples == 0:
            raise ValueError("data: expected at least one row, got none.")

    @cached_property
    def population(self) -> Population:
        """The data on the devices, placed there when first used; a ValueError if they are to stay on the host."""
        if self._paged:
            remedy = "Sweeps and differentiable rounds need them there; make a simulation without paged for these"
            raise ValueError(f"Expected data that may lie on the devices as a whole, got paged={self._paged!r}. {remedy}.")
        # Kept on the object, so it must hold arrays even if it is first asked for inside somebody's trace.
        with jax.ensure_compile_time_eval():
            return self._placement.whole()

    @property
    def model(self) -> Model:
        """The model that is trained."""
        return self.algorithm.client.model  # type: ignore[attr-defined]

    def lanes(self, params: Params) -> int:
        """``L``, as given, measured, or by default for these weights."""
        return self._lanes or default_lanes(params, self.cohort_size)

    def tune(self, state: RunState) -> int:
        """Measures rounds with other numbers of lanes, each of which is compiled, and keeps the fastest: ``L``.

        ``lane_seconds`` then holds seconds of a round by lanes. The rounds that are run for it leave no trace.
        """
        state, most = self._check_state(state), -(-self.cohort_size // self.devices.per_machine)
        self.lane_seconds = climb(partial(self._seconds, state), min(self.lanes(state.params), most), most)
        # Clocks differ between processes, the program may not.
        self._lanes = int(self.devices.agree(best_of(self.lane_seconds)))
        return self._lanes

    def _seconds(self, state: RunState, lanes: int) -> float:
        state, times = self._own(state), []
        for _ in range(4):
            begin = time.perf_counter()
            state, _ = self._advance(state, 1, lanes)
            times.append(time.perf_counter() - begin)
        return min(times[1:])

    def init(self, params: Params | None = None, *, key: jax.Array, stats: Any = None) -> RunState:
        """The state before the first round, from given weights (which are copied) or the model's own.

        Args:
            params: The global weights; None asks the model, with ``key``.
            key: The run's PRNG key: it decides every draw.
            stats: The model's statistics, where ``params`` are given.

        Raises:
            TypeError: If ``key`` is not a PRNG key or the weights hold something that cannot be trained.
        """
        key = checks.prng_key(key)
        if params is None:
            params, stats = _init_model(self.model, key)
        stats = {} if stats is None else stats
        return self._first_state(checks.trainable(params), stats, key, self.data.num_clients)

    def run(
        self, state: RunState, *, rounds: int, eval_every: int = 0, eval_data: FederatedData | None = None
    ) -> tuple[RunState, History]:
        """Runs a number of rounds.

        Args:
            state: From :meth:`init`, an earlier run or :meth:`portable`; it stays valid.
            rounds: How many more rounds.
            eval_every: Evaluate when the number of rounds done is a multiple of this, and after the last; 0 never.
            eval_data: What to evaluate on; None means the training data. Personal algorithms are evaluated client by client.

        Returns:
            The new state, and a report of each round.
        """
        history, last = History(), state
        for last, reports in self.chunks(state, rounds=rounds, eval_every=eval_every, eval_data=eval_data):  # noqa: B007
            history.extend(reports)
        return last, history

    def rounds(
        self, state: RunState, *, rounds: int, eval_every: int = 0, eval_data: FederatedData | None = None
    ) -> Iterator[tuple[RunState, RoundReport]]:
        """Yields ``(state, report)`` after every round. Earlier states' weights stay valid, what their clients kept does not."""
        options: dict[str, Any] = {"eval_every": eval_every, "eval_data": eval_data}
        for new, reports in self.chunks(state, rounds=rounds, chunk=1, **options):
            yield new, reports[0]

    def chunks(
        self,
        state: RunState,
        *,
        rounds: int,
        eval_every: int = 0,
        eval_data: FederatedData | None = None,
        chunk: int | None = None,
    ) -> Iterator[tuple[RunState, list[RoundReport]]]:
        """Yields ``(state, reports)`` after every compiled call of up to ``chunk`` rounds; arguments as in :meth:`run`."""
        rounds = checks.count("rounds", rounds, checks.Bounds(at_least=0))
        eval_every = checks.count("eval_every", eval_every, checks.Bounds(at_least=0))
        state = self._check_state(state)
        if eval_every:
            self._check_rows("eval_data", self.data if eval_data is None else eval_data)
        # The compiled call donates what clients keep; the caller's table stays his.
        if (model := getattr(self.algorithm.client, "model", None)) is not None:
            warn_of_slow_layers(model, state.params, state.stats, self.data.arrays, state.key)
        state = self._own(state)
        end = int(state.round) + rounds
        while (done := int(state.round)) < end:
            until_evaluation = eval_every - done % eval_every if eval_every else rounds
            begin = time.perf_counter()
            state, reports = self._advance(state, min(chunk or self.chunk, self.chunk, end - done, until_evaluation))
            self._tune_if_worth(state, time.perf_counter() - begin, end - int(state.round))
            done = int(state.round)
            if eval_every and (done % eval_every == 0 or done == end):
                reports[-1].evaluation = self.evaluate_in_use(state, eval_data)
            yield state, reports

    def evaluate(self, state: RunState, data: FederatedData | None = None) -> Evaluation:
        """The global model's metrics over all rows and by client.

        Args:
            state: Whose weights are evaluated.
            data: What to evaluate on; None means the training data.
        """
        data = self._check_rows("data", self.data if data is None else data)
        sum_rows = partial(sum_metrics, self.model, state.params, state.stats, at_once=_EVALUATION_ROWS)
        if (pager := self._pager(state.params, state.stats, data)) is None:
            sums = sum_rows(self._place(data))
        else:
            sums = sum_by_pages(lambda ids: sum_rows(pager.population(ids)), pager.size, data.num_clients)
        return Evaluation.from_sums(sums, data.sizes)

    def evaluate_in_use(self, state: RunState, data: FederatedData | None = None) -> Evaluation:
        """What clients predict with: :meth:`evaluate_personal` where the algorithm personalizes, else :meth:`evaluate`."""
        return (self.evaluate_personal if self.algorithm.client.personalizes else self.evaluate)(state, data)

    def evaluate_personal(
        self, state: RunState, data: FederatedData | None = None, *, train: FederatedData | None = None
    ) -> Evaluation:
        """Each client's metrics with what it predicts with itself: its own layers, its own model, its mixture.

        Args:
            state: The global model and what clients keep.
            data: What to evaluate on, aligned with the clients; None means the training data.
            train: For clients that the run has never seen: the rows with which they personalize, aligned with ``data``.

        Raises:
            ValueError: If the numbers of clients differ.
        """
        rows, owners = self.data if data is None else data, self.data if train is None else train
        if rows.num_clients != owners.num_clients:
            raise ValueError(f"data: expected {owners.num_clients} clients, got {rows.num_clients}. Give train= for new clients.")
        tables = Tables(state.kept, state.seen) if train is None else self._fresh_tables(state, owners.num_clients)
        start = Broadcast(state.params, state.stats, self.algorithm.server.send(state.server), state.round)
        options = {"lanes": self.lanes(state.params), "batch_size": min(_EVALUATION_ROWS, max(1, rows.max_size))}
        key = jax.random.fold_in(state.key, state.round)
        sum_rows = partial(sum_personal_metrics, self.algorithm.client, start, key, **options)
        own, other = (self._pager(state.params, state.stats, d) for d in (owners, rows))
        if own is None or other is None:
            sums = sum_rows((self._place(owners), self._place(rows)), tables, jnp.arange(rows.num_clients))
        else:
            pages = lambda ids: (own.population(ids), other.population(ids))  # noqa: E731
            sum_page = lambda ids: sum_rows(pages(ids), own.tables(tables, ids), jnp.asarray(ids))  # noqa: E731
            sums = sum_by_pages(sum_page, own.size, rows.num_clients)
        return Evaluation.from_sums(sums, rows.sizes)

    def _place(self, data: FederatedData) -> Population:
        return self.population if data is self.data else Placement(data, self.algorithm, self.devices).whole()

    def _kept_row(self, params: Params, stats: Any) -> Any:
        """What one client keeps, as shapes and dtypes; traced once, since every call of a run asks."""
        leaves, tree = jax.tree.flatten((params, stats))
        shapes = (tree, *((jnp.shape(x), jnp.result_type(x)) for x in leaves))
        if shapes not in self._kept_rows:
            self._kept_rows[shapes] = self.algorithm.kept_row(params, stats, jax.random.key(0))
        return self._kept_rows[shapes]

    def _pager(self, params: Params, stats: Any, data: FederatedData, size: int | None = None) -> Pager | None:
        """What brings pages of ``size`` clients to the devices, if data and kept rows stay on the host."""
        rows = self._kept_row(params, stats)
        if self._paged is False or (self._paged is None and self._placement.fits(rows)):
            return None
        placement = self._placement if data is self.data else Placement(data, self.algorithm, self.devices)
        folder = self._paged if isinstance(self._paged, Path) else None
        return Pager(placement, rows, min(size or _PAGE, data.num_clients), folder)

    def _first_state(self, params: Params, stats: Any, key: jax.Array, count: int) -> RunState:
        pager = self._pager(params, stats, self.data)
        rows = table_length(-(-count // self.devices.machines), self.devices) if pager is None else 0
        parts, options = (self.algorithm, self.selector), {"count": count, "rows": rows, "devices": self.devices}
        state = _first_state(*parts, params, stats, key, **options)
        return state if pager is None else state._replace(kept=pager.table(count))

    def _fresh_tables(self, state: RunState, count: int) -> Tables:
        first = self._first_state(state.params, state.stats, state.key, count)
        return Tables(first.kept, first.seen)

    def portable(self, state: RunState) -> RunState:
        """The state in arrays that this process has as a whole, with kept rows ``[N, ...]``: for files, and for other devices.

        Every process of a run takes part.
        """
        rest = self.devices.collect(state._replace(kept=()))
        return rest._replace(kept=self._placement.by_client(state.kept))

    def _own(self, state: RunState) -> RunState:
        """The state with tables of its own, which rounds may donate or write to."""
        pager = self._pager(state.params, state.stats, self.data)
        if pager is not None:
            kept = pager.copy(state.kept, state.seen)
        else:
            kept = with_keys(self._placement.by_device(state.kept), self._kept_row(state.params, state.stats))
            kept = trees.copy(kept)
        return state._replace(kept=kept, seen=trees.copy(state.seen))

    def _tune_if_worth(self, state: RunState, first_seconds: float, rounds: int) -> None:
        """Measures lanes if that takes less than what is to come; the first call's seconds are mostly compilation."""
        if not self._measures or not rounds:
            return
        self._measures = False
        if self.devices.agree(rounds * self._seconds(state, self.lanes(state.params)) > _WORTH * first_seconds):
            self.tune(state)

    def trace(self, state: RunState) -> None:
        """Traces a round without running it: finds parts, model and data that do not fit together."""
        if (pager := self._pager(state.params, state.stats, self.data, self.cohort_size)) is None:
            population, chunk = self.population, self.chunk
        else:
            population, state, chunk = *pager.example(state), 1
        arguments, options = self._arguments(population, state, 1, chunk)
        rounds_program(*arguments, **options).eval_shape(*arguments, **options)

    def _advance(self, state: RunState, rounds: int, lanes: int | None = None) -> tuple[RunState, list[RoundReport]]:
        pager = self._pager(state.params, state.stats, self.data, self.cohort_size)

        def run(selector: Any, population: Population, state: RunState, rounds: int, chunk: int) -> tuple[RunState, RoundInfo]:
            (parts, *rest), options = self._arguments(population, state, rounds, chunk)
            arguments, options = ((parts[0], selector, parts[2]), *rest), options | ({} if lanes is None else {"lanes": lanes})
            return self._rounds(*arguments, **options)

        if pager is None:
            state, infos = run(self.selector, self.population, state, rounds, self.chunk)
            return state, RoundReport.unstack(jax.device_get(infos), rounds)
        state, pages = run_paged(pager, self.selector, lambda drawn, page, state: run(drawn, page, state, 1, 1), state, rounds)
        return state, [RoundReport.unstack(info, 1)[0] for info in jax.device_get(pages)]

    def _arguments(self, population: Population, state: RunState, rounds: int, chunk: int) -> tuple[tuple, dict[str, int]]:
        """What the compiled call of some rounds takes."""
        state = self.devices.place(state, state_layout(state, self.devices))
        rest = state._replace(kept=(), seen=())  # type: ignore[arg-type]
        parts, tables = (self.algorithm, self.selector, population), (state.kept, state.seen)
        return (parts, rest, tables, np.int32(rounds)), {"chunk": chunk, "lanes": self.lanes(state.params)}

    def _check_rows(self, where: str, data: Any) -> FederatedData:
        if checks.instance(where, data, FederatedData).num_examples == 0:
            raise ValueError(f"{where}: expected at least one row, got none.")
        return data

    def _check_state(self, state: RunState) -> RunState:
        checks.instance("state", state, RunState, "Make it with simulation.init(params, key=...).")
        if state.seen.shape != (self.data.num_clients,):
            raise ValueError(f"state: expected one of {self.data.num_clients} clients, got one of {state.seen.shape[0]}.")
        return state


@jax.jit
def _init_model(model: Model, key: jax.Array) -> tuple[Params, Any]:
    return model.init(jax.random.fold_in(key, _MODEL))


@partial(jax.jit, static_argnames=("count", "rows", "devices"))
def _first_state(
    algorithm: Algorithm,
    selector: Selector,
    params: Params,
    stats: Any,
    key: jax.Array,
    *,
    count: int,
    rows: int,
    devices: Devices,
) -> RunState:
    """A state in buffers of its own; one program, since op by op each small array would be compiled alone."""
    kept = algorithm.kept_row(params, stats, key)
    shared, versions = algorithm.client.shared(params), selector.versions
    server = algorithm.server.start_server(shared, jax.random.fold_in(key, _SERVER))
    number = jnp.zeros((), jnp.int32)
    first = Broadcast(params, stats, algorithm.server.send(server), number)
    state = RunState(
        round=number,
        params=trees.copy(params),
        stats=trees.copy(stats),
        server=server,
        aggregator=algorithm.aggregator.init(shared),
        selector=selector.init(count),
        kept=jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), kept),
        seen=jnp.zeros(count, bool),
        key=jax.random.clone(key),
        past=jax.tree.map(lambda x: jnp.zeros((versions, *x.shape), x.dtype), first) if versions > 1 else (),
    )
    return devices.constrain(state, state_layout(state, devices))
