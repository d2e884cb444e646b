"""Runs with what a picture and a table need of them."""

from typing import Any

import jax
import numpy as np

from jaxfed import Evaluation, FederatedData, History, RunState, Simulation

from .federation import Numbers


def trained(simulation: Simulation, seed: int, **options: Any) -> tuple[RunState, History]:
    """The state and history of a run from the model's own first weights; options as :meth:`jaxfed.Simulation.run`."""
    return simulation.run(simulation.init(key=jax.random.key(seed)), **options)


def curve(history: History, name: str = "accuracy") -> Numbers:
    """Where a metric was evaluated: ``{"round": [...], NAME_curve: [...]}``."""
    values = history[f"eval_{name}"]
    rounds, found = history["round"][~np.isnan(values)], values[~np.isnan(values)]
    return {"round": rounds.astype(int).tolist(), f"{name}_curve": found.round(4).tolist()}


def by_client(evaluation: Evaluation, name: str = "accuracy") -> Numbers:
    """A metric over all rows; over clients its mean, variance (of percents), and lowest and highest tenth."""
    values = np.sort(evaluation.by_client[name][evaluation.examples > 0])
    tenth = max(1, len(values) // 10)
    return {
        name: evaluation.metrics[name],
        f"{name} by client": float(values.mean()),
        f"{name} lowest tenth": float(values[:tenth].mean()),
        f"{name} highest tenth": float(values[-tenth:].mean()),
        f"{name} 10th percentile": float(np.percentile(values, 10)),
        f"{name} variance": float((100 * values).var()),
    }


def sample(data: FederatedData) -> dict[str, np.ndarray]:
    """A few rows, for the shapes of a model's inputs."""
    return {key: array[:2] for key, array in data.arrays.items()}
