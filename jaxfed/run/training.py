"""A run in its folder: started, killed at any moment, resumed, finished, with the same bits in the end."""

import contextlib
import csv
import io
import json
import math
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from jaxfed import files
from jaxfed.messages import RunState
from jaxfed.reports import Evaluation, RoundReport
from jaxfed.run import build, machines
from jaxfed.run.checkpoint import Changed, Checkpoint, newest, open_checkpoint, save_run
from jaxfed.run.client_curves import CurvesFile
from jaxfed.run.config import RunConfig
from jaxfed.run.environment import differences, environment
from jaxfed.run.folder import RunFolder
from jaxfed.run.history import HistoryFile, Row, check_mark, read_history, row_of
from jaxfed.run.watching import Watch, check_metrics
from jaxfed.simulation import Simulation


class Records(NamedTuple):
    """The files that grow with every call."""

    history: HistoryFile
    curves: CurvesFile

    @classmethod
    def cut(cls, folder: RunFolder, notes: dict[str, Any]) -> Self:
        """Opens them as they were at a checkpoint with these notes, or empty without any."""
        sizes = {name: notes[name]["size"] if notes else 0 for name in cls._fields}
        return cls(HistoryFile.cut(folder.history, sizes["history"]), CurvesFile.cut(folder.curves, sizes["curves"]))

    @property
    def marks(self) -> dict[str, Any]:
        """How they are now, to be kept with a checkpoint."""
        return {name: file.mark for name, file in self._asdict().items()}

    def append(self, reports: list[RoundReport], rows: list[Row]) -> None:
        """Adds reports, and the rows that were made of them."""
        # The curves first: the history says how many of them count.
        for report in reports:
            if report.evaluation is not None:
                self.curves.append(report.evaluation)
        self.history.append(rows)


class Run:
    """A run that can be trained; a context manager that keeps other processes out of its folder.

    Attributes:
        folder: Where everything is written.
        built: What the config names.
        state: The newest state.
        watch: What the run decides by its evaluations.

    Example:
        >>> import tempfile
        >>> table = {
        ...     "run": {"rounds": 2, "eval_every": 1},
        ...     "data": {"name": "digits", "partition": {"name": "iid", "clients": 10}},
        ...     "model": {"name": "logistic-regression"},
        ...     "algorithm": {"name": "fedavg", "lrate": 0.1, "batch_size": 20},
        ... }
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table["run"]["out"] = f"{folder}/first"
        ...     with Run.start(RunConfig.from_dict(table)) as run:
        ...         rounds = [row["round"] for rows in run.train() for row in rows]
        ...         evaluation = run.finish()
        >>> rounds, evaluation.metrics["accuracy"] > 0.5
        ([1, 2], True)
    """

    def __init__(self, folder: RunFolder, built: build.Built, state: RunState, records: Records | None, rows: Iterable[Row] = ()):
        self.folder, self.built, self.state = folder, built, state
        self.watch = Watch.of(folder.config)
        self.watch.see(rows)
        # None in all processes of a run but the one that writes.
        self._records = records
        # The checkpoint from which the run goes on, and whose rows have changed since.
        self._changed = Changed(self.done, np.zeros(0, int))
        self._saved = self.done if (folder.checkpoints / f"{self.done:08d}").exists() else -1
        # Whoever goes back to that checkpoint needs the model that was the best then.
        self._best_when_saved = self._best_round
        self._lock = contextlib.ExitStack()

    @classmethod
    def start(cls, config: RunConfig) -> Self:
        """Builds everything that the config names, then makes the run's folder.

        Raises:
            TypeError, ValueError, OSError: Before anything is written, with the path of the key.
        """
        config = build.resolved(config)
        built = build.build(config)
        state = built.simulation.init(key=jax.random.key(config.run.seed))
        build.check_round(built.simulation, state)
        check_metrics(config.run, built.simulation, state)
        # The bits of a run depend on its lanes, so their choice is written down.
        lanes = {"simulation": config.simulation.to_dict() | {"lanes": _lanes(config, built.simulation, state)}}
        path, config = Path(config.run.out or "runs/run").absolute(), RunConfig.from_dict(config.to_dict() | lanes)
        if not machines.writes():
            return cls(RunFolder(path, config, {}), built, state, None)
        folder = RunFolder.create(path, config, built.digest)
        run = cls(folder, built, state, Records.cut(folder, {}))
        run._lock.enter_context(folder.locked())
        return run

    @classmethod
    def resume(cls, path: str | Path, rounds: int | None = None) -> Self:
        """Goes back to the newest checkpoint, and cuts what the history has beyond it.

        Args:
            path: The run's folder.
            rounds: Another number of rounds for the whole run.

        Raises:
            ValueError: If the folder, its checkpoints or its history are damaged, the data has changed, or the run is finished.

        Warns:
            UserWarning: If libraries or machine differ from those the run began with, or a damaged checkpoint is passed over.
        """
        if not machines.writes():
            machines.meet("the folder is locked")
            return cls._restored(RunFolder.open(path))
        folder = RunFolder.open(path)
        with contextlib.ExitStack() as lock:
            # Before the checkpoints are looked at: another process may be writing one.
            lock.enter_context(folder.locked())
            folder = folder if rounds is None else folder.with_rounds(_more_rounds(folder, rounds))
            if folder.finished_rounds() == folder.config.run.rounds:
                remedy = f"To go on, raise them:  jaxfed resume {path} --rounds {2 * folder.config.run.rounds}."
                raise ValueError(f"The run {path} is finished: it has done all its {folder.config.run.rounds} rounds. {remedy}")
            machines.meet("the folder is locked")
            run = cls._restored(folder)
            run._lock = lock.pop_all()
        return run

    @classmethod
    def _restored(cls, folder: RunFolder) -> Self:
        _warn_of_differences(folder)
        built = _built(folder)

        def accept(checkpoint: Checkpoint) -> None:
            if checkpoint.notes["config"] != folder.origin["config"]:
                raise ValueError(f"Checkpoint {checkpoint.folder} belongs to another run.")
            check_mark(folder.history, checkpoint.notes["history"])
            check_mark(folder.curves, checkpoint.notes["curves"])

        state, checkpoint = _initial(folder, built), newest(folder.checkpoints, accept)
        state, notes = (state, {}) if checkpoint is None else (checkpoint.load(state), checkpoint.notes)
        records = Records.cut(folder, notes) if machines.writes() else None
        # Another process may not have cut the history yet.
        run = cls(folder, built, state, records, [row for row in read_history(folder.history) if row["round"] <= state.round])
        if run.watch.stopped and folder.finished_rounds() == run.done:
            remedy = f"To go on, raise run.stop.patience in {folder.path / 'config.toml'}, then resume."
            raise ValueError(f"The run {folder.path} is finished: it {run.early_end}. {remedy}")
        return run

    @property
    def done(self) -> int:
        """Rounds done."""
        return int(self.state.round)

    @property
    def early_end(self) -> str:
        """That the run stopped early, and why, as the end of a sentence; an empty text where it did not."""
        if self.watch.stopping is None or not self.watch.stopped or self.done == self.folder.config.run.rounds:
            return ""
        return f"stopped after round {self.done} of {self.folder.config.run.rounds}, as {self.watch.stopping.reason}"

    @property
    def _best_round(self) -> int | None:
        return self.watch.best and self.watch.best.round

    def train(self) -> Iterator[list[Row]]:
        """Trains until ``run.stop`` says so, or up to the config's rounds, and yields the rows of every compiled call.

        They are on the disk then.
        """
        if self.watch.stopped:
            return
        section, simulation = self.folder.config.run, self.built.simulation
        every = section.checkpoint_every or section.eval_every or simulation.chunk
        chunks = simulation.chunks(
            self.state, rounds=section.rounds - self.done, eval_every=section.eval_every, eval_data=self.built.test
        )
        # Clock times have a file of their own: the history is the same bytes in every repetition.
        begin = time.perf_counter()
        for state, reports in chunks:
            rows = [*map(row_of, reports[:-1]), row_of(reports[-1], self._validated(state, reports[-1]))]
            # Records first: a checkpoint must never know of rounds that the history lacks.
            if self._records is not None:
                self._records.append(reports, rows)
            before, self.state = self.done, state
            counted = [report.clients[report.counted] for report in reports]
            self._changed = self._changed._replace(ids=np.unique(np.concatenate([self._changed.ids, *counted])))
            improved, stopped = self._decide(rows)
            if self.done // every > before // every or self.done == section.rounds or improved or stopped:
                self.save()
            self._note_time(before, time.perf_counter() - begin)
            yield rows
            if stopped:
                return
            begin = time.perf_counter()

    def _validated(self, state: RunState, report: RoundReport) -> Evaluation | None:
        """The new model on the validation rows, wherever the test rows were evaluated; they are so at the end of a call only."""
        if self.built.valid is None or report.evaluation is None:
            return None
        return self.built.simulation.evaluate_in_use(state, self.built.valid)

    def _decide(self, rows: list[Row]) -> tuple[bool, bool]:
        """Whether the best model is the present one, and whether to stop. All processes must agree, as they save together."""
        improved = self.watch.see(rows)
        decided = int(self.built.simulation.devices.agree(2 * improved + self.watch.stopped))
        return bool(decided & 2), bool(decided & 1)

    def save(self) -> None:
        """Writes a checkpoint that knows how history and curves were at that moment, unless it is there already."""
        # To write it again would mean to remove it first.
        if self._saved == self.done:
            return
        state = self.built.simulation.portable(self.state)
        if self._records is not None:
            notes = {**self._records.marks, "config": self.folder.origin["config"], "best": self._best_round}
            needed = [round for round in (self._best_round, self._best_when_saved) if round is not None]
            save_run(state, self.folder.checkpoints, notes=notes, needed=needed, changed=self._changed)
        self._saved, self._best_when_saved = self.done, self._best_round
        self._changed = Changed(self.done, np.zeros(0, int))

    def finish(self) -> Evaluation:
        """Evaluates the final model and writes ``clients.csv`` and ``result.json``."""
        evaluation = self.built.simulation.evaluate_in_use(self.state, self.built.test)
        if self._records is None:
            return evaluation
        # The result comes last, for it says that the run is finished.
        write_clients(self.folder.path / "clients.csv", evaluation, self.built.test.client_names)
        row = {key: value if math.isfinite(value) else None for key, value in evaluation.row().items()}
        early = {"early_end": self.early_end} if self.early_end else {}
        result = {"rounds": self.done} | early | self.watch.result() | row
        files.write(self.folder.path / "result.json", json.dumps(result, indent=1) + "\n")
        return evaluation

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._lock.close()

    def _note_time(self, before: int, seconds: float) -> None:
        if self._records is None:
            return
        note = {"from": before + 1, "to": self.done, "seconds": round(seconds, 6)}
        with open(self.folder.path / "timings.jsonl", "a") as file:
            file.write(json.dumps(note) + "\n")


def load(path: str | Path) -> tuple[RunFolder, build.Built, RunState]:
    """The newest state of a run, to be looked at; another process may go on with it.

    Args:
        path: The run's folder.

    Returns:
        The folder, what its config names, and the state.

    Raises:
        ValueError: If the folder is no run folder or has no checkpoint that is intact.
    """
    folder, built, checkpoint = _opened(path)
    return folder, built, checkpoint.load(_initial(folder, built))


def load_best(path: str | Path) -> tuple[RunFolder, build.Built, RunState]:
    """As :func:`load`, the state of the best model so far.

    Raises:
        ValueError: Also if the run keeps no best model, or it is damaged.
    """
    folder, built, checkpoint = _opened(path)
    best = checkpoint.notes["best"]
    if best is None:
        reason = (
            "of no evaluation was its metric finite"
            if folder.config.run.best or folder.config.run.stop
            else "it was not asked to"
        )
        raise ValueError(f"The run {path} has kept no best model: {reason}. A run with  --set run.best=accuracy  does.")
    if best != checkpoint.round:
        checkpoint = open_checkpoint(folder.checkpoints / f"{best:08d}")
    return folder, built, checkpoint.load(_initial(folder, built))


def _opened(path: str | Path) -> tuple[RunFolder, build.Built, Checkpoint]:
    folder = RunFolder.open(path)
    built = _built(folder)
    checkpoint = newest(folder.checkpoints)
    if checkpoint is None:
        raise ValueError(f"The run {path} has no checkpoint yet. Go on with  jaxfed resume {path}.")
    return folder, built, checkpoint


def write_clients(path: Path, evaluation: Evaluation, names: Any) -> None:
    """A CSV file with a line for each client: number, name, rows, metrics; a client without rows has empty metrics."""
    rows = [{"client": row.pop("client"), "name": name} | row for row, name in zip(evaluation.table(), names.tolist())]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    # A value that differs from itself is NaN.
    writer.writerows({key: "" if value != value else value for key, value in row.items()} for row in rows)
    files.write(path, text.getvalue())


def _lanes(config: RunConfig, simulation: Simulation, state: RunState) -> int:
    return simulation.tune(state) if config.simulation.lanes == "auto" else simulation.lanes(state.params)


def _more_rounds(folder: RunFolder, rounds: int) -> int:
    done = max((int(p.name) for p in folder.checkpoints.glob("*") if p.name.isdecimal()), default=0)
    if rounds < done:
        raise ValueError(f"--rounds {rounds}: the run {folder.path} has done {done} rounds already. Give {done + 1} or more.")
    return rounds


def _built(folder: RunFolder) -> build.Built:
    built = build.build(folder.config)
    if built.digest != folder.origin["data"]:
        raise ValueError(f"data: the data set {folder.config.data.name!r} has changed since the run {folder.path} began.")
    return built


def _initial(folder: RunFolder, built: build.Built) -> RunState:
    # Checkpoints know nothing of devices: a run goes on with as many as there are.
    return built.simulation.portable(built.simulation.init(key=jax.random.key(folder.config.run.seed)))


def _warn_of_differences(folder: RunFolder) -> None:
    if changed := differences(folder.origin["environment"], environment()):
        text = f"The run began in another environment ({'; '.join(changed)}), so its last digits may differ."
        warnings.warn(text, stacklevel=3)
