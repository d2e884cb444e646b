"""What the command prints: tables and a progress bar."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from jaxfed.profiling import Profile
from jaxfed.reports import Evaluation
from jaxfed.run.history import Row
from jaxfed.run.listing import Entry

_MOST_CLIENTS = 200
_COLUMNS = {"global": "", "client mean": "_client_mean", "worst decile": "_worst_decile"}
_ENDINGS = tuple(ending for ending in _COLUMNS.values() if ending)


@contextlib.contextmanager
def progress(console: Console, done: int, rounds: int) -> Iterator[Callable[[list[Row]], None]]:
    """A progress bar over rounds; gives a function that takes each call's rows."""
    columns = (TextColumn("[bold]rounds"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("compiling", total=rounds, completed=done)
        seen: dict[str, float] = {}

        def advance(rows: list[Row]) -> None:
            for row in rows:
                seen.update({name: row[name] for name in ("eval_accuracy", "loss") if row.get(name) is not None})
            names = {"eval_accuracy": "accuracy", "loss": "training loss"}
            text = "  ".join(f"{names[name]} {number(seen[name])}" for name in names if name in seen)
            bar.update(task, completed=rows[-1]["round"], description=text)

        yield advance


@contextlib.contextmanager
def settings(console: Console, count: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over the settings of a sweep; gives a function that takes how many are done."""
    with Progress(TextColumn("[bold]settings"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("", total=count)
        yield lambda done: bar.update(task, completed=done)


def sweep(rows: list[Row], title: str) -> Table:
    """A row for each setting: its values, the loss and what was evaluated, over all rows; with seeds, mean and deviation."""
    names = [name for name in rows[0] if not name.removesuffix("_std").endswith((*_ENDINGS, "update_norm"))]
    hidden = ("round", "clients", "examples", "steps")
    names = [name for name in names if not name.endswith("_std") and name not in hidden]
    table = _table(title)
    for name in names:
        table.add_column(name.removeprefix("eval_") if name != "loss" else "training loss", justify="right")
    for row in rows:
        spreads = [row.get(f"{name}_std") for name in names]
        table.add_row(*(number(row[n]) + (f" ± {number(s)}" if s is not None else "") for n, s in zip(names, spreads)))
    return table


def profile(found: Profile) -> list[Any]:
    """Where a round's time goes, what it computes, and what limits it."""
    times = _table("Where a round's time goes")
    times.add_column("part")
    times.add_column("seconds", justify="right")
    times.add_column("share", justify="right")
    times.caption = f"Medians, {found.rounds} rounds at a time"
    whole = sum(found.seconds.values()) or 1.0
    for name, seconds in found.seconds.items():
        times.add_row(name, number(seconds), f"{seconds / whole:.0%}")
    times.add_row("a whole round", number(found.round_seconds), "", style="bold")
    once = {"one evaluation": found.evaluation_seconds, "placing the data": found.placing["seconds"]}
    for name, seconds in {**once, **{f"compiling: {name}": seconds for name, seconds in found.compiling.items()}}.items():
        times.add_row(name, number(seconds), "")
    facts = _table("What it computes")
    facts.add_column("quantity")
    facts.add_column("value", justify="right")
    for name, value in _facts(found).items():
        facts.add_row(name, value)
    sentences = dict.fromkeys((found.round_limit, found.limit))
    return [times, facts, "\n".join(sentences)]


def _facts(found: Profile) -> dict[str, str]:
    setting, work = found.setting, found.work
    facts = {
        "devices": f"{setting['devices']} ({setting['device']}), {setting['lanes']} lanes each",
        "local steps of a round": f"{number(work.steps)}; most on one device {number(work.longest)}",
        "largest over mean of the devices' steps": number(work.imbalance),
        "share of the lanes' steps that train": f"{work.used:.0%}",
        "operations: a local step, a round": f"{number(found.step.flops)}, {number(found.cost.flops)}",
        "bytes accessed: a local step, a round": f"{number(found.step.bytes)}, {number(found.cost.bytes)}",
        "operations a second, of the peak": f"{found.flops_fraction:.1%} of {number(found.peak.flops)}",
        "bytes a second, of the peak": f"{found.bytes_fraction:.1%} of {number(found.peak.bytes)}",
    }
    facts |= {f"{kind} in a round": f"{one.count}, {one.bytes} bytes" for kind, one in found.collectives.items()}
    memory = {name: size for name, size in found.memory.items() if size is not None}
    return facts | {f"memory, {name}": f"{size / 2**20:.1f} MiB" for name, size in memory.items()}


def results(evaluation: Evaluation, title: str) -> Table:
    """A row for each metric: over all rows, the mean over clients, and the worst decile of the clients."""
    row = evaluation.row()
    table = _table(title)
    table.add_column("metric")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for name in sorted(evaluation.metrics, key=lambda name: (name.endswith("loss"), name)):
        table.add_row(name, *(number(row[name + ending]) for ending in _COLUMNS.values()))
    return table


def clients(evaluation: Evaluation, path: Path) -> Table:
    """A row for each client; of very many only the first, the file has all."""
    rows = evaluation.table()
    more = f", the first {_MOST_CLIENTS} of {len(rows)}" if len(rows) > _MOST_CLIENTS else ""
    table = _table(f"Results by client{more}")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows[:_MOST_CLIENTS]:
        table.add_row(*(number(value) for value in row.values()))
    table.caption = f"All in {path}"
    return table


def listing(kind: str, entries: list[Entry]) -> Table:
    """Names with their options and defaults."""
    table = _table(kind)
    table.add_column("name", no_wrap=True)
    table.add_column("options and defaults", ratio=2)
    table.add_column("what it is", ratio=3)
    for entry in entries:
        options = "\n".join(f"{name} = {default}" for name, default in entry.options.items())
        table.add_row(entry.name, options, entry.summary)
    return table


def number(value: float) -> str:
    """A number in four digits; a dash for one that is missing.

    >>> number(0.96241), number(12), number(float("nan"))
    ('0.9624', '12', '-')
    """
    if isinstance(value, int):
        return str(value)
    return f"{value:.4g}" if math.isfinite(value) else "-"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", caption_justify="left", box=box.SIMPLE_HEAD)
