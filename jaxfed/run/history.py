"""The history of a run: a line of JSON for each round, without clock times, so that equal runs write equal bytes."""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np

from jaxfed import files
from jaxfed.reports import Evaluation, RoundReport

DECILES = tuple(range(10, 100, 10))
Row = dict[str, Any]


def row_of(report: RoundReport, valid: Evaluation | None = None) -> Row:
    """A round as plain data: :meth:`RoundReport.row`, and where it was evaluated the deciles over clients of each metric.

    Numbers that are not finite become None, which JSON has and NaN it has not.

    Args:
        report: The round.
        valid: The new model's evaluation on the validation rows, whose metrics begin with ``valid_``.

    Example:
        >>> metrics = {"examples": np.ones(2), "steps": np.ones(2), "loss": np.array([1.0, np.nan])}
        >>> row = row_of(RoundReport(1, np.arange(2), np.array([True, True]), metrics, update_norm=0.5))
        >>> row["examples"], row["loss"], row["update_norm"]
        (2, None, 0.5)
    """
    evaluation = report.evaluation
    deciles = {} if evaluation is None else {f"eval_{k}_deciles": _deciles(x) for k, x in evaluation.by_client.items()}
    validated = {} if valid is None else {f"valid_{name}": value for name, value in valid.row().items()}
    return _finite(report.row() | deciles | validated)


def line_of(row: Row) -> str:
    """A row as a line of JSON. Floats are written with all their digits.

    >>> line_of({"round": 1, "loss": 0.1 + 0.2})
    '{"round": 1, "loss": 0.30000000000000004}\\n'
    """
    return json.dumps(row, allow_nan=False) + "\n"


class GrowingFile:
    """A file to which a run adds at the end, and which goes back to what it was at a checkpoint.

    Attributes:
        path: The file.
        size: Its bytes.
    """

    def __init__(self, path: Path):
        self.path = path
        content = path.read_bytes()
        self.size, self._hash = len(content), hashlib.sha256(content)

    @property
    def mark(self) -> dict[str, Any]:
        """Its size and digest: to be kept with a checkpoint, for :meth:`cut` and :func:`check_mark`."""
        return {"size": self.size, "digest": self._hash.hexdigest()}

    def add(self, content: bytes) -> None:
        """Adds bytes at the end and flushes them to the disk."""
        # Not by write(): a history of many rounds would be copied each time. What a kill cuts is cut off at resume.
        with open(self.path, "ab") as file:
            file.write(content)
            files.flush(file)
        self.size += len(content)
        self._hash.update(content)

    @classmethod
    def cut(cls, path: Path, size: int) -> Self:
        """Opens a file after removing what follows its first ``size`` bytes: rounds that no checkpoint holds."""
        content = path.read_bytes() if path.exists() else b""
        if len(content) > size:
            files.write(path, content[:size])
        elif not path.exists():
            files.write(path, b"")
        return cls(path)


class HistoryFile(GrowingFile):
    """A history that is being written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "history.jsonl")
        ...     history = HistoryFile.cut(path, 0)
        ...     history.append([{"round": 1}])
        ...     mark = history.mark
        ...     history.append([{"round": 2}])
        ...     _ = HistoryFile.cut(path, mark["size"])
        ...     read_history(path)
        [{'round': 1}]
    """

    def append(self, rows: Iterable[Row]) -> None:
        """Adds rows."""
        self.add("".join(map(line_of, rows)).encode())


def check_mark(path: Path, mark: dict[str, Any]) -> None:
    """Raises ValueError unless a file that grows begins with the bytes that it had at a checkpoint."""
    content = path.read_bytes() if path.exists() else b""
    if len(content) < mark["size"]:
        raise ValueError(f"{path} was cut short: expected {mark['size']} bytes or more, got {len(content)}.")
    if hashlib.sha256(content[: mark["size"]]).hexdigest() != mark["digest"]:
        raise ValueError(f"{path} was altered.")


def read_history(path: str | Path) -> list[Row]:
    """The rows of a history, with NaN where a number was not finite.

    A last line without its end is left out: its run was killed, or writes on.

    Raises:
        ValueError: If a line is no row, with its number.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "history.jsonl")
        ...     _ = path.write_text('{"round": 1, "loss": null}\\n{"round": 2, "lo')
        ...     read_history(path)
        [{'round': 1, 'loss': nan}]
    """
    path = Path(path)
    try:
        # splitlines() would also split at characters that JSON allows inside a text.
        lines = path.read_text("utf-8").split("\n")[:-1]
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}, the history of a run.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} was altered: {error}.") from None
    return [_row(f"{path}, line {number}", line, number) for number, line in enumerate(lines, 1)]


def column(rows: list[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """The rounds ``[n]`` whose rows have this column, and its values ``[n]`` or ``[n, ...]``.

    >>> column([{"round": 1}, {"round": 2, "loss": 0.5}], "loss")
    (array([2]), array([0.5]))
    """
    chosen = [row for row in rows if name in row]
    return np.array([row["round"] for row in chosen], int), np.array([row[name] for row in chosen], float)


def _deciles(values: np.ndarray) -> list[float]:
    values = values[~np.isnan(values)]
    return np.percentile(values, DECILES).tolist() if len(values) else [math.nan] * len(DECILES)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(where: str, line: str, number: int) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no row of a history: {error}.") from None
    if not isinstance(row, dict) or row.get("round") != number:
        raise ValueError(f"{where} was altered: expected the row of round {number}, got {line[:60]!r}.")
    return {key: _nan(f"{where}, {key}", value) for key, value in row.items()}


def _nan(where: str, value: Any) -> Any:
    if value is None:
        return math.nan
    if isinstance(value, list):
        return [_nan(where, one) for one in value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}: expected a number, null or a list of them, got {value!r}.")
    return value
