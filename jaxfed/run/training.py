"""A run in its folder: started, killed at any moment, resumed, finished, with the same bits in the end."""

import contextlib
import csv
import io
import json
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from jaxfed import files
from jaxfed.base import RunState
from jaxfed.reports import Evaluation
from jaxfed.run import build, machines
from jaxfed.run.checkpoint import Changed, Checkpoint, newest, save_run
from jaxfed.run.config import RunConfig
from jaxfed.run.environment import differences, environment
from jaxfed.run.folder import RunFolder
from jaxfed.run.history import HistoryFile, Row, check_mark, row_of
from jaxfed.simulation import Simulation


class Run:
    """A run that can be trained; a context manager that keeps other processes out of its folder.

    Attributes:
        folder: Where everything is written.
        built: What the config names.
        state: The newest state.

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

    def __init__(self, folder: RunFolder, built: build.Built, state: RunState, history: HistoryFile | None):
        self.folder, self.built, self.state = folder, built, state
        # None in all processes of a run but the one that writes.
        self._history = history
        # The checkpoint from which the run goes on, and whose rows have changed since.
        self._changed = Changed(self.done, np.zeros(0, int))
        self._saved = self.done if (folder.checkpoints / f"{self.done:08d}").exists() else -1
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
        # The bits of a run depend on its lanes, so their choice is written down.
        lanes = {"simulation": config.simulation.to_dict() | {"lanes": _lanes(config, built.simulation, state)}}
        path, config = Path(config.run.out or "runs/run").absolute(), RunConfig.from_dict(config.to_dict() | lanes)
        if not machines.writes():
            return cls(RunFolder(path, config, {}), built, state, None)
        folder = RunFolder.create(path, config, built.digest)
        run = cls(folder, built, state, HistoryFile(folder.history))
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
            folder = RunFolder.open(path)
            built, state, _ = _restored(folder)
            return cls(folder, built, state, None)
        folder = RunFolder.open(path)
        with contextlib.ExitStack() as lock:
            # Before the checkpoints are looked at: another process may be writing one.
            lock.enter_context(folder.locked())
            folder = folder if rounds is None else folder.with_rounds(_more_rounds(folder, rounds))
            if folder.finished_rounds() == folder.config.run.rounds:
                remedy = f"To go on, raise them:  jaxfed resume {path} --rounds {2 * folder.config.run.rounds}."
                raise ValueError(f"The run {path} is finished: it has done all its {folder.config.run.rounds} rounds. {remedy}")
            machines.meet("the folder is locked")
            run = cls(folder, *_restored(folder))
            run._lock = lock.pop_all()
        return run

    @property
    def done(self) -> int:
        """Rounds done."""
        return int(self.state.round)

    def train(self) -> Iterator[list[Row]]:
        """Trains up to the config's rounds and yields the rows of every compiled call once they are on the disk."""
        section, simulation = self.folder.config.run, self.built.simulation
        every = section.checkpoint_every or section.eval_every or simulation.chunk
        chunks = simulation.chunks(
            self.state, rounds=section.rounds - self.done, eval_every=section.eval_every, eval_data=self.built.test
        )
        # Clock times have a file of their own: the history is the same bytes in every repetition.
        begin = time.perf_counter()
        for state, reports in chunks:
            rows = [row_of(report) for report in reports]
            # The history first: a checkpoint must never know of rounds that the history lacks.
            if self._history is not None:
                self._history.append(rows)
            before, self.state = self.done, state
            counted = [report.clients[report.counted] for report in reports]
            self._changed = self._changed._replace(ids=np.unique(np.concatenate([self._changed.ids, *counted])))
            if self.done // every > before // every or self.done == section.rounds:
                self.save()
            self._note_time(before, time.perf_counter() - begin)
            yield rows
            begin = time.perf_counter()

    def save(self) -> None:
        """Writes a checkpoint that knows how the history was at that moment, unless it is there already."""
        # To write it again would mean to remove it first.
        if self._saved == self.done:
            return
        state = self.built.simulation.portable(self.state)
        if self._history is not None:
            notes = {"history": self._history.mark, "config": self.folder.origin["config"]}
            save_run(state, self.folder.checkpoints, notes=notes, changed=self._changed)
        self._saved = self.done
        self._changed = Changed(self.done, np.zeros(0, int))

    def finish(self) -> Evaluation:
        """Evaluates the final model and writes ``clients.csv`` and ``result.json``."""
        evaluation = self.built.simulation.evaluate_in_use(self.state, self.built.test)
        if self._history is None:
            return evaluation
        # The result comes last, for it says that the run is finished.
        write_clients(self.folder.path / "clients.csv", evaluation, self.built.test.client_names)
        row = {key: value if math.isfinite(value) else None for key, value in evaluation.row().items()}
        files.write(self.folder.path / "result.json", json.dumps({"rounds": self.done} | row, indent=1) + "\n")
        return evaluation

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._lock.close()

    def _note_time(self, before: int, seconds: float) -> None:
        if self._history is None:
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
    folder = RunFolder.open(path)
    built = _built(folder)
    checkpoint = newest(folder.checkpoints)
    if checkpoint is None:
        raise ValueError(f"The run {path} has no checkpoint yet. Go on with  jaxfed resume {path}.")
    return folder, built, checkpoint.load(_initial(folder, built))


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


def _restored(folder: RunFolder) -> tuple[build.Built, RunState, HistoryFile]:
    _warn_of_differences(folder)
    built = _built(folder)

    def accept(checkpoint: Checkpoint) -> None:
        if checkpoint.notes["config"] != folder.origin["config"]:
            raise ValueError(f"Checkpoint {checkpoint.folder} belongs to another run.")
        check_mark(folder.history, checkpoint.notes["history"])

    state, size = _initial(folder, built), 0
    checkpoint = newest(folder.checkpoints, accept)
    if checkpoint is not None:
        state, size = checkpoint.load(state), checkpoint.notes["history"]["size"]
    return built, state, HistoryFile.cut(folder.history, size)


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
