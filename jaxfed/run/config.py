"""RunConfig: the settings of a run, to and from dicts, JSON and TOML without loss.

Every section checks its own keys. Values that belong to a part (its hyper-parameters) are plain data here;
:mod:`jaxfed.run.build` hands them to the part, which checks them.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from jaxfed import checks
from jaxfed.run.environment import extra
from jaxfed.run.section import Section, boolean, count, fraction, free, key, number, optional, spec, string, subsection

NONE = "none"
"""How TOML, which has no null, writes None."""


class StopSection(Section, path="run.stop"):
    """[run.stop] names a metric, and ends the run when it no longer improves; :class:`jaxfed.EarlyStopping` has the rule.

    Attributes:
        metric: An evaluated one, as it is called in the history without ``eval_``: ``accuracy``, ``loss_worst_decile``.
        patience: How many evaluations in a row must be no better.
        tolerance: By how much one must be better.
        relative: Whether that is a fraction of the best.
    """

    metric: str = key(string)
    patience: int = key(count(at_least=1), default=1)
    tolerance: float = key(number(at_least=0), default=0.0)
    relative: bool = key(boolean, default=False)


class RunSection(Section, path="run"):
    """[run] says how long, from which seed, and where to.

    Attributes:
        rounds: How many rounds the finished run has, unless it stops early.
        seed: Decides every draw of the run; also of the data and the partition where these have no seed of their own.
        eval_every: Evaluate every so many rounds, and after the last; 0 only at the very end.
        checkpoint_every: Write a checkpoint every so many rounds, and after the last; by default at every evaluation.
        stop: When to stop early. What is reported of the test rows is honest if it watches others: ``data.valid_fraction``.
        best: By which evaluated metric the best model is kept among the checkpoints; by default that of ``stop``, if given.
        out: The run's folder; ``runs/`` and the name of the config file unless given.
    """

    rounds: int = key(count(at_least=1))
    seed: int = key(count(at_least=0, below=2**32), default=0)
    eval_every: int = key(count(at_least=0), default=10)
    checkpoint_every: int | None = key(optional(count(at_least=1)), default=None)
    stop: StopSection | None = subsection(StopSection, default=None)
    best: str | None = key(optional(string), default=None)
    out: str | None = key(optional(string), default=None)

    def __post_init__(self):
        super().__post_init__()
        for name in ("stop", "best"):
            if getattr(self, name) is not None and not self.eval_every:
                raise ValueError(f"run.{name}: expected a run that is evaluated, got run.eval_every = 0. Set it to 1 or more.")


class PartitionSection(Section, path="data.partition"):
    """[data.partition] names a partition and its options: how examples are dealt over clients."""

    name: str = key(string)
    options: dict[str, Any] = key(free, default=None)


class DataSection(Section, path="data"):
    """[data] names a data set and its options.

    Attributes:
        name: One of ``jaxfed list datasets``.
        partition: How examples are dealt over clients, where the data set does not bring its clients.
        test_fraction: The share of every client's rows that is kept for evaluation; 0 evaluates on the training rows.
        valid_fraction: The share of every client's training rows that is left aside for validation: ``run.stop`` and
            ``run.best`` watch those, and the test rows are only reported. Without it they choose by the test rows themselves.
        label_key: The array that the partition reads.
        options: Options of the data set.
    """

    name: str = key(string)
    partition: PartitionSection | None = subsection(PartitionSection, default=None)
    test_fraction: float = key(fraction, default=0.2)
    valid_fraction: float | None = key(optional(fraction), default=None)
    label_key: str = key(string, default="y")
    options: dict[str, Any] = key(free, default=None)


class ModelSection(Section, path="model"):
    """[model] names a model and its options."""

    name: str = key(string)
    options: dict[str, Any] = key(free, default=None)


class AlgorithmSection(Section, path="algorithm"):
    """[algorithm] names a recipe and its options, or without a name puts parts together.

    Attributes:
        name: One of ``jaxfed list algorithms``; None composes freely from the parts in ``options``.
        options: Those of the recipe; or ``client`` and ``server`` (Optimizers), ``batches``, ``aggregator``, ``gradient``.
    """

    name: str | None = key(optional(string), default=None)
    options: dict[str, Any] = key(free, default=None)


def _lanes(where: str, value: Any) -> int | str:
    return value if value == "auto" else count(at_least=1)(where, value)


class SimulationSection(Section, path="simulation"):
    """[simulation] says who takes part and how the work is laid out.

    Attributes:
        cohort_size: Clients drawn uniformly each round; None takes all of them.
        selector: How cohorts are chosen, instead of ``cohort_size``.
        lanes: Clients that run side by side on each device; None lets the simulation choose, ``"auto"`` measures.
        devices: How many devices take part; None takes all. On a CPU they are made, by default one for each core.
        paged: Whether data and what clients keep stay on the host; None decides by the devices' memory.
        chunk: The most rounds in one compiled call.
    """

    cohort_size: int | None = key(optional(count(at_least=1)), default=None)
    selector: Any = key(optional(spec), default=None)
    lanes: Any = key(optional(_lanes), default=None)
    devices: int | None = key(optional(count(at_least=1)), default=None)
    paged: bool | None = key(optional(boolean), default=None)
    chunk: int = key(count(at_least=1), default=10)


class RunConfig(Section):
    """A config has the sections run, data, model, algorithm and, if wanted, simulation.

    Raises:
        TypeError, ValueError: For unknown keys, wrong types and numbers out of range, with the path of the key.

    Example:
        >>> config = RunConfig.from_toml('''
        ... run = {rounds = 5}
        ... data = {name = "digits", partition = {name = "iid", clients = 10}}
        ... model = {name = "logistic-regression"}
        ... algorithm = {name = "fedavg", lrate = 0.1, batch_size = "none"}
        ... ''')
        >>> config.run.rounds, config.data.partition.options, config.algorithm.options["batch_size"]
        (5, {'clients': 10}, None)
        >>> RunConfig.from_toml(config.to_toml()) == config
        True
    """

    run: RunSection = subsection(RunSection)
    data: DataSection = subsection(DataSection)
    model: ModelSection = subsection(ModelSection)
    algorithm: AlgorithmSection = subsection(AlgorithmSection)
    simulation: SimulationSection = subsection(SimulationSection, default=SimulationSection())

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Self:
        """From nested tables of plain data."""
        return cls.of(table)

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """From the text of a TOML file; the text ``"none"`` stands for None."""
        return cls.from_dict(_read_toml(text))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """From the text of a JSON file, in which null is None."""
        try:
            return cls.from_dict(json.loads(text))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"The config is no JSON: {error}.") from None

    @classmethod
    def read(cls, path: str | Path, settings: Iterable[str] = ()) -> Self:
        """From a ``.toml`` or ``.json`` file.

        Args:
            path: The file; its name without the ending names the run's folder unless ``run.out`` is given.
            settings: ``key=value`` each, with a dotted key and a TOML value, which replace what the file says.
        """
        path = Path(path)
        try:
            text = path.read_text("utf-8")
            table = json.loads(text) if path.suffix == ".json" else _read_toml(text)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        for setting in settings:
            change(table, setting)
        if isinstance(table, dict) and isinstance(table.get("run"), dict):
            table["run"].setdefault("out", str(Path("runs", path.stem)))
        return cls.from_dict(table)

    def to_toml(self) -> str:
        """The text of a TOML file; None is written as ``"none"``."""
        with extra("Writing TOML"):
            import tomli_w
        return tomli_w.dumps(_without_none(self.to_dict()))

    def to_json(self) -> str:
        """The text of a JSON file."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


def change(table: Any, setting: str) -> None:
    """Applies one ``key=value`` to nested tables; the key is dotted, the value TOML, or a bare word for a text.

    >>> table = {"algorithm": {"name": "fedavg"}}
    >>> change(table, "algorithm.lrate=0.1")
    >>> change(table, "algorithm.name=fedprox")
    >>> table
    {'algorithm': {'name': 'fedprox', 'lrate': 0.1}}
    """
    path, equals, text = (part.strip() for part in setting.partition("="))
    keys = path.split(".")
    # A part's name in a list has no dotted key; such a list is set as a whole.
    if not equals or not all(keys):
        raise ValueError(f"--set {setting}: expected key=value with a dotted key, such as algorithm.lrate=0.1.")
    for depth, name in enumerate(keys[:-1]):
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            where = ".".join(keys[: depth + 1])
            raise ValueError(f"--set {setting}: {where} is {checks.describe(table)}, which has no keys. Set {where} itself.")
    table[keys[-1]] = _setting_value(setting, text)


def _read_toml(text: str) -> dict[str, Any]:
    try:
        return _with_none(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"The config is no TOML: {error}.") from None


def _setting_value(setting: str, text: str) -> Any:
    try:
        return _with_none(tomllib.loads(f"value = {text}")["value"])
    except tomllib.TOMLDecodeError as error:
        # Quotes around a bare word would have to be quoted again for the shell.
        if text and text[0] not in "[{\"'" and "\n" not in text:
            return None if text == NONE else text
        raise ValueError(f"--set {setting}: the value is no TOML: {error}.") from None


def _with_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_none(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_none(one) for one in value]
    return None if isinstance(value, str) and value == NONE else value


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_none(one) for one in value]
    if value == NONE:
        raise ValueError(f"The text {NONE!r} cannot be written to TOML, where it stands for None.")
    return NONE if value is None else value
