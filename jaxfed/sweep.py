"""Many settings of a simulation's numbers as one compiled program, and what came of them."""

import csv
import dataclasses
import io
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxfed import checks, hyperparameters
from jaxfed.data.federated import FederatedData
from jaxfed.hyperparameters import SEED, Setting
from jaxfed.messages import Params
from jaxfed.reports import Evaluation, History, RoundReport
from jaxfed.side_by_side import Block, Rows, bytes_available, plan, runs_of
from jaxfed.simulation import Simulation

Row = dict[str, Any]
_SHARE = 0.8  # of the free memory: evaluation and the reports need some too


class Outcome(NamedTuple):
    """What a setting came to.

    Attributes:
        history: As :meth:`Simulation.run` returns it.
        params: The weights after the last round.
        stats: The model's statistics.
    """

    history: History
    params: Params
    stats: Any


@dataclasses.dataclass
class Sweep:
    """The settings of a sweep and their outcomes, in the same order; printed, a table in which seeds are taken together.

    ``jaxfed.run.save_sweep_curves(found.settings, found.histories(), "sweep.png")`` draws them.

    Attributes:
        settings: A value for each name.
        outcomes: What each came to.
    """

    settings: list[Setting]
    outcomes: list[Outcome]

    def rows(self) -> list[Row]:
        """A row for each setting: its number, its values, and the last round's columns."""
        return final_rows(self.settings, self.histories())

    def history(self) -> list[Row]:
        """A row for each round of each setting."""
        return all_rows(self.settings, self.histories())

    def histories(self) -> list[list[Row]]:
        """The rows of each setting's history."""
        return [outcome.history.rows() for outcome in self.outcomes]

    def save(self, path: str | Path) -> None:
        """Writes :meth:`rows` as a CSV file."""
        Path(path).write_text(to_csv(self.rows()))

    def summary(self) -> list[Row]:
        """:meth:`rows` with seeds taken together: means and standard deviations."""
        return summary(self.rows(), list(self.settings[0]))

    def __str__(self) -> str:
        rows = self.summary()
        lines = [list(rows[0]), *([_short(value) for value in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths)) for line in lines)


def sweep(
    simulation: Simulation,
    over: Mapping[Any, Iterable[Any]],
    *,
    rounds: int,
    params: Params | None = None,
    stats: Any = None,
    seed: int = 0,
    eval_every: int = 0,
    eval_data: FederatedData | None = None,
    at_once: int | None = None,
) -> Sweep:
    """Runs a simulation for many settings of its numbers, side by side in one compiled program.

    Every setting gives what a run of its own would give. Settings of one seed share their cohorts and batches, so that rows are
    gathered once for all of them.

    Args:
        simulation: Where the other numbers come from.
        over: ``{name: values}``, their product; a tuple of names is one axis of tuples of values. A name is a path of fields in
            which may be left out what is clear: ``"client.lrate"``, ``"fedprox.mu"``, ``"selector.share"``; or ``"seed"``.
        rounds: Rounds of each setting.
        params: The weights to begin with; None asks the model, by the seed.
        stats: The model's statistics, where ``params`` are given.
        seed: Of the settings' draws, unless ``over`` has seeds: the run's key is ``jax.random.key(seed)``.
        eval_every: As in :meth:`Simulation.run`.
        eval_data: As in :meth:`Simulation.run`.
        at_once: The most settings side by side; None means all that memory holds.

    Raises:
        TypeError, ValueError: If a name fits no number or several, or a value is refused by its part.

    Example:
        >>> import jax.numpy as jnp, jaxfed
        >>> def loss(w, batch, key):
        ...     return (w - batch["x"]) ** 2 / 2
        >>> data = jaxfed.FederatedData.from_arrays({"x": jnp.array([1.0, 3.0])}, [0, 1])
        >>> simulation = jaxfed.Simulation(jaxfed.fedavg(loss, lrate=0.1, batch_size=1), data)
        >>> found = sweep(simulation, {"client.lrate": [0.1, 0.5]}, rounds=2, params=jnp.zeros(()))
        >>> [round(float(outcome.params), 2) for outcome in found.outcomes]
        [0.38, 1.5]
    """
    settings = hyperparameters.settings_of(over)
    options = {"rounds": rounds, "params": params, "stats": stats, "seed": seed, "eval_every": eval_every, "eval_data": eval_data}
    done = dict(outcomes(simulation, settings, at_once=at_once, **options))
    return Sweep(settings, [done[i] for i in range(len(settings))])


def outcomes(
    simulation: Simulation,
    settings: list[Setting],
    *,
    rounds: int,
    params: Params | None = None,
    stats: Any = None,
    seed: int = 0,
    eval_every: int = 0,
    eval_data: FederatedData | None = None,
    at_once: int | None = None,
) -> Iterator[tuple[int, Outcome]]:
    """Yields ``(number of the setting, outcome)`` as settings are finished; arguments as in :func:`sweep`."""
    checks.instance("simulation", simulation, Simulation)
    rounds = checks.count("rounds", rounds, checks.Bounds(at_least=1))
    one = checks.Bounds(at_least=1)
    most = len(settings) if at_once is None else min(checks.count("at_once", at_once, one), len(settings))
    rows = Rows.of(simulation, eval_data)
    runs = dict(enumerate(runs_of(simulation, settings, seed)))
    every = checks.count("eval_every", eval_every, checks.Bounds(at_least=0))
    while runs:
        try:
            for grid in plan(runs, most):
                block = Block(simulation, runs, grid, params, stats)
                if at_once is None and most > 1 and block.bytes_needed() > _SHARE * bytes_available():
                    raise MemoryError
                for number, outcome in _train(block, rounds, every, rows):
                    runs.pop(number)
                    yield number, outcome
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if most == 1 or not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)):
                raise
            most = -(-most // 2)
            text = f"Memory is short for so many settings side by side; going on with at most {most} at once."
            warnings.warn(text, stacklevel=2)


def _train(block: Block, rounds: int, eval_every: int, rows: Rows) -> list[tuple[int, Outcome]]:
    """All rounds of a block's settings, each setting once."""
    block.start()
    places = {number: (k, h) for k, row in enumerate(block.grid) for h, number in enumerate(row)}
    reports: dict[int, list[RoundReport]] = {number: [] for number in places}
    while block.done < rounds:
        until_evaluation = eval_every - block.done % eval_every if eval_every else rounds
        count = min(block.chunk, rounds - block.done, until_evaluation)
        infos = block.advance(count)
        for number, place in places.items():
            reports[number] += RoundReport.unstack(_at(infos, place), count)
        if eval_every and (block.done % eval_every == 0 or block.done == rounds):
            sums = block.evaluate(rows)
            for number, place in places.items():
                reports[number][-1].evaluation = Evaluation.from_sums(_at(sums, place), rows.data.sizes)
    params, stats = jax.device_get((block.state.params, block.state.stats))
    return [(n, Outcome(History(reports[n]), _at(params, place), _at(stats, place))) for n, place in places.items()]


def final_rows(settings: list[Setting], histories: list[list[Row]]) -> list[Row]:
    """A row for each setting: its number, its values, and the columns of its last round."""
    return [{"setting": i} | setting | _numbers(rows[-1]) for i, (setting, rows) in enumerate(zip(settings, histories))]


def all_rows(settings: list[Setting], histories: list[list[Row]]) -> list[Row]:
    """A row for each round of each setting."""
    pairs = enumerate(zip(settings, histories))
    return [{"setting": i} | setting | _numbers(row) for i, (setting, rows) in pairs for row in rows]


def summary(rows: list[Row], names: list[str]) -> list[Row]:
    """A row for each setting apart from its seed: the mean over seeds of every column, and the standard deviation.

    Args:
        rows: From :meth:`Sweep.rows`.
        names: The names of the sweep's axes.

    Example:
        >>> summary([{"setting": 0, "seed": 0, "loss": 1.0}, {"setting": 1, "seed": 1, "loss": 3.0}], ["seed"])
        [{'seeds': 2, 'loss': 2.0, 'loss_std': 1.0}]
    """
    groups: dict[tuple, list[Row]] = {}
    kept = [name for name in names if name != SEED]
    for row in rows:
        groups.setdefault(tuple(row[name] for name in kept), []).append(row)
    found = []
    for values, group in groups.items():
        one = dict(zip(kept, values)) | ({"seeds": len(group)} if SEED in names else {})
        for column in [name for name in group[0] if name not in ("setting", *names)]:
            numbers = np.array([row[column] for row in group], float)
            # Infinities among the numbers make a standard deviation that is NaN, which is no news.
            with np.errstate(invalid="ignore"):
                one[column] = float(numbers.mean())
                if SEED in names:
                    one[f"{column}_std"] = float(numbers.std())
        found.append(one)
    return found


def to_csv(rows: list[Row]) -> str:
    """Rows as the text of a CSV file; a number that is missing is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), restval="", lineterminator="\n")
    writer.writeheader()
    # A value that differs from itself is NaN.
    writer.writerows({key: "" if value != value else value for key, value in row.items()} for row in rows)
    return text.getvalue()


def _at(tree: Any, place: tuple[int, int]) -> Any:
    return jax.tree.map(lambda x: x[place], tree)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _numbers(row: Row) -> Row:
    return {name: value for name, value in row.items() if not isinstance(value, list)}
