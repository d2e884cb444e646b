"""Real federations, ours beside the published figures:  ``python -m benchmarks.reproduce`` from the project's folder.

Trains what has not been trained, then writes ``table.md`` and ``table.jsonl`` beside the results, and a picture for each
federation. A finished run is a line of ``NAME.jsonl`` and is not run again; stopped at any moment, the command goes on there.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import jax

import jaxfed
from jaxfed.run.environment import make_devices

from . import ledger, pictures, table
from .data import ROOT, data_folder
from .federation import Federation, Results
from .federations import FEDERATIONS

RESULTS, PICTURES = ROOT / "benchmarks/results/reproduce", ROOT / "docs/reproduce"


def main(words: list[str] | None = None) -> None:
    """Trains and reports."""
    given = _parser().parse_args(words)
    folder = data_folder(given.data)
    for federation in chosen(given.only):
        if not given.report:
            train(federation, folder, given.results, given.full)
    report(folder, given.results, given.pictures)


def chosen(names: str | None) -> list[Federation]:
    """The federations named, in their own order; all without names."""
    if names is None:
        return list(FEDERATIONS)
    wanted, known = names.split(","), [federation.name for federation in FEDERATIONS]
    for name in wanted:
        if name not in known:
            raise SystemExit(f"There is no federation {name!r}. Known: {', '.join(known)}.")
    return [federation for federation in FEDERATIONS if federation.name in wanted]


def train(federation: Federation, folder: Path, results: Path, full: bool) -> None:
    """Trains the runs that are not finished; none where data are missing."""
    if missing := federation.missing(folder):
        print(f"{federation.name}: skipped, no {', '.join(missing)} in {folder}", flush=True)
        return
    path, whole = results / f"{federation.name}.jsonl", federation.whole(full)
    finished = ledger.done(ledger.read(path), whole)
    left = [run for run in federation.runs if run not in finished]
    for number, run in enumerate(left):
        begin = time.perf_counter()
        numbers = federation.train(run, folder, whole)
        seconds = time.perf_counter() - begin
        line = {**run._asdict(), "whole": whole, "numbers": numbers, "seconds": round(seconds, 2), **_environment()}
        ledger.append(path, line)
        shown = {name: round(x, 4) for name, x in numbers.items() if isinstance(x, float)}
        print(f"{federation.name} {number + 1}/{len(left)} {' '.join(map(str, run))}: {shown} ({seconds:.0f} s)", flush=True)


def report(folder: Path, results: Path, picture_folder: Path) -> None:
    """Writes the table and the pictures from all finished runs."""
    rows, more = [], {}
    for federation in FEDERATIONS:
        lines = ledger.read(results / f"{federation.name}.jsonl")
        rows += table.cells(federation, lines, federation.missing(folder))
        if lines:
            shown = Results(ledger.latest(lines)[0])
            more[federation.name] = federation.more(shown)
            pictures.save(federation.title, federation.draw, shown, picture_folder / f"{federation.name}.png")
    results.mkdir(parents=True, exist_ok=True)
    files = {federation.name: picture_folder / f"{federation.name}.png" for federation in FEDERATIONS}
    drawn = {name: os.path.relpath(path, results) for name, path in files.items() if path.exists()}
    (results / "table.md").write_text(table.page(FEDERATIONS, rows, drawn, more))
    (results / "table.jsonl").write_text(table.jsonl(rows))
    print(results / "table.md")


def _environment() -> dict[str, Any]:
    devices = {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}
    return {"jaxfed": jaxfed.__version__, "jax": jax.__version__, **devices}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME,...", help="some of: " + ", ".join(one.name for one in FEDERATIONS))
    parser.add_argument("--full", action="store_true", help="whole runs where the default is a shortened form")
    parser.add_argument("--report", action="store_true", help="only write table and pictures from the finished runs")
    parser.add_argument("--data", help="the folder of data sets; else JAXFED_DATA")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    return parser


if __name__ == "__main__":
    make_devices(None)
    main()
