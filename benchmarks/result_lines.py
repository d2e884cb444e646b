"""Results as a file of lines of JSON, each whole or absent. Needs the standard library alone."""

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a last one that a kill cut short is dropped from it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "results.jsonl")
    ...     _ = path.write_text('{"a": 1}' + chr(10) + '{"a"')
    ...     before = read_lines(path)
    ...     append_line(path, {"a": 2})
    ...     before, read_lines(path)
    ([{'a': 1}], [{'a': 1}, {'a': 2}])
    """
    if not path.exists():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    path.write_text("".join(whole))
    return [json.loads(line) for line in whole]


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Adds a line."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
