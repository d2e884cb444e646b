"""The run folder: everything of one run under fixed names.

=====================  ==========================================================================================
``config.toml``        the settings with everything resolved (seeds, lanes, absolute paths); runs again as it is
``run.json``           digests of settings and data, versions and machine
``history.jsonl``      a line for each round, the same bytes whenever the run is repeated
``client_curves.npy``  what each client was evaluated at, a NumPy array for each evaluation, one after the other
``timings.jsonl``      what took how long
``checkpoints/``       the newest two states, the best one, and a journal of what clients keep where that is large
``clients.csv``        the final model's results, a line for each client
``result.json``        the final results; its presence says that the run is finished
``curves.png``         the history as a picture
=====================  ==========================================================================================
"""

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple, Self

from jaxfed import files
from jaxfed.run import client_curves
from jaxfed.run.config import RunConfig
from jaxfed.run.environment import environment

_WHAT = "which says how the run was started"


class RunFolder(NamedTuple):
    """An existing run folder.

    Attributes:
        path: Where it is.
        config: The resolved settings.
        origin: What ``run.json`` holds: digests and the environment in which the run began.
    """

    path: Path
    config: RunConfig
    origin: dict[str, Any]

    @classmethod
    def create(cls, path: str | Path, config: RunConfig, data_digest: str) -> Self:
        """Makes the folder, whole or not at all.

        Raises:
            FileExistsError: If there is one already.
            OSError: If it cannot be written.
        """
        path = Path(path)
        origin = {"config": config_digest(config), "data": data_digest, "environment": environment()}
        origin["digest"] = files.digest_of(origin)
        try:
            with files.new_folder(path) as partial:
                files.write(partial / "config.toml", config.to_toml())
                files.write(partial / "run.json", json.dumps(origin, indent=1))
                files.write(partial / "history.jsonl", b"")
                files.write(partial / client_curves.NAME, b"")
        except FileExistsError:
            remedy = f"Go on with  jaxfed resume {path}  or choose another folder with  --set run.out=FOLDER."
            raise FileExistsError(f"The run folder {path} exists already. {remedy}") from None
        except OSError as error:
            raise OSError(f"The run folder {path} cannot be made: {error.strerror}.") from error
        return cls(path, config, origin)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Opens a folder that :meth:`create` made.

        Raises:
            ValueError: If it is no run folder, or its settings were altered.
        """
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"There is no run folder {path}.")
        if not (path / "config.toml").is_file():
            raise ValueError(f"{path} is not a run folder: it has no config.toml.")
        origin = files.read_json(path / "run.json", _WHAT)
        if origin.pop("digest", None) != files.digest_of(origin):
            raise ValueError(f"{path / 'run.json'}, {_WHAT}, was altered.")
        config = RunConfig.read(path / "config.toml")
        # Other settings would give a run that is neither the old one nor a new one.
        if config_digest(config) != origin["config"]:
            remedy = f"Undo the change, or start anew with  jaxfed run {path / 'config.toml'} --set run.out=FOLDER."
            raise ValueError(f"{path / 'config.toml'} was changed since the run began. {remedy}")
        return cls(path, config, origin)

    @property
    def history(self) -> Path:
        """The history file."""
        return self.path / "history.jsonl"

    @property
    def curves(self) -> Path:
        """The file of the clients' curves."""
        return self.path / client_curves.NAME

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Keeps other processes from writing to the folder.

        Raises:
            BlockingIOError: If one does.
        """
        return files.locked(self.path / ".lock", f"Another process is writing to {self.path}. Wait until it has ended.")

    def with_rounds(self, rounds: int) -> Self:
        """The folder after its settings were rewritten to another number of rounds."""
        config = RunConfig.from_dict(self.config.to_dict() | {"run": self.config.run.to_dict() | {"rounds": rounds}})
        files.write(self.path / "config.toml", config.to_toml())
        return self._replace(config=config)

    def finished_rounds(self) -> int | None:
        """The rounds of the finished run, None while there is no result."""
        path = self.path / "result.json"
        return files.read_json(path, "the run's result").get("rounds") if path.exists() else None


def config_digest(config: RunConfig) -> str:
    """Identifies all settings but how long the run is, with its patience, and where it lies: these may change on the way.

    Args:
        config: The resolved settings.
    """
    table = config.to_dict()
    table["run"] = {key: value for key, value in table["run"].items() if key not in ("rounds", "out")}
    # By this metric the best model is kept, so it stays.
    if (stop := config.run.stop) is not None:
        table["run"]["stop"] = stop.metric
    return files.digest_of(table)
