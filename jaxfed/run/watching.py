"""What a run decides by its evaluations: whether it stops, and which of its checkpoints holds the best model.

Both follow from the rows of the history alone, so a run that is resumed decides as one that was never stopped.
"""

import math
from collections.abc import Iterable
from typing import Any, Self

import jax
import numpy as np

from jaxfed import checks
from jaxfed.messages import RunState
from jaxfed.reports import Evaluation
from jaxfed.run.config import RunConfig, RunSection
from jaxfed.run.history import Row
from jaxfed.run.section import located
from jaxfed.simulation import Simulation
from jaxfed.stopping import BestModel, EarlyStopping


class Watch:
    """Sees the rows of a history, in order: what they say of the validation rows, or of the test rows where there are no others.

    Attributes:
        stopping: The rule of ``run.stop``, None without it.
        best: The best evaluation by ``run.best``, or by the metric of ``run.stop``; None without either.

    Example:
        >>> watch = Watch(RunSection(rounds=100, stop={"metric": "loss", "patience": 2}), "eval_")
        >>> watch.see([{"round": 1, "eval_loss": 0.5}, {"round": 2, "eval_loss": None}, {"round": 3}])
        True
        >>> watch.see([{"round": 4, "eval_loss": 0.7}]), watch.stopped, watch.best.round
        (False, True, 1)
    """

    def __init__(self, section: RunSection, prefix: str):
        metric = section.best or (section.stop and section.stop.metric)
        self.stopping = None if section.stop is None else EarlyStopping(**section.stop.to_dict())
        self.best = None if metric is None else BestModel(metric)
        self._prefix = prefix

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """What a config asks for."""
        return cls(config.run, "valid_" if config.data.valid_fraction else "eval_")

    def see(self, rows: Iterable[Row]) -> bool:
        """Takes the rows that follow those seen before, and says whether the best is among them."""
        before = self.best and self.best.round
        for row in rows:
            for watcher in filter(None, (self.stopping, self.best)):
                if (name := self._prefix + watcher.metric) in row:
                    watcher.observe(row["round"], math.nan if row[name] is None else row[name])
        return self.best is not None and self.best.round != before

    @property
    def stopped(self) -> bool:
        """Whether the run is to stop."""
        return self.stopping is not None and self.stopping.stopped

    def result(self) -> dict[str, Any]:
        """What the run's result says of the best model, as plain data."""
        if self.best is None or self.best.round is None:
            return {}
        rows = {"rows": "validation"} if self._prefix == "valid_" else {}
        return {"best": {"round": self.best.round, "metric": self.best.metric, "value": self.best.value} | rows}


def check_metrics(section: RunSection, simulation: Simulation, state: RunState) -> None:
    """Raises ValueError with the path of the key if a run is to watch a metric that its model has not."""
    row = {key: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for key, x in simulation.data.arrays.items()}
    batch = row | {"mask": jax.ShapeDtypeStruct((1,), bool)}
    names = jax.eval_shape(simulation.model.metrics, state.params, state.stats, batch)
    known = Evaluation.from_sums({name: [0.0] for name in names}, np.ones(1)).row()
    asked = {"run.best": section.best, "run.stop.metric": section.stop and section.stop.metric}
    for path, name in asked.items():
        if name is not None:
            with located(path):
                checks.known_name("evaluated metric", name, known)
