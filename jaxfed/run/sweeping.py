"""A sweep in its folder: setting by setting, killed at any moment and gone on with by the same command.

=================  ==================================================================
``config.toml``    the settings that all have in common, with everything resolved
``sweep.json``     what varies, and digests of config and data
``settings/``      a file for each finished setting: its values and its history
``history.csv``    a line for each round of each setting
``sweep.png``      a line for each setting, a band over its seeds
``results.csv``    a line for each setting; its presence says that the sweep is done
=================  ==================================================================
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax

from jaxfed import files
from jaxfed.hyperparameters import Setting, settings_of
from jaxfed.run import build
from jaxfed.run.config import RunConfig
from jaxfed.run.environment import environment
from jaxfed.run.folder import config_digest
from jaxfed.run.history import Row, row_of
from jaxfed.run.sweep_plots import save_sweep_curves
from jaxfed.side_by_side import runs_of
from jaxfed.sweep import all_rows, final_rows, outcomes, summary, to_csv

_WHAT = "which says what the sweep varies"


class SweepRun(NamedTuple):
    """A sweep that can be gone on with.

    Attributes:
        path: The folder.
        config: What all settings have in common.
        built: What the config names.
        settings: What varies.
    """

    path: Path
    config: RunConfig
    built: build.Built
    settings: list[Setting]

    @classmethod
    def start(cls, config: RunConfig, over: Iterable[str], path: Path) -> Self:
        """Makes the folder, or opens one of the same sweep.

        Raises:
            TypeError, ValueError, OSError: Before anything is written; also if the folder holds another sweep, or a finished one.
        """
        _refuse_watching(config)
        config = build.resolved(config)
        built, settings = build.build(config), settings_of(axes_of(over))
        runs_of(built.simulation, settings, config.run.seed)
        build.check_round(built.simulation, built.simulation.init(key=jax.random.key(config.run.seed)))
        found = cls(path, config, built, settings)
        if path.exists():
            found._check()
            return found
        origin = found._origin() | {"environment": environment()}
        with files.new_folder(path) as partial:
            files.write(partial / "config.toml", config.to_toml())
            files.write(partial / "sweep.json", json.dumps(origin, indent=1))
            (partial / "settings").mkdir()
        return found

    def train(self, at_once: int | None = None) -> Iterator[int]:
        """Trains the settings that are missing and yields how many are done, each time when the disk has them."""
        run = self.config.run
        with files.locked(self.path / ".lock", f"Another process is writing to {self.path}. Wait until it has ended."):
            files.sweep_partials(self.path / "settings")
            missing = [i for i in range(len(self.settings)) if not self._file(i).exists()]
            options = {"rounds": run.rounds, "eval_every": run.eval_every or run.rounds, "eval_data": self.built.test}
            if missing:
                chosen = [self.settings[i] for i in missing]
                found = outcomes(self.built.simulation, chosen, seed=run.seed, at_once=at_once, **options)
                for done, (place, outcome) in enumerate(found, len(self.settings) - len(missing) + 1):
                    rows = [row_of(report) for report in outcome.history]
                    content = {"setting": chosen[place], "history": rows}
                    files.write(self._file(missing[place]), json.dumps(content, allow_nan=False))
                    yield done

    def finish(self) -> list[Row]:
        """Writes tables and picture, and returns a row for each setting, seeds taken together."""
        histories = [self._read(i) for i in range(len(self.settings))]
        rows = final_rows(self.settings, histories)
        files.write(self.path / "history.csv", to_csv(all_rows(self.settings, histories)))
        save_sweep_curves(self.settings, histories, self.path / "sweep.png")
        files.write(self.path / "results.csv", to_csv(rows))
        return summary(rows, list(self.settings[0]))

    def _origin(self) -> dict[str, Any]:
        digests = {"config": config_digest(self.config), "data": self.built.digest}
        return digests | {"rounds": self.config.run.rounds, "settings": self.settings}

    def _check(self) -> None:
        if not (self.path / "sweep.json").is_file():
            raise FileExistsError(f"{self.path} exists already and holds no sweep. Choose another folder with  --out FOLDER.")
        origin = files.read_json(self.path / "sweep.json", _WHAT)
        for name, value in self._origin().items():
            if origin.get(name) != value:
                raise ValueError(f"{self.path} holds a sweep whose {name} differ. Choose another folder with  --out FOLDER.")
        if (self.path / "results.csv").exists():
            raise ValueError(
                f"The sweep {self.path} is finished; see {self.path / 'results.csv'}. For another give  --out FOLDER."
            )

    def _file(self, number: int) -> Path:
        return self.path / "settings" / f"{number:06d}.json"

    def _read(self, number: int) -> list[Row]:
        content = files.read_json(self._file(number), "a setting's history")
        if content.get("setting") != self.settings[number] or not isinstance(content.get("history"), list):
            raise ValueError(f"{self._file(number)}, a setting's history, was altered. Remove it and give the command again.")
        # JSON has null where a number was not finite.
        return [{key: float("nan") if x is None else x for key, x in row.items()} for row in content["history"]]


def axes_of(over: Iterable[str]) -> dict[Any, list[Any]]:
    """What ``--over`` says: ``name=value,value``, ``name=first:end`` for integers, ``name/name=value/value,...`` side by side.

    Raises:
        ValueError: For another form, with the argument.

    >>> axes_of(["client.lrate=0.1,1", "seed=0:3", "mu/server.lrate=0.5/1,0/2"])
    {'client.lrate': [0.1, 1], 'seed': [0, 1, 2], ('mu', 'server.lrate'): [(0.5, 1), (0, 2)]}
    """
    axes: dict[Any, list[Any]] = {}
    for argument in over:
        names, equals, text = (part.strip() for part in argument.partition("="))
        try:
            values = [tuple(_number(one) for one in item.split("/")) for item in text.split(",")] if ":" not in text else None
            single = list(range(*map(int, text.split(":")))) if values is None else [value[0] for value in values]
        except (TypeError, ValueError):
            equals = ""
        if not equals or not names or ("/" in names and values is None) or names in axes:
            forms = "name=0.1,0.3 or seed=0:8 or name/name=0.1/1,0.3/2"
            raise ValueError(f"--over {argument}: expected numbers as in {forms}, each name once.")
        if "/" in names:
            axes[tuple(names.split("/"))] = values  # type: ignore[assignment]
        else:
            axes[names] = single
    return axes


def _refuse_watching(config: RunConfig) -> None:
    for name in ("stop", "best"):
        if getattr(config.run, name) is not None:
            reason = "A sweep trains its settings side by side to the same round, and keeps their histories only. Leave it out."
            raise ValueError(f"run.{name}: expected none for a sweep. {reason}")
    if config.data.valid_fraction:
        raise ValueError(
            "data.valid_fraction: expected none for a sweep, which has nothing that watches validation rows. Leave it out."
        )


def _number(text: str) -> float | int:
    try:
        return int(text)
    except ValueError:
        return float(text)
