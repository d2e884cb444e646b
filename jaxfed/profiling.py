"""Where a round's time goes, what it computes, and what limits it: measured from outside of the compiled program. Host side."""

import copy
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxfed import checks, part, trees
from jaxfed.base import Selector
from jaxfed.bottleneck import Shares, Work, sentence_of, work_of
from jaxfed.costs import Collective, Cost, Peak, collectives, measure_peak, process_memory
from jaxfed.data.federated import FederatedData
from jaxfed.engine.compilation import rounds_program
from jaxfed.engine.population import Population
from jaxfed.engine.round import SELECTION
from jaxfed.messages import Cohort, RunState
from jaxfed.reports import RoundReport
from jaxfed.simulation import Simulation
from jaxfed.step_costs import server_steps, step_costs

# A server's step is short: so many of them are timed together.
_SERVER_STEPS = 20
_stamps = itertools.count()


@dataclasses.dataclass(frozen=True)
class Profile:
    """Where the time of a run goes. Seconds, bytes and operations; per round unless said otherwise.

    Attributes:
        rounds: How many were timed in each repetition.
        setting: ``devices``, ``device``, ``lanes``, ``chunk``, ``clients`` in a cohort, ``paged``.
        compiling: Seconds, once: ``trace``, ``lower``, ``xla``.
        placing: Seconds and bytes of the data's way to the devices: once, or for one round where data are paged.
        round_seconds: Of a whole round, as a run sees it.
        seconds: Of its parts, which add up to it but for noise: ``local steps``, ``selection and aggregation``, ``server step``,
            ``call`` (starting a compiled call), ``host`` (between calls, and waiting for a page).
        evaluation_seconds: Of one evaluation.
        work: Local steps.
        step: One local step of one client.
        server: One step of the server.
        cost: All local steps and the server's step.
        collectives: By kind, with what a device gives or gets.
        memory: Bytes on one device: ``arguments``, ``temporary``, ``output``, ``peak``; and ``process``, the most it has had.
        peak: What the devices do at most.
        flops_fraction: Achieved operations a second of the local steps over the peak; 0 where they take no time that can be told.
        bytes_fraction: The same for memory; above 1 where what is read lies in caches.
        round_limit: What limits a round, and a remedy.
        limit: The same for a run as planned, with compiling, placing and evaluation.
    """

    rounds: int
    setting: dict[str, Any]
    compiling: dict[str, float]
    placing: dict[str, float]
    round_seconds: float
    seconds: dict[str, float]
    evaluation_seconds: float
    work: Work
    step: Cost
    server: Cost
    cost: Cost
    collectives: dict[str, Collective]
    memory: dict[str, int | None]
    peak: Peak
    flops_fraction: float
    bytes_fraction: float
    round_limit: str
    limit: str

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def profile_rounds(
    simulation: Simulation,
    state: RunState,
    *,
    rounds: int | None = None,
    repetitions: int = 5,
    eval_data: FederatedData | None = None,
    eval_every: int = 0,
    planned: int | None = None,
) -> Profile:
    r"""Times rounds and says what limits them. The state stays valid.

    The same compiled rounds run whole, with a cohort whose work is 0 (nobody takes a local step), and in a call of no rounds at
    all; how many rounds and how much work are data, so it is one program. The server's step is timed alone, many in one call.
    Repetitions are interleaved, and each time is their median; then

    .. math:: t_{local} = t_{whole} - t_{idle}, \qquad t_{aggregation} = t_{idle} - t_{server} - t_{call},
        \qquad t_{host} = t_{run} - t_{whole},

    where what is below 0 by noise is 0. A survey before the round counts as local steps.

    XLA counts the body of a loop once, so a round's operations are those of one local step, compiled alone, times the local steps
    that ran (the metric ``steps`` of the reports), and the server's step. Adding up the uploads is left out. For a client that is
    not :class:`~jaxfed.LocalTraining`, a step is its whole visit with each loop of unknown length counted once.

    Collectives are those in the text of the compiled program; none stands in a loop over clients, so each runs once a round. With
    a cache of compiled programs, compiling takes as long as the cache left of it.

    Args:
        simulation: What runs.
        state: Where it begins.
        rounds: How many rounds are timed in each repetition; None takes a chunk.
        repetitions: How often.
        eval_data: What to evaluate on; None means the training data.
        eval_every: How often a run evaluates, for the sentence on what limits the run; 0 never.
        planned: How many rounds a run has; None leaves compiling and placing out of that sentence.

    Raises:
        TypeError, ValueError: For arguments of the wrong type or size, or a state of another simulation.

    Example:
        >>> import jax.numpy as jnp, jaxfed
        >>> def loss(params, batch, key):
        ...     return jnp.square(batch["x"] @ params - batch["y"])
        >>> x = jax.random.normal(jax.random.key(0), (60, 2))
        >>> data = jaxfed.FederatedData.from_arrays({"x": x, "y": x.sum(1)}, [i % 6 for i in range(60)])
        >>> simulation = Simulation(jaxfed.fedavg(loss, lrate=0.1, batch_size=5), data, cohort_size=3)
        >>> profile = profile_rounds(simulation, simulation.init(jnp.zeros(2), key=jax.random.key(1)), repetitions=1)
        >>> profile.work.steps, profile.step.flops > 0, profile.limit.endswith("would help.")
        (6.0, True, True)
    """
    checks.instance("simulation", simulation, Simulation)
    at_least_one = checks.Bounds(at_least=1)
    length: int = simulation.chunk if rounds is None else checks.count("rounds", rounds, at_least_one)
    repetitions = checks.count("repetitions", repetitions, at_least_one)
    eval_every = checks.count("eval_every", eval_every, checks.Bounds(at_least=0))
    planned = None if planned is None else checks.count("planned", planned, at_least_one)
    timed = _Timed(simulation, simulation._check_state(state), length)
    times = timed.measure(repetitions, eval_data)
    work = work_of(timed.reports, simulation.devices.per_machine, timed.lanes)
    return _profile(timed, times, work, eval_every, planned)


class _Paced(Selector, register=False):
    """A selector whose cohorts do another share of their work; the share is data, so that no share compiles anew."""

    selector: Selector = part.part("selector")
    work: float = part.number(default=1.0, at_least=0)
    # A number of its own makes a program of its own, so that its compiling can be timed.
    stamp: int = part.static(default=0)

    @property
    def versions(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.selector.versions

    def init(self, population: int) -> Any:
        return self.selector.init(population)

    def cohort_size(self, population: int) -> int:
        return self.selector.cohort_size(population)

    def select(self, state: Any, key: jax.Array, round: jax.Array, population: int) -> Cohort:
        cohort = self.selector.select(state, key, round, population)
        return cohort._replace(work=cohort.work * self.work)

    def observe(self, state: Any, cohort: Cohort, metrics: dict[str, jax.Array]) -> Any:
        return self.selector.observe(state, cohort, metrics)

    def report(self, state: Any) -> dict[str, jax.Array]:
        return self.selector.report(state)


class _Timed:
    """A simulation's rounds, to be timed from one state; what clients keep is a copy that the calls hand on."""

    def __init__(self, simulation: Simulation, state: RunState, rounds: int):
        stamp = next(_stamps)
        self.whole, self.idle = (_with_selector(simulation, _Paced(simulation.selector, work, stamp)) for work in (1.0, 0.0))
        self.lanes, self.rounds, self.first = simulation.lanes(state.params), rounds, state
        self.pager = simulation._pager(state.params, state.stats, simulation.data, simulation.cohort_size)
        self.state = simulation._own(state)
        # Their rows are the page, where data are paged.
        self.ids = self._cohort()
        begin = time.perf_counter()
        self.population = self._placed(simulation)
        seconds, size = time.perf_counter() - begin, sum(x.nbytes for x in self.population.arrays.values())
        self.placing = {"seconds": seconds, "bytes": size}
        # Paged rounds run one by one, on the page of the first cohort.
        self.on_device = self.state if self.pager is None else self.state._replace(seen=trees.copy(state.seen), kept=self._page())
        self.chunk = simulation.chunk if self.pager is None else 1
        self.reports: list[RoundReport] = []
        self.compiling, self.compiled = self._compile()

    def measure(self, repetitions: int, eval_data: FederatedData | None) -> dict[str, float]:
        """Median seconds of a run's rounds, and of one call, one step of the server and one evaluation."""
        length = self.rounds if self.pager is None else 1
        server = server_steps(self.whole, self.population, self.state)
        calls = {
            "run": self._run,
            "whole": lambda: self._call(self.whole, length),
            "idle": lambda: self._call(self.idle, length),
            "call": lambda: self._call(self.whole, 0),
            "servers": lambda: server(_SERVER_STEPS),
            "no servers": lambda: server(0),
            "evaluation": lambda: self.whole.evaluate_in_use(self.first, eval_data),
        }
        medians = _medians(calls, repetitions)
        by_round = {"run": medians["run"] / self.rounds, **{name: medians[name] / length for name in ("whole", "idle")}}
        by_round["call"] = medians["call"] * -(-length // self.chunk) / length
        by_round["server"] = max(0.0, medians["servers"] - medians["no servers"]) / _SERVER_STEPS
        return by_round | {"evaluation": medians["evaluation"]}

    def _placed(self, simulation: Simulation) -> Population:
        if self.pager is not None:
            return jax.block_until_ready(self.pager.population(self.ids))
        return jax.block_until_ready(simulation._placement.whole())

    def _page(self) -> Any:
        assert self.pager is not None  # the caller asked
        return self.pager.kept(self.state.kept, self.ids)

    def _cohort(self) -> Any:
        key = jax.random.fold_in(jax.random.fold_in(self.first.key, self.first.round), SELECTION)
        select, count = self.whole.selector.select, self.whole.data.num_clients
        return jax.device_get(select(self.first.selector, key, self.first.round, count).ids)

    def _compile(self) -> tuple[dict[str, float], Any]:
        arguments, options = self.whole._arguments(self.population, self.on_device, 1, self.chunk)
        clock, found = time.perf_counter, [time.perf_counter()]
        self.program = rounds_program(*arguments, **options)
        traced = self.program.trace(*arguments, **options)
        found.append(clock())
        lowered = traced.lower()
        found.append(clock())
        compiled = lowered.compile()
        found.append(clock())
        return {name: end - begin for name, begin, end in zip(("trace", "lower", "xla"), found, found[1:])}, compiled

    def _call(self, simulation: Simulation, rounds: int) -> None:
        """The compiled rounds, waited for, without what the host does about them; no round at all is a call too."""
        state, left = self.on_device, rounds
        while True:
            arguments, options = simulation._arguments(self.population, state, min(left, self.chunk), self.chunk)
            state, infos = self.program(*arguments, **options)
            left -= self.chunk
            if left <= 0:
                break
        jax.block_until_ready((state, infos))
        self.on_device = self.on_device._replace(kept=state.kept, seen=state.seen)
        if self.pager is None:
            self.state = self.on_device

    def _run(self) -> None:
        """The rounds as a run has them, with reports."""
        state, reports = self.state, []
        while len(reports) < self.rounds:
            state, more = self.whole._advance(state, min(self.whole.chunk, self.rounds - len(reports)))
            reports += more
        jax.block_until_ready(state)
        self.reports, self.state = reports, self.state._replace(kept=state.kept, seen=state.seen)
        if self.pager is None:
            self.on_device = self.state


def _profile(timed: _Timed, times: dict[str, float], work: Work, eval_every: int, planned: int | None) -> Profile:
    step, server = step_costs(timed.whole, timed.population, timed.first)
    cost, peak = server.plus(step, work.steps), measure_peak(timed.whole.devices)
    seconds = _parts(times)
    # Steps that take less time than the clock's noise have no fraction.
    busy = seconds["local steps"]
    flops, traffic = (work.steps * one / busy / most if busy else 0.0 for one, most in zip(step, peak))
    once = {"evaluation": times["evaluation"] / eval_every if eval_every else 0.0}
    if planned is not None:
        once["compile"] = sum(timed.compiling.values()) / planned
        once["placing"] = 0.0 if timed.pager else timed.placing["seconds"] / planned
    shares = Shares(seconds, once, work, flops, traffic, step.bytes * timed.lanes, timed.pager is not None)
    return Profile(
        rounds=timed.rounds,
        setting=_setting(timed),
        compiling=timed.compiling,
        placing=timed.placing,
        round_seconds=times["run"],
        seconds=seconds,
        evaluation_seconds=times["evaluation"],
        work=work,
        step=step,
        server=server,
        cost=cost,
        collectives=collectives(timed.compiled.as_text(), timed.whole.devices.count),
        memory=_memory(timed.compiled),
        peak=peak,
        flops_fraction=flops,
        bytes_fraction=traffic,
        round_limit=sentence_of(shares._replace(once={})),
        limit=sentence_of(shares),
    )


def _parts(times: dict[str, float]) -> dict[str, float]:
    parts = {
        "local steps": times["whole"] - times["idle"],
        "selection and aggregation": times["idle"] - times["server"] - times["call"],
        "server step": times["server"],
        "call": times["call"],
        "host": times["run"] - times["whole"],
    }
    return {name: max(0.0, seconds) for name, seconds in parts.items()}


def _setting(timed: _Timed) -> dict[str, Any]:
    simulation = timed.whole
    device = simulation.devices.mesh.devices.flat[0] if simulation.devices.mesh is not None else jax.devices()[0]
    return {
        "devices": simulation.devices.count,
        "device": device.device_kind,
        "clients": simulation.cohort_size,
        "lanes": timed.lanes,
        "chunk": timed.chunk,
        "paged": timed.pager is not None,
    }


def _memory(compiled: Any) -> dict[str, int | None]:
    found, process = compiled.memory_analysis(), process_memory()
    if found is None:
        return {"process": process}
    sizes = {name: getattr(found, f"{name}_size_in_bytes") for name in ("argument", "temp", "output", "alias")}
    peak = sizes["argument"] + sizes["temp"] + sizes["output"] - sizes["alias"]
    named = {"arguments": sizes["argument"], "temporary": sizes["temp"], "output": sizes["output"]}
    return {**named, "peak": peak, "process": process}


def _with_selector(simulation: Simulation, selector: Selector) -> Simulation:
    own = copy.copy(simulation)
    own.selector = selector
    return own


def _medians(calls: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """The calls one after the other, again and again, so that a slow moment of the machine meets all of them; once unclocked."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(repetitions + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found) for name, found in seconds.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Work):
        return value._asdict() | {"imbalance": value.imbalance, "used": value.used}
    if hasattr(value, "_asdict"):
        return value._asdict()
    return {name: _plain(one) for name, one in value.items()} if isinstance(value, dict) else value
