"""What the pictures of all federations have in common."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .federation import Results

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444", "#8c6bb1", "#a6761d")
"""Colours that also differ for colour-blind eyes (Okabe and Ito, and two more)."""
REFERENCE = {"color": "#222222", "linewidth": 0, "marker": "D", "markersize": 4.5, "markerfacecolor": "white", "zorder": 5}
"""How a reference figure is marked."""
_STYLE: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 10}


def save(title: str, draw: Callable[[Any, Results], None], results: Results, path: Path) -> None:
    """Writes a PNG file. Needs matplotlib; no global setting of it is touched."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10, 5.5), dpi=130, layout="constrained")
        draw(figure, results)
        figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=10.5)
        figure.savefig(path)


def grid(axes: Any, *, percent: bool = False) -> None:
    """Light lines behind the marks of a vertical axis."""
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    if percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def band(axes: Any, x: list[float], curves: list[list[float]], color: str, label: str, **options: Any) -> None:
    """The mean of some seeds' curves, and their range."""
    if not curves:
        return
    columns = list(zip(*curves))
    axes.plot(x, [sum(column) / len(column) for column in columns], color=color, label=label, **{"linewidth": 1.5, **options})
    axes.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.15, linewidth=0)


def dots(axes: Any, place: float, values: list[float], color: str, label: str | None = None) -> None:
    """A dot for each seed and a bar at their mean."""
    if not values:
        return
    axes.plot([place] * len(values), values, ".", color=color, markersize=5, alpha=0.7)
    axes.plot([place - 0.16, place + 0.16], [sum(values) / len(values)] * 2, color=color, linewidth=2.2, label=label)
