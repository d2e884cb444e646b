"""Learning curves of single clients: a NumPy array for each evaluation, one after the other in a file beside the history.

The array is ``[N]`` with a float32 field for each metric, NaN for a client without rows. The rounds are in the history.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxfed.reports import Evaluation
from jaxfed.run.history import GrowingFile, read_history

NAME = "client_curves.npy"


class ClientCurves(NamedTuple):
    """What each client was evaluated at, over the rounds.

    Attributes:
        rounds: ``[E]`` rounds done at each evaluation.
        metrics: By name ``[E, N]``.
    """

    rounds: np.ndarray
    metrics: dict[str, np.ndarray]


class CurvesFile(GrowingFile):
    """Curves that are being written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     curves = CurvesFile.cut(Path(folder, NAME), 0)
        ...     for loss in (2.0, 1.0):
        ...         curves.append(Evaluation.from_sums({"loss": [loss, 4.0, 0.0]}, np.array([1, 2, 0])))
        ...     _ = Path(folder, "history.jsonl").write_text('{"round": 1, "eval_loss": 2}\\n{"round": 2, "eval_loss": 1}\\n')
        ...     read_client_curves(folder).metrics["loss"]
        array([[ 2.,  2., nan],
               [ 1.,  2., nan]], dtype=float32)
    """

    def append(self, evaluation: Evaluation) -> None:
        """Adds an evaluation."""
        columns = evaluation.by_client
        record = np.empty(len(evaluation.examples), [(name, "<f4") for name in columns])
        for name, values in columns.items():
            record[name] = values
        content = io.BytesIO()
        np.save(content, record)
        self.add(content.getvalue())


def read_client_curves(folder: str | Path) -> ClientCurves:
    """The curves in a run's folder.

    Args:
        folder: The run's folder; a run that is under way may be read.

    Raises:
        ValueError: If the folder is that of no run, nothing was evaluated yet, or the file is damaged.
    """
    folder = Path(folder)
    history = read_history(folder / "history.jsonl")
    rounds = [row["round"] for row in history if any(name.startswith("eval_") for name in row)]
    records = _records(folder / NAME, len(rounds)) if rounds else []
    if not records:
        raise ValueError(f"The run {folder} was not evaluated yet; run.eval_every says when it is.")
    stacked = np.stack(records)
    names = stacked.dtype.names or ()
    return ClientCurves(np.array(rounds), {name: stacked[name] for name in names})


def _records(path: Path, count: int) -> list[np.ndarray]:
    """The first ``count``: the history gets its row when the file has the record."""
    try:
        with open(path, "rb") as file:
            return [np.load(file, allow_pickle=False) for _ in range(count)]
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} was cut short or altered: {error}.") from None
