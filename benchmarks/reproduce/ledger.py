"""The file of finished runs: a line of JSON each, so that a command that was killed goes on where it stopped."""

import json
from pathlib import Path

from .federation import Line, Run


def read(path: Path) -> list[Line]:
    """The finished runs; none if there is no file. What a killed process left of a line is dropped."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def append(path: Path, line: Line) -> None:
    """Adds a finished run, after whatever a killed process left of one was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def done(lines: list[Line], whole: bool) -> set[Run]:
    """Which runs of that form are finished."""
    return {Run(line["method"], line["setting"], line["seed"]) for line in lines if line["whole"] == whole}


def latest(lines: list[Line]) -> tuple[list[Line], bool]:
    """The lines to report, and whether they are whole runs: those once they are as many as the shortened ones."""
    whole, short = of_form(lines, True), of_form(lines, False)
    return (whole, True) if whole and len(whole) >= len(short) else (short, False)


def of_form(lines: list[Line], whole: bool) -> list[Line]:
    """The whole runs, or the shortened ones."""
    return [line for line in lines if line["whole"] == whole]
