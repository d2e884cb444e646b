"""A picture of the clients' own learning curves, readable for ten clients and for ten thousand."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxfed import files
from jaxfed.reports import less_is_better
from jaxfed.run.client_curves import ClientCurves
from jaxfed.run.environment import extra
from jaxfed.run.plots import COLORS, SETTINGS, finish_panel

FEW = 10
"""Up to so many clients have a line each."""
_NOTE = (
    "Line: median of the clients. Bands: half of them, and from the 10th to the 90th percentile, at each evaluation.\n"
    "Dashed and dotted: mean over the tenth of the clients that ended best and worst."
)


def curves_by_client(runs: Mapping[str, ClientCurves]) -> Any:
    """The spread of each metric over the clients of each run: a row of panels for each metric, a column for each run.

    Bands may hide that clients change places, so the tenths that ended best and worst are followed from the beginning.

    Args:
        runs: The curves of each run by its label.

    Returns:
        A ``matplotlib.figure.Figure``.

    Example:
        >>> curves = ClientCurves(np.array([5, 10]), {"loss": np.array([[3.0, 2.0, 1.0], [2.0, 1.0, 0.5]])})
        >>> [axes.get_title(loc="left") for axes in curves_by_client({"first": curves}).axes]
        ['first: loss']
    """
    with extra("A picture"):
        import matplotlib as mpl
        from matplotlib.figure import Figure
    # False sorts before True: losses come last.
    metrics = sorted({name for run in runs.values() for name in run.metrics}, key=lambda name: (name.endswith("loss"), name))
    with mpl.rc_context(SETTINGS):
        size = (5.2 * len(runs), 3.4 * len(metrics) + 0.7)
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        grid = figure.subplots(len(metrics), len(runs), squeeze=False, sharey="row")
        for row, metric in zip(grid, metrics):
            for axes, (label, run) in zip(row, runs.items()):
                if metric in run.metrics:
                    _draw(axes, run.rounds, run.metrics[metric], less_is_better(metric))
                finish_panel(axes, metric, f"{label}: {metric.replace('_', ' ')}")
        figure.supxlabel(_NOTE, x=0.01, ha="left", fontsize=8.5, color="#555555")
    return figure


def save_curves_by_client(runs: Mapping[str, ClientCurves], path: str | Path) -> Path:
    """Writes :func:`curves_by_client` as a PNG file.

    Args:
        runs: The curves of each run by its label.
        path: The file.

    Raises:
        OSError: If the file cannot be written.
    """
    buffer, path = io.BytesIO(), Path(path)
    curves_by_client(runs).savefig(buffer, format="png")
    files.write(path, buffer.getvalue())
    return path


def tenths(values: np.ndarray, less_is_better: bool) -> tuple[np.ndarray, np.ndarray]:
    """The mean curves of the tenth of the clients that ended best, and of the tenth that ended worst.

    Args:
        values: ``[E, N]`` without clients that have no rows.
        less_is_better: Which way is better.

    Returns:
        Both ``[E]``; a tenth has at least one client.

    >>> tenths(np.array([[1.0, 5.0, 3.0], [4.0, 2.0, 3.0]]), less_is_better=True)
    (array([5., 2.]), array([1., 4.]))
    """
    # A client that ended at NaN comes last, with the worst.
    order = np.argsort(values[-1] if less_is_better else -values[-1], kind="stable")
    count = max(1, values.shape[1] // 10)
    return values[:, order[:count]].mean(1), values[:, order[-count:]].mean(1)


def _draw(axes: Any, rounds: np.ndarray, values: np.ndarray, less_is_better: bool) -> None:
    # A client without rows is NaN in every evaluation; one whose model diverged only from there on.
    values = values[:, ~np.isnan(values).all(0)]
    if not values.size:
        return
    color = COLORS[0]
    if values.shape[1] <= FEW:
        axes.plot(rounds, values, color=color, linewidth=0.7, alpha=0.5)
    else:
        for low, high in ((10, 90), (25, 75)):
            axes.fill_between(rounds, *np.nanpercentile(values, (low, high), axis=1), color=color, alpha=0.2, linewidth=0)
        best, worst = tenths(values, less_is_better)
        axes.plot(rounds, best, "--", color=COLORS[2], linewidth=1.2)
        axes.plot(rounds, worst, ":", color=COLORS[1], linewidth=1.6)
    axes.plot(
        rounds, np.nanmedian(values, axis=1), color=color, linewidth=1.8, marker="o" if len(rounds) <= 30 else None, markersize=3
    )
