"""Runs on disk: config files, checkpoints, histories, pictures, and the ``jaxfed`` command.

* :mod:`jaxfed.run.config`: the settings, to and from TOML and JSON;
* :mod:`jaxfed.run.training`: a run in its folder, started and resumed;
* :mod:`jaxfed.run.sweeping`: a sweep in its folder;
* :mod:`jaxfed.run.checkpoint`: states on disk, for any simulation;
* :mod:`jaxfed.run.history`, :mod:`~jaxfed.run.client_curves`, :mod:`~jaxfed.run.plots`, :mod:`~jaxfed.run.client_plots`,
  :mod:`~jaxfed.run.export`: what a run leaves.
"""

from jaxfed.run.checkpoint import load_run, save_run
from jaxfed.run.client_curves import read_client_curves
from jaxfed.run.client_plots import curves_by_client, save_curves_by_client
from jaxfed.run.config import RunConfig
from jaxfed.run.export import export_weights
from jaxfed.run.history import read_history
from jaxfed.run.plots import curves, save_curves
from jaxfed.run.sweep_plots import save_sweep_curves, sweep_curves
from jaxfed.run.training import Run, load, load_best

__all__ = [
    "Run",
    "RunConfig",
    "curves",
    "curves_by_client",
    "export_weights",
    "load",
    "load_best",
    "load_run",
    "read_client_curves",
    "read_history",
    "save_curves",
    "save_curves_by_client",
    "save_run",
    "save_sweep_curves",
    "sweep_curves",
]
