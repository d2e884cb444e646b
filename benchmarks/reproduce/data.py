"""Where data lie: a folder given by an option or the variable JAXFED_DATA, or one beside the project."""

import os
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def data_folder(given: str | None = None) -> Path:
    """The folder that holds a folder for each data set; it need not exist."""
    return Path(given or os.environ.get("JAXFED_DATA") or ROOT.parent / "shared" / "data")


def arrays(path: Path, *names: str) -> list[np.ndarray]:
    """Some arrays of an ``.npz`` file."""
    with np.load(path, allow_pickle=False) as archive:
        return [archive[name] for name in names]
