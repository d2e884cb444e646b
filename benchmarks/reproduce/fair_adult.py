"""Census income by two clients, the 413 people with a doctorate and all others: who is served by the worst mixture?

Logistic regression on the categorical columns alone, 600 rounds of one step of rate 0.1 on all rows, both clients in each;
nothing is drawn. FedAvg by examples hardly hears the doctorates; agnostic federated averaging weighs whoever fares worse.

This is the second setting. In the first, 50 steps of batches of 10, AFL also had the lower worst training loss, but a worst test
accuracy 0.06 below FedAvg's. The row of q-FedAvg's worst accuracy was added with the second.
"""

import csv
import gzip
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import jaxfed
from jaxfed.data import FederatedData
from jaxfed.models.reference import logistic_regression

from . import pictures
from .federation import SHOWN, Federation, Numbers, Results, Row, Run, differences
from .training import trained

FILES = ("adult/adult.data.gz", "adult/adult.test.gz")
COLUMNS = ("workclass", "education", "marital-status", "occupation", "relationship", "race", "sex", "native-country")
SEEDS, SETTING, ROUNDS = (0,), "2 clients", 600
_WORK: Any = {"lrate": 0.1, "batch_size": None, "steps": 1}
METHODS = {
    "fedavg": partial(jaxfed.fedavg, **_WORK),
    "fedavg, uniform": partial(jaxfed.fedavg, weights="uniform", **_WORK),
    "qfedavg q=5": partial(jaxfed.qfedavg, q=5.0, weights="uniform", **_WORK),
    "afl": partial(jaxfed.afl, domains=2, ascent_rate=0.1, ascent="projected", **_WORK),
}
PAPER = "Mohri et al. 2019: the worst domain gains"


def read(path: Path) -> list[dict[str, str]]:
    """The people of a file, without the stop that ends the test labels."""
    with gzip.open(path, "rt") as file:
        return [row | {"income": row["income"].rstrip(".")} for row in csv.DictReader(file)]


@lru_cache(maxsize=1)
def data(folder: Path) -> tuple[FederatedData, FederatedData]:
    """Training and test people; a missing entry has no column of its own."""
    train, test = (read(folder / name) for name in FILES)
    known = [(column, value) for column in COLUMNS for value in sorted({row[column] for row in train} - {"?"})]

    def federated(rows: list[dict[str, str]]) -> FederatedData:
        x = np.array([[row[column] == value for column, value in known] for row in rows], np.float32)
        doctorate = np.array([row["education"] == "Doctorate" for row in rows])
        y = np.array([row["income"] == ">50K" for row in rows], np.int32)
        return FederatedData.from_arrays({"x": x, "y": y, "domain": doctorate.astype(np.int32)}, doctorate.astype(int))

    return federated(train), federated(test)


def train(run: Run, folder: Path, whole: bool) -> Numbers:
    """One run."""
    rows, test = data(folder)
    algorithm = METHODS[run.method](logistic_regression(rows.client(0), classes=2))
    simulation = jaxfed.Simulation(algorithm, rows, chunk=50)
    state, _ = trained(simulation, run.seed, rounds=ROUNDS)
    found, own = simulation.evaluate(state, test), simulation.evaluate(state)
    others, doctorate = found.by_client["accuracy"]
    return {
        "accuracy": found.metrics["accuracy"],
        "accuracy of doctorates": float(doctorate),
        "accuracy of others": float(others),
        "worst accuracy": float(min(doctorate, others)),
        "worst training loss": float(own.by_client["loss"].max()),
        "gap": float(abs(doctorate - others)),
    }


def against(method: str, metric: str, rule: Any, remark: str = "") -> Row:
    """A method beside FedAvg by examples."""
    gap = differences((method, SETTING), ("fedavg", SETTING), metric)
    return Row(f"{method} - fedavg", SETTING, metric, None, PAPER, rule, remark, gap)


LATER = "Not counted as holding: chosen after the first setting, in which AFL's worst accuracy was 0.06 below FedAvg's."
ROWS = [
    against("afl", "worst training loss", SHOWN, LATER),
    against("afl", "worst accuracy", SHOWN, LATER),
    against("qfedavg q=5", "worst accuracy", SHOWN, LATER),
    against("qfedavg q=5", "worst training loss", SHOWN, LATER),
    against("qfedavg q=5", "gap", SHOWN, LATER),
]


def draw(figure: Any, results: Results) -> None:
    """Accuracy of both clients and the worse one's loss, by method."""
    accuracy, loss = figure.subplots(1, 2)
    for place, method in enumerate(METHODS):
        both = [results.mean(method, SETTING, f"accuracy of {who}") for who in ("doctorates", "others")]
        accuracy.plot([place, place], both, color="#bbbbbb", linewidth=3, zorder=1)
        for value, who, color in zip(both, ("doctorates", "others"), pictures.COLORS):
            accuracy.plot(place, value, "o", color=color, markersize=8, label=who if place == 0 else None)
            accuracy.annotate(f"{value:.1%}", (place, value), (9, 0), textcoords="offset points", va="center", fontsize=8.5)
        worst = results.mean(method, SETTING, "worst training loss")
        loss.bar(place, worst, color=pictures.COLORS[3], width=0.6)
        loss.annotate(f"{worst:.3f}", (place, worst), (0, 3), textcoords="offset points", ha="center", fontsize=8.5)
    accuracy.set_ylabel("test accuracy")
    accuracy.legend(frameon=False, loc="center right")
    accuracy.set_xlim(right=len(METHODS) - 0.4)
    loss.set_ylabel("training loss of the client that fares worse")
    for panel in (accuracy, loss):
        panel.set_xticks(range(len(METHODS)), METHODS)
        pictures.grid(panel, percent=panel is accuracy)


FEDERATION = Federation(
    name="fair-adult",
    title="Census income: people with a doctorate and all others, served by four methods",
    runs=[Run(method, SETTING, seed) for seed, method in product(SEEDS, METHODS)],
    train=train,
    rows=ROWS,
    draw=draw,
    files=FILES,
    minutes=(3, 3),
)
