"""Runs with what a picture and a table need of them."""

import shutil
from typing import Any

import jax
import numpy as np

from jaxfed import Evaluation, FederatedData, History, RunState, Simulation
from jaxfed.run.checkpoint import newest, save_run

from .data import ROOT
from .federation import Numbers

CHECKPOINTS = ROOT / "benchmarks/.cache/reproduce"


def trained(simulation: Simulation, seed: int, **options: Any) -> tuple[RunState, History]:
    """The state and history of a run from the model's own first weights; options as :meth:`jaxfed.Simulation.run`."""
    return simulation.run(simulation.init(key=jax.random.key(seed)), **options)


def resumed(
    simulation: Simulation, name: tuple, seed: int, *, rounds: int, eval_every: int, eval_data: FederatedData
) -> tuple[RunState, Numbers]:
    """The state and the :func:`curve` of a run that, when it was killed, goes on from its last evaluation.

    Args:
        simulation: What is run.
        name: Tells this run from others: names its folder of checkpoints, which is removed when all rounds are done.
        seed: Of all draws.
        rounds: In all.
        eval_every: Evaluate and write a checkpoint after as many rounds.
        eval_data: What to evaluate on.
    """
    folder = CHECKPOINTS / "-".join("".join(c if c.isalnum() else "_" for c in str(word)) for word in name)
    state, found = simulation.init(key=jax.random.key(seed)), {"round": [], "accuracy_curve": []}
    if (checkpoint := newest(folder)) is not None:
        state, found = checkpoint.load(state), checkpoint.notes
    while (done := int(state.round)) < rounds:
        some = min(eval_every, rounds - done)
        state, history = simulation.run(state, rounds=some, eval_every=eval_every, eval_data=eval_data)
        found = {key: found[key] + values for key, values in curve(history).items()}
        save_run(state, folder, notes=found)
    shutil.rmtree(folder, ignore_errors=True)
    return state, found


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
