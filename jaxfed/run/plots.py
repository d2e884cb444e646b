"""Pictures of histories. Needs matplotlib; no window is opened and no global setting of matplotlib is touched."""

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxfed import files
from jaxfed.run.environment import extra
from jaxfed.run.history import Row, column, read_history

T = TypeVar("T")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444")
"""Colours that also differ for colour-blind eyes (Okabe and Ito)."""

_NOTE = "Lines: mean over all rows. Bands: from the 10th to the 90th percentile of the clients."
SETTINGS: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "axes.titlesize": 11}
"""Of matplotlib, for every picture."""


def curves(histories: Mapping[str, list[Row]]) -> Any:
    """The histories of runs as one figure: a panel for each evaluated metric, the training loss and the size of the updates.

    Args:
        histories: The rows of each run by its label.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ValueError: If no run has done a round.

    Example:
        >>> rows = [{"round": i, "loss": 1 / i, "update_norm": 1.0} for i in (1, 2, 3)]
        >>> [axes.get_title(loc="left") for axes in curves({"first": rows}).axes]
        ['Training loss', 'Norm of the update']
    """
    with extra("A picture"):
        import matplotlib as mpl
        from matplotlib.figure import Figure
    if not any(histories.values()):
        raise ValueError(f"There is nothing to draw: {', '.join(histories)} has done no round yet.")
    panels = panels_of(histories)
    width = 2 if len(panels) > 1 else 1
    height = math.ceil(len(panels) / width)
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(5.2 * width, 3.4 * height + 0.7), dpi=150, layout="constrained")
        grid = figure.subplots(height, width, squeeze=False)
        for axes, (name, title) in zip(grid.flat, panels.items()):
            _draw_panel(axes, name, title, histories)
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        _label(figure, histories, any(name.startswith("eval_") for name in panels))
    return figure


def save_curves(histories: Mapping[str, list[Row]], path: str | Path) -> Path:
    """Writes :func:`curves` as a PNG file.

    Args:
        histories: The rows of each run by its label, as :func:`read_runs` gives them.
        path: The file.

    Raises:
        ValueError: If no run has done a round.
        OSError: If the file cannot be written.
    """
    buffer, path = io.BytesIO(), Path(path)
    curves(histories).savefig(buffer, format="png")
    files.write(path, buffer.getvalue())
    return path


def read_runs(paths: list[Path]) -> dict[str, list[Row]]:
    """The histories of run folders, as :func:`labelled`.

    Raises:
        ValueError: If a folder has no readable history.
    """
    return labelled(paths, lambda path: read_history(path / "history.jsonl"))


def labelled(paths: list[Path], read: Callable[[Path], T]) -> dict[str, T]:
    """What is read of each run folder, by the folders' names, or by their paths where names are the same."""
    names = [path.resolve().name for path in paths]
    return {str(path) if names.count(name) > 1 else name: read(path) for path, name in zip(paths, names)}


def panels_of(histories: Mapping[str, list[Row]]) -> dict[str, str]:
    """The columns to draw and their titles; evaluated metrics first, accuracy before loss."""
    names = dict.fromkeys(name for rows in histories.values() for row in rows for name in row)
    evaluated = [name.removesuffix("_deciles") for name in names if name.endswith("_deciles")]
    # False sorts before True: losses come last.
    evaluated.sort(key=lambda name: (name.endswith("loss"), name))
    titles = {name: f"Evaluation: {name.removeprefix('eval_').replace('_', ' ')}" for name in evaluated}
    return titles | {"loss": "Training loss", "update_norm": "Norm of the update"}


def _draw_panel(axes: Any, name: str, title: str, histories: Mapping[str, list[Row]]) -> None:
    for number, (label, rows) in enumerate(histories.items()):
        color = COLORS[number % len(COLORS)]
        dashes = ("-", "--", ":")[number // len(COLORS) % 3]
        rounds, values = column(rows, name)
        # Markers show where the few evaluations lie, and would hide a line of many rounds.
        few = len(rounds) <= 30
        axes.plot(rounds, values, dashes, color=color, linewidth=1.6, marker="o" if few else None, markersize=3, label=label)
        _draw_band(axes, rows, f"{name}_deciles", color, 0.22 if len(histories) == 1 else 0.12)
    finish_panel(axes, name, title)


def finish_panel(axes: Any, name: str, title: str) -> None:
    """What panels over rounds have in common: title, grid, and where a column's values begin."""
    axes.set_title(title, loc="left")
    axes.set_xlabel("round")
    axes.set_xlim(left=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25, linewidth=0.6)
    # From zero, so that the pictures of two runs can be laid side by side.
    if name.endswith("accuracy"):
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    elif name.endswith(("loss", "norm")):
        axes.set_ylim(bottom=0)


def _draw_band(axes: Any, rows: list[Row], name: str, color: str, alpha: float) -> None:
    rounds, deciles = column(rows, name)
    if len(rounds):
        axes.fill_between(rounds, deciles[:, 0], deciles[:, -1], color=color, alpha=alpha, linewidth=0)


def _label(figure: Any, histories: Mapping[str, list[Row]], has_bands: bool) -> None:
    if len(histories) == 1:
        figure.suptitle(next(iter(histories)), x=0.01, ha="left", weight="bold")
    else:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False)
    if has_bands:
        figure.supxlabel(_NOTE, x=0.01, ha="left", fontsize=8.5, color="#555555")
