"""The one table: ours beside the published or independently computed figure, as Markdown and as lines of JSON."""

import json
import statistics
from collections.abc import Iterable
from typing import Any

from .federation import Federation, Line, Results, Row
from .ledger import latest, of_form

Cells = dict[str, Any]
COLUMNS = ("federation", "method", "setting", "metric", "ours", "reference", "source", "rule", "holds", "remark")


def cells(federation: Federation, lines: list[Line], missing: list[str]) -> list[Cells]:
    """All rows of a federation.

    Args:
        federation: Whose.
        lines: Its finished runs.
        missing: The files that it needs and that are not there.
    """
    shown, whole = latest(lines)
    results, whole_results = Results(shown), Results(of_form(lines, True))
    note = "" if whole or not shown else "Shortened form."
    return [
        _cells(federation, row, row.values(whole_results if row.whole else results), missing, "" if row.whole else note)
        for row in federation.rows
    ]


def _cells(federation: Federation, row: Row, values: list[float], missing: list[str], note: str) -> Cells:
    if values:
        holds = "-" if row.rule.holds is None else ("yes" if row.rule.holds(values, row.reference) else "no")
    else:
        holds = "skipped" if missing else "not run"
        note = f"Needs {', '.join(missing)} below the data folder." if missing else "Not run here."
    return {
        "federation": federation.name,
        "method": row.method,
        "setting": f"{row.setting}, whole" if row.whole else row.setting,
        "metric": row.metric,
        "ours": statistics.fmean(values) if values else None,
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
        "reference": row.reference,
        "source": row.source,
        "rule": row.rule.text,
        "holds": holds,
        "remark": " ".join(text for text in (row.remark, note) if text),
    }


def page(federations: Iterable[Federation], rows: list[Cells], drawn: dict[str, str], more: dict[str, str]) -> str:
    """The table as a page of Markdown.

    Args:
        federations: All of them.
        rows: The cells of all their rows.
        drawn: Where the pictures are, by the federation's name.
        more: What else there is to say, likewise.
    """
    count = {word: sum(row["holds"] == word for row in rows) for word in ("yes", "no", "-", "not run", "skipped")}
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    body = ["| " + " | ".join(_shown(row, column) for column in COLUMNS) + " |" for row in rows]
    parts = ["# Real federations, ours beside the reference", _about(count), "\n".join(head + body), "## Federations"]
    for federation in federations:
        short = f" Shortened unless `--full`: {federation.short}" if federation.short else ""
        parts.append(f"**{federation.name}**: {federation.title}{short}")
        if federation.name in drawn:
            parts.append(f"![{federation.title}]({drawn[federation.name]})")
        if more.get(federation.name):
            parts.append(more[federation.name])
    return "\n\n".join(parts) + "\n"


def grid(corner: str, columns: list[str], lines: dict[str, list[str]]) -> str:
    """A small table as Markdown: a line for each name, with a text for each column.

    >>> print(grid("rule", ["none", "all"], {"mean": ["0.5", "0.1"]}))
    | rule | none | all |
    | --- | --- | --- |
    | mean | 0.5 | 0.1 |
    """
    rows = [[corner, *columns], ["---"] * (len(columns) + 1), *([name, *texts] for name, texts in lines.items())]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def jsonl(rows: list[Cells]) -> str:
    """The table as lines of JSON."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def _about(count: dict[str, int]) -> str:
    return (
        f"{count['yes']} rows hold, {count['no']} do not, {count['-']} are only shown, {count['not run']} were not run, "
        f"{count['skipped']} were skipped. Ours: mean ± standard deviation over seeds, and how many. "
        "Written by `python -m benchmarks.reproduce`; every run is a line of the files beside this one."
    )


def _shown(row: Cells, column: str) -> str:
    if column == "ours":
        return ours(row["ours"], row["spread"], row["seeds"])
    value = row[column]
    return figure(value) if isinstance(value, float) else ("" if value is None else str(value))


def ours(mean: float | None, spread: float | None, seeds: int) -> str:
    """A mean with its spread.

    >>> ours(0.68361, 0.0123, 3), ours(2.0, None, 1), ours(None, None, 0)
    ('0.684 ± 0.012 (3)', '2.00 (1)', '')
    """
    if mean is None:
        return ""
    if spread is None:
        return f"{figure(mean)} ({seeds})"
    decimals = max(len(figure(mean).partition(".")[2]), 0)
    return f"{figure(mean)} ± {spread:.{decimals}f} ({seeds})"


def figure(number: float) -> str:
    """Three significant digits, or three decimals below 1.

    >>> figure(0.68361), figure(0.0021), figure(43.8), figure(720.4), figure(-0.25)
    ('0.684', '0.002', '43.8', '720', '-0.250')
    """
    if abs(number) < 1:
        return f"{number:.3f}"
    return f"{number:.{max(0, 2 - len(str(int(abs(number)))) + 1)}f}"
