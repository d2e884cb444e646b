"""What a federation's file declares: its runs, how one is trained, the rows that it adds to the table, its picture."""

import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Numbers = dict[str, Any]
"""What a run measured: numbers, and lists of them for curves."""
Line = dict[str, Any]
"""A finished run as the results file holds it."""


class Run(NamedTuple):
    """One training run; a line of the results.

    Attributes:
        method: The algorithm.
        setting: Data set and whatever else differs between runs of one method.
        seed: Of all its draws.
    """

    method: str
    setting: str
    seed: int


class Results:
    """The finished runs of a federation.

    >>> lines = [{"method": "fedavg", "setting": "iid", "seed": seed, "numbers": {"accuracy": seed / 4}} for seed in (0, 1)]
    >>> Results(lines).by_seed("fedavg", "iid", "accuracy")
    {0: 0.0, 1: 0.25}
    """

    def __init__(self, lines: Iterable[Line]):
        self.lines = list(lines)

    def by_seed(self, method: str, setting: str, metric: str) -> dict[int, Any]:
        """A metric of every seed that has been run."""
        found = [line for line in self.lines if (line["method"], line["setting"]) == (method, setting)]
        return {line["seed"]: line["numbers"][metric] for line in found if metric in line["numbers"]}

    def of(self, seeds: Collection[int]) -> "Results":
        """The runs of some seeds."""
        return Results(line for line in self.lines if line["seed"] in seeds)

    def mean(self, method: str, setting: str, metric: str) -> float:
        """Over seeds; NaN where nothing has been run."""
        values = self.by_seed(method, setting, metric).values()
        return statistics.fmean(values) if values else float("nan")


class Rule(NamedTuple):
    """When a row holds.

    Attributes:
        text: For the table.
        holds: ``(values over seeds, reference) -> bool``; None where there is nothing to hold to.
    """

    text: str
    holds: Callable[[Sequence[float], Any], bool] | None


def within(tolerance: float) -> Rule:
    """The mean over seeds lies that near to the reference.

    >>> within(0.01).holds([0.50, 0.52], 0.515)
    True
    """
    return Rule(f"mean within {tolerance:g}", lambda values, reference: abs(statistics.fmean(values) - reference) <= tolerance)


def between(low: float, high: float) -> Rule:
    """The mean over seeds lies in an interval."""
    return Rule(f"mean from {low:g} to {high:g}", lambda values, _: low <= statistics.fmean(values) <= high)


def at_least(bound: float) -> Rule:
    """The mean over seeds is no smaller."""
    return Rule(f"mean at least {bound:g}", lambda values, _: statistics.fmean(values) >= bound)


def every_seed_at_least(bound: float) -> Rule:
    """No seed is smaller."""
    return Rule(f"every seed at least {bound:g}", lambda values, _: min(values) >= bound)


def every_seed_at_most(bound: float) -> Rule:
    """No seed is larger."""
    return Rule(f"every seed at most {bound:g}", lambda values, _: max(values) <= bound)


SHOWN = Rule("only shown", None)
"""Nothing to hold to: there is no such figure, or one of another setting."""

Ours = Callable[[Results], Sequence[float]]


@dataclass(frozen=True)
class Row:
    """A figure of ours beside a reference.

    Attributes:
        method, setting, metric: Which runs, and which of their numbers.
        reference: The published or independently computed figure; None if there is none.
        source: Whence it is.
        rule: When ours agrees.
        remark: What a reader needs to know, such as why it does not hold.
        ours: The values, one for each seed, where they are not simply that metric of those runs.
        seeds: Those that count: a rule that was written down after some seeds had been seen is held to fresh ones. None: all.
        whole: Of whole runs alone, where the other rows are still of shortened ones.
    """

    method: str
    setting: str
    metric: str
    reference: float | None
    source: str
    rule: Rule
    remark: str = ""
    ours: Ours | None = None
    seeds: Collection[int] | None = None
    whole: bool = False

    def values(self, results: Results) -> list[float]:
        """Ours, one for each seed; none as long as one of the seeds that it names has not been run."""
        if self.seeds is not None:
            results = results.of(self.seeds)
        found = results.by_seed(self.method, self.setting, self.metric).values() if self.ours is None else self.ours(results)
        return list(found) if self.seeds is None or len(found) == len(self.seeds) else []


def differences(one: Run | tuple[str, str], other: Run | tuple[str, str], metric: str) -> Ours:
    """``one - other`` of a metric, seed by seed; both are (method, setting)."""

    def ours(results: Results) -> list[float]:
        first, second = (results.by_seed(*which[:2], metric) for which in (one, other))
        return [first[seed] - second[seed] for seed in first if seed in second]

    return ours


@dataclass(frozen=True)
class Federation:
    """A family of runs.

    Attributes:
        name: For ``--only``, the files of results and the picture.
        title: One line about it.
        runs: All runs.
        train: ``(run, data folder, whole) -> numbers``.
        rows: What it adds to the table.
        draw: Draws its results on an empty Matplotlib figure.
        files: What it reads, below the data folder.
        short: What the shortened form, which is the default, leaves out; empty where the whole is short.
        more: What the page says of its results beside rows and picture, as Markdown.
        minutes: About how long all runs take on two cores, shortened and whole.
    """

    name: str
    title: str
    runs: Sequence[Run]
    train: Callable[[Run, Path, bool], Numbers]
    rows: Sequence[Row]
    draw: Callable[[Any, Results], None]
    files: tuple[str, ...] = ()
    short: str = ""
    more: Callable[[Results], str] = lambda results: ""
    minutes: tuple[float, float] = (10, 10)

    def missing(self, folder: Path) -> list[str]:
        """The files that are not there."""
        return [name for name in self.files if not (folder / name).is_file()]

    def whole(self, asked: bool) -> bool:
        """Whether its runs are whole ones."""
        return asked or not self.short
