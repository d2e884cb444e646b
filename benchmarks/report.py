"""A table and a figure of a sweep:  ``benchmarks/.venvs/jaxfed/bin/python benchmarks/report.py results/NAME.jsonl``.

Writes ``NAME.md`` and ``NAME.png`` beside the results. A ratio is the peer's seconds over ours in the same sweep; its median over
the sweeps and its range are given.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OURS = "jaxfed"
TITLES = {
    "W1": "W1 logistic regression, 100 of 1000 clients",
    "W2": "W2 EMNIST CNN, 20 of 300 clients",
    "W3": "W3 char-LSTM, 10 of 100 clients",
}
PANELS = (("round_s", "Seconds a round"), ("memory", "Peak memory, MB"), ("first_round_s", "Seconds to the first new model"))
Line = dict[str, Any]
Group = dict[str, list[Line]]
"""The lines of one workload and algorithm by label."""


def read(path: Path) -> list[Line]:
    """The lines of a file of results; failed runs too."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def grouped(lines: list[Line]) -> dict[tuple[str, str], Group]:
    """Successful runs by workload and algorithm, then by label, fastest first."""
    groups: dict[tuple[str, str], Group] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if "error" not in line:
            groups[line["workload"], line["algorithm"]][line["label"]].append(line)
    return {
        key: dict(sorted(group.items(), key=lambda item: middle(item[1], "round_s"))) for key, group in sorted(groups.items())
    }


def middle(lines: list[Line], key: str) -> float:
    """The median over sweeps."""
    return statistics.median(value(line, key) for line in lines)


def value(line: Line, key: str) -> float:
    """An entry; memory is shared out between processes where there are many."""
    return line.get("pss_mb", line["rss_mb"]) if key == "memory" else line[key]


def ratios(lines: list[Line], ours: list[Line], of: Callable[[Line], float]) -> list[float]:
    """A peer's ``of`` over ours, sweep by sweep."""
    base = {line["sweep"]: of(line) for line in ours}
    return [of(line) / base[line["sweep"]] for line in lines if line["sweep"] in base]


def spread(numbers: list[float]) -> str:
    """Median and range.

    >>> spread([1.0, 2.0, 4.0])
    '2.00 (1.00 - 4.00)'
    """
    if not numbers:
        return "-"
    return f"{figure(statistics.median(numbers))} ({figure(min(numbers))} - {figure(max(numbers))})"


def figure(number: float) -> str:
    """Three significant digits.

    >>> figure(0.00512), figure(12.3), figure(1234.0)
    ('0.00512', '12.3', '1234')
    """
    if number >= 1000:
        return f"{number:.0f}"
    return f"{number:#.3g}".rstrip(".")


def table(group: Group) -> str:
    """One workload and algorithm as Markdown."""
    head = ("who", "s/round", "times ours", "s/round, 10 in a call", "first round s", "memory MB", "examples/s", "loss", "sweeps")
    rows = [head, ("---",) + ("---:",) * (len(head) - 1)]
    for label, lines in group.items():
        ratio = ratios(lines, group.get(OURS, []), lambda line: line["round_s"])
        chunked = [line["chunked_round_s"] for line in lines if line.get("chunked_round_s")]
        cells = [label, spread([line["round_s"] for line in lines]), spread(ratio), spread(chunked)]
        cells += [figure(middle(lines, key)) for key in ("first_round_s", "memory", "examples_per_s")]
        rows.append((*cells, f"{middle(lines, 'loss'):.4f}", str(len(lines))))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def against_fedavg(groups: dict[tuple[str, str], Group]) -> str:
    """What our other algorithms cost beside our FedAvg, sweep by sweep."""
    base = groups.get(("W1", "fedavg"), {}).get(OURS, [])
    rows = ["| algorithm | times our FedAvg |", "| --- | ---: |"]
    for (workload, algorithm), group in groups.items():
        if workload == "W1" and algorithm != "fedavg" and OURS in group:
            rows.append(f"| {algorithm} | {spread(ratios(group[OURS], base, lambda line: line['round_s']))} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def page(lines: list[Line], picture: str) -> str:
    """The whole page."""
    groups = grouped(lines)
    parts = [f"# {picture.removesuffix('.png')}", f"![Seconds a round, memory and first round by peer]({picture})", about(lines)]
    for (workload, algorithm), group in groups.items():
        parts += [f"## {TITLES[workload]}, {algorithm}", table(group)]
    if costs := against_fedavg(groups):
        parts += ["## Our algorithms beside our FedAvg, W1", costs]
    failed = [
        f"- sweep {line['sweep']}, {line['label']}, {line['workload']}, {line['algorithm']}" for line in lines if "error" in line
    ]
    parts += ["## Failed runs", "\n".join(failed)] if failed else []
    return "\n\n".join(parts) + "\n"


def about(lines: list[Line]) -> str:
    """Machine, versions, and how to read the numbers."""
    good = [line for line in lines if "error" not in line]
    machines = sorted({f"{m['cpu']}, {m['cores']} cores, {m['memory_gb']} GB" for m in (line["machine"] for line in good)})
    versions = {name: version for line in good for name, version in line["versions"].items()}
    shown = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return (
        f"Machine: {'; '.join(machines)}. Versions: {shown}.\n\n"
        "Medians over sweeps, with the range in brackets; a run's number is the median of its rounds without the first three. "
        "Memory is the peak of the process, for many processes that of all with shared pages shared out. "
        "The first round counts from the start of the process. Loss: mean over 2000 fixed examples after the last round."
    )


def draw(lines: list[Line], path: Path) -> None:
    """FedAvg on all workloads: a row each, a panel for each quantity, a dot for each sweep."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    groups = {key: group for key, group in grouped(lines).items() if key[1] == "fedavg"}
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        height = 0.7 + sum(0.75 + 0.27 * len(group) for group in groups.values())
        picture = Figure(figsize=(11, height), dpi=150, layout="constrained")
        sizes = [2 + len(group) for group in groups.values()]
        axes = picture.subplots(len(groups), len(PANELS), squeeze=False, height_ratios=sizes)
        for row, ((workload, _), group) in zip(axes, groups.items()):
            for panel, (key, title) in zip(row, PANELS):
                _bars(panel, group, key)
                panel.set_title(title if panel is not row[0] else f"{TITLES[workload]}\n{title}", loc="left", fontsize=9.5)
        machine = next(line["machine"] for line in lines if "error" not in line)
        note = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB. Bars: medians; dots: sweeps. Logarithmic."
        picture.supxlabel(note, x=0.01, ha="left", fontsize=8, color="#555555")
        picture.savefig(path)


def _bars(panel: Any, group: Group, key: str) -> None:
    """Horizontal bars from fastest to slowest, ours in colour, each with its number."""
    places = range(len(group))
    medians = [middle(lines, key) for lines in group.values()]
    colors = ["#d55e00" if label.startswith(OURS) else "#8fb3cf" for label in group]
    panel.barh(places, medians, color=colors, height=0.72)
    for place, lines, median in zip(places, group.values(), medians):
        values = [value(line, key) for line in lines]
        panel.plot(values, [place] * len(values), ".", color="#222222", markersize=3.5, zorder=3)
        panel.annotate(figure(median), (max(values), place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    panel.set_xscale("log")
    panel.xaxis.get_major_locator().set_params(subs=(1, 3))
    panel.xaxis.set_major_formatter(lambda number, _: f"{number:g}")
    panel.xaxis.set_minor_formatter("")
    panel.set_yticks(places, group)
    panel.set_xlim(min(medians) / 2.5, max(medians) * 4)
    panel.invert_yaxis()
    panel.tick_params(axis="y", length=0)
    panel.grid(axis="x", alpha=0.25, linewidth=0.6)
    panel.set_axisbelow(True)


def main() -> None:
    """Writes both beside the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    given = parser.parse_args().results
    path = given if given.exists() else HERE / given
    lines = read(path)
    picture = path.with_suffix(".png")
    path.with_suffix(".md").write_text(page(lines, picture.name))
    draw(lines, picture)
    print(f"{path.with_suffix('.md')}\n{picture}")


if __name__ == "__main__":
    main()
