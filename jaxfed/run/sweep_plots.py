"""The picture of a sweep: a line for each setting, a band over its seeds. Needs matplotlib."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from jaxfed import files
from jaxfed.hyperparameters import SEED, Setting
from jaxfed.run.environment import extra
from jaxfed.run.history import Row, column
from jaxfed.run.plots import COLORS, SETTINGS, finish_panel, panels_of

_NOTE = "Lines: mean over seeds. Bands: one standard deviation to either side."


def sweep_curves(settings: list[Setting], histories: list[list[Row]]) -> Any:
    """The histories of a sweep as one figure.

    Args:
        settings: A value for each name.
        histories: The rows of each.

    Returns:
        A ``matplotlib.figure.Figure``.

    Example:
        >>> rows = [[{"round": i, "loss": seed / i, "update_norm": 1.0} for i in (1, 2)] for seed in (1, 2)]
        >>> figure = sweep_curves([{"mu": 0.1, "seed": 1}, {"mu": 0.1, "seed": 2}], rows)
        >>> figure.axes[0].lines[0].get_label(), figure.axes[0].lines[0].get_ydata().tolist()
        ('mu 0.1', [1.5, 0.75])
    """
    with extra("A picture"):
        import matplotlib as mpl
        from matplotlib.figure import Figure
    lines = by_setting(settings, histories)
    panels = panels_of({str(i): rows for i, rows in enumerate(histories)})
    height = math.ceil(len(panels) / 2)
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(10.4, 3.4 * height + 1.0), dpi=150, layout="constrained")
        grid = figure.subplots(height, 2, squeeze=False)
        for axes, (name, title) in zip(grid.flat, panels.items()):
            for number, (label, group) in enumerate(lines.items()):
                _draw(axes, number, label, [column(rows, name) for rows in group])
            finish_panel(axes, name, title)
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, fontsize=8)
        if any(len(group) > 1 for group in lines.values()):
            figure.supxlabel(_NOTE, x=0.01, ha="left", fontsize=8.5, color="#555555")
    return figure


def save_sweep_curves(settings: list[Setting], histories: list[list[Row]], path: str | Path) -> Path:
    """Writes :func:`sweep_curves` as a PNG file."""
    buffer, path = io.BytesIO(), Path(path)
    sweep_curves(settings, histories).savefig(buffer, format="png")
    files.write(path, buffer.getvalue())
    return path


def by_setting(settings: list[Setting], histories: list[list[Row]]) -> dict[str, list[list[Row]]]:
    """The histories of all seeds of a setting, by its label."""
    groups: dict[str, list[list[Row]]] = {}
    for setting, rows in zip(settings, histories):
        label = ", ".join(f"{name} {value:g}" for name, value in setting.items() if name != SEED)
        groups.setdefault(label or "all seeds", []).append(rows)
    return groups


def _draw(axes: Any, number: int, label: str, columns: list[tuple[np.ndarray, np.ndarray]]) -> None:
    rounds, values = columns[0][0], np.stack([values for _, values in columns])
    with np.errstate(invalid="ignore"):  # a setting that diverges has infinities
        mean, deviation = values.mean(0), values.std(0)
    color, dashes = COLORS[number % len(COLORS)], ("-", "--", ":")[number // len(COLORS) % 3]
    few = len(rounds) <= 30
    axes.plot(rounds, mean, dashes, color=color, linewidth=1.4, marker="o" if few else None, markersize=2.5, label=label)
    if len(columns) > 1:
        axes.fill_between(rounds, mean - deviation, mean + deviation, color=color, alpha=0.15, linewidth=0)
