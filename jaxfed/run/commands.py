"""The commands, one class each; their fields are the arguments of the command line."""

import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jax
import tyro
from rich.console import Console

from jaxfed import files
from jaxfed.messages import RunState
from jaxfed.profiling import profile_rounds
from jaxfed.run import build, listing, show
from jaxfed.run.client_curves import read_client_curves
from jaxfed.run.client_plots import save_curves_by_client
from jaxfed.run.config import RunConfig
from jaxfed.run.environment import make_devices, use_compilation_cache
from jaxfed.run.export import export_weights
from jaxfed.run.folder import RunFolder
from jaxfed.run.machines import Machines, anyone, writes
from jaxfed.run.plots import labelled, read_runs, save_curves
from jaxfed.run.sweeping import SweepRun
from jaxfed.run.training import Run, load, load_best, write_clients

Folder = tyro.conf.Positional[Path]
T = TypeVar("T")
OwnNames = Annotated[T, tyro.conf.arg(name="")]
"""Arguments under their own names: --processes and not --machines.processes."""
INTERRUPTED = 130
"""The exit status after Ctrl-C."""


@dataclasses.dataclass
class Train:
    """Train as a config file says, in a new run folder."""

    config: tyro.conf.Positional[Path]
    """The TOML file."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """Replace a setting; may be given several times, as in --set algorithm.lrate=0.05."""
    machines: OwnNames[Machines] = dataclasses.field(default_factory=Machines)

    def __call__(self) -> int:
        """Runs the command and returns its exit status."""
        config = RunConfig.read(self.config, self.set)
        use_compilation_cache()
        make_devices(config.simulation.devices, alone=self.machines.alone)
        with self.machines.joined(), Run.start(config) as run:
            return _train(run)


@dataclasses.dataclass
class Resume:
    """Go on with a run that was stopped or killed."""

    run_dir: Folder
    """The run's folder."""
    rounds: int | None = None
    """Another number of rounds for the whole run."""
    machines: OwnNames[Machines] = dataclasses.field(default_factory=Machines)

    def __call__(self) -> int:
        """Runs the command and returns its exit status."""
        use_compilation_cache()
        make_devices(RunFolder.open(self.run_dir).config.simulation.devices, alone=self.machines.alone)
        with self.machines.joined(), Run.resume(self.run_dir, self.rounds) as run:
            return _train(run)


@dataclasses.dataclass
class Sweep:
    """Run many settings of a config's numbers side by side; the same command goes on with what was stopped."""

    config: tyro.conf.Positional[Path]
    """The TOML file."""
    over: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=VALUES")] = ()
    """What varies; may be given several times, as in --over client.lrate=0.1,0.3 --over seed=0:8."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """Replace a setting of the file."""
    out: Path | None = None
    """The sweep's folder; by default runs/ and the name of the config file with -sweep."""
    at_once: int | None = None
    """The most settings side by side; by default as many as memory holds."""

    def __call__(self) -> int:
        """Runs the command and returns its exit status."""
        use_compilation_cache()
        path = (self.out or Path("runs", f"{self.config.stem}-sweep")).absolute()
        config = RunConfig.read(self.config, self.set)
        make_devices(config.simulation.devices)
        swept = SweepRun.start(config, self.over, path)
        console = Console(highlight=False)
        try:
            with show.settings(console, len(swept.settings)) as advance:
                for done in swept.train(self.at_once):
                    advance(done)
            rows = swept.finish()
        except KeyboardInterrupt:
            print("Stopped. Finished settings are kept; the same command goes on.", file=sys.stderr)
            return INTERRUPTED
        console.print(show.sweep(rows, f"After {swept.config.run.rounds} rounds"))
        console.print(f"Picture: {_short(path / 'sweep.png')}\nTable: {_short(path / 'results.csv')}")
        return 0


@dataclasses.dataclass
class Profile:
    """Say where a round's time goes, what it computes, and what limits it; a few rounds are run, and nothing is kept."""

    config: tyro.conf.Positional[Path]
    """The TOML file."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """Replace a setting of the file."""
    rounds: int | None = None
    """How many rounds are timed in each repetition; by default as many as one compiled call has."""
    repetitions: int = 5
    """How often everything is timed; the medians count."""
    out: Path | None = None
    """A JSON file for the figures, such as profile.json."""

    def __call__(self) -> int:
        """Runs the command and returns its exit status."""
        # Without the cache of compiled programs: it would hide how long compiling takes.
        config = build.resolved(RunConfig.read(self.config, self.set))
        if self.out is not None and (self.out.is_dir() or not self.out.absolute().parent.is_dir()):
            raise ValueError(f"--out {self.out}: expected a file in a folder that exists, such as profile.json.")
        make_devices(config.simulation.devices)
        built = build.build(config)
        state = built.simulation.init(key=jax.random.key(config.run.seed))
        build.check_round(built.simulation, state)
        counts = {"rounds": self.rounds, "repetitions": self.repetitions}
        run = {"eval_data": built.test, "eval_every": config.run.eval_every, "planned": config.run.rounds}
        profile = profile_rounds(built.simulation, state, **counts, **run)
        Console(highlight=False).print(*show.profile(profile))
        if self.out is not None:
            files.write(self.out, json.dumps(profile.to_dict(), indent=1) + "\n")
            print(f"Figures: {_short(self.out.absolute())}")
        return 0


@dataclasses.dataclass
class Evaluate:
    """Evaluate the newest or the best model of a run."""

    run_dir: Folder
    """The run's folder."""
    best: bool = False
    """The best model by run.best or run.stop, instead of the newest."""
    clients: bool = False
    """Show a table of all clients and write it as a CSV file."""
    split: Literal["test", "train", "valid"] = "test"
    """Which rows to evaluate on."""

    def __call__(self) -> int:
        """Runs the command and returns its exit status."""
        use_compilation_cache()
        make_devices(RunFolder.open(self.run_dir).config.simulation.devices)
        folder, built, state = _chosen(self.run_dir, self.best)
        data = {"test": built.test, "train": built.simulation.data, "valid": built.valid}[self.split]
        if data is None:
            raise ValueError("--split valid: the run has no validation rows. One with  --set data.valid_fraction=0.2  has.")
        evaluation = built.simulation.evaluate_in_use(state, data)
        console = Console()
        if self.clients:
            path = folder.path / f"clients-{self.split}-{int(state.round):08d}.csv"
            write_clients(path, evaluation, data.client_names)
            console.print(show.clients(evaluation, path))
        console.print(show.results(evaluation, f"After {int(state.round)} rounds, on the {self.split} rows"))
        return 0


@dataclasses.dataclass
class Plot:
    """Draw the curves of one or several runs in one picture."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The runs' folders."""
    clients: bool = False
    """Draw the clients' own curves: how they spread, and how the worst and the best tenth of them fared."""
    out: Path | None = None
    """The PNG file; by default curves.png, or clients.png, in the run's folder, or in this folder for several runs."""

    def __call__(self) -> int:
        """Runs the command and returns its exit status."""
        if not self.runs:
            raise ValueError("jaxfed plot: expected one run folder or more, got none.")
        folder, runs = self.runs[0] if len(self.runs) == 1 else Path(), list(self.runs)
        if self.clients:
            print(save_curves_by_client(labelled(runs, read_client_curves), self.out or folder / "clients.png"))
        else:
            print(save_curves(read_runs(runs), self.out or folder / "curves.png"))
        return 0


@dataclasses.dataclass
class Export:
    """Write the newest or the best weights of a run to a file for other programs."""

    run_dir: Folder
    """The run's folder."""
    best: bool = False
    """The best weights by run.best or run.stop, instead of the newest."""
    out: Path | None = None
    """The file, .safetensors or .msgpack; by default weights.safetensors in the run's folder."""

    def __call__(self) -> int:
        """Runs the command and returns its exit status."""
        make_devices(RunFolder.open(self.run_dir).config.simulation.devices)
        folder, _, state = _chosen(self.run_dir, self.best)
        print(export_weights(state, self.out or folder.path / "weights.safetensors"))
        return 0


@dataclasses.dataclass
class List:
    """Show what a config may name, with options and defaults."""

    kinds: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="KIND")] = ()
    """Of modules, regularizers, schedules, aggregators, algorithms, datasets, partitions, models, selectors, batches, gradients,
    measures, availability; all if none is given."""

    def __call__(self) -> int:
        """Runs the command and returns its exit status."""
        found = {kind: listing.entries(kind) for kind in self.kinds or listing.KINDS}
        console = Console()
        for kind, entries in found.items():
            console.print(show.listing(kind, entries))
        return 0


Command = (
    Annotated[Train, tyro.conf.subcommand("run")]
    | Annotated[Resume, tyro.conf.subcommand("resume")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Profile, tyro.conf.subcommand("profile")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
    | Annotated[Export, tyro.conf.subcommand("export")]
)


def parse(arguments: list[str]) -> Train | Resume | Sweep | Profile | Evaluate | List | Plot | Export:
    """The command that the arguments ask for; raises SystemExit with status 2 where they ask for none."""
    description = "Federated learning in compiled JAX: train from a config file, resume, evaluate, compare."
    return tyro.cli(Command, prog="jaxfed", description=description, args=arguments)  # type: ignore[arg-type]


def _train(run: Run) -> int:
    console, path = Console(highlight=False, quiet=not writes()), _short(run.folder.path)
    rounds = run.folder.config.run.rounds
    console.print(_introduction(run))
    try:
        with show.progress(console, run.done, rounds) as advance, _stoppable() as asked:
            for rows in run.train():
                advance(rows)
                # Between two calls everything is on the disk, so a checkpoint can be written and no round is lost. Processes stop
                # together, whichever was asked: they write it together.
                if run.done < rounds and anyone(bool(asked)):
                    run.save()
                    raise KeyboardInterrupt
        # The result is written after the picture: a run that has one has everything.
        picture = run.folder.path / "curves.png"
        if writes():
            save_curves(read_runs([run.folder.path]), picture)
        evaluation = run.finish()
    except KeyboardInterrupt:
        print(f"Stopped after round {run.done}. Go on with  jaxfed resume {path}", file=sys.stderr)
        return INTERRUPTED
    except OSError:
        print(f"Stopped after round {run.done}. When there is room, go on with  jaxfed resume {path}", file=sys.stderr)
        raise
    rows = "test" if run.built.test is not run.built.simulation.data else "training"
    if run.early_end:
        console.print(f"The run {run.early_end}.")
    console.print(show.results(evaluation, f"After {run.done} rounds, on the {rows} rows"))
    if (best := run.watch.best) is not None and best.round is not None:
        rows = "" if run.built.valid is None else " on the validation rows"
        value = f"{best.metric} {show.number(best.value)}{rows}"
        console.print(f"Best {value} after round {best.round}:  jaxfed evaluate {path} --best")
    console.print(f"Picture: {_short(picture)}\nHistory, checkpoints, results by client: {path}")
    return 0


def _chosen(path: Path, best: bool) -> tuple[RunFolder, build.Built, RunState]:
    return load_best(path) if best else load(path)


@contextlib.contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Makes Ctrl-C and SIGTERM a request, which is noted in the list, so that no file is cut; a second one stops at once."""
    asked: list[int] = []

    def ask(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("Stopping after the rounds that are under way; once more stops at once.", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _introduction(run: Run) -> str:
    simulation, test = run.built.simulation, run.built.test
    rows = f"{simulation.data.num_examples} rows"
    if test is not simulation.data:
        rows = f"{simulation.data.num_examples} training and {test.num_examples} test rows"
    if run.built.valid is not None:
        rows += f", {run.built.valid.num_examples} more for validation"
    return f"{simulation.data.num_clients} clients with {rows}; {simulation.cohort_size} clients in each round"


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
