"""Census income by two clients, the 413 people with a doctorate and all others: who is served by the worst mixture?

Logistic regression on the categorical columns alone, 600 rounds of one step of rate 0.1 on all rows, both clients in each;
nothing is drawn. FedAvg by examples hardly hears the doctorates; agnostic federated averaging weighs whoever fares worse.

This is the second setting. In the first, 50 steps of batches of 10, AFL also had the lower worst training loss, but a worst test
accuracy 0.06 below FedAvg's. The row of q-FedAvg's worst accuracy was added with the second. So what the two files give is only
shown. As nothing is drawn there are no seeds; instead all 48,842 people are divided anew, a third of each client to test on, five
times. Those divisions are held to the rules, which were committed before they were run. They are not of other people.
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
from .federation import SHOWN, Federation, Numbers, Results, Row, Rule, Run, differences, every_seed_at_least, every_seed_at_most
from .training import trained

FILES = ("adult/adult.data.gz", "adult/adult.test.gz")
COLUMNS = ("workclass", "education", "marital-status", "occupation", "relationship", "race", "sex", "native-country")
SETTING, ANEW, FRESH, ROUNDS = "2 clients", "2 clients, divided anew", (1, 2, 3, 4, 5), 600
_WORK: Any = {"lrate": 0.1, "batch_size": None, "steps": 1}
METHODS = {
    "fedavg": partial(jaxfed.fedavg, **_WORK),
    "fedavg, uniform": partial(jaxfed.fedavg, weights="uniform", **_WORK),
    "qfedavg q=5": partial(jaxfed.qfedavg, q=5.0, weights="uniform", **_WORK),
    "afl": partial(jaxfed.afl, domains=2, ascent_rate=0.1, ascent="projected", **_WORK),
}
PAPERS = {
    "afl": "Mohri et al. 2019: the worst domain gains",
    "qfedavg q=5": "Li et al. 2020 (q-FFL): the worst gains, the gap shrinks",
}


def read(path: Path) -> list[dict[str, str]]:
    """The people of a file, without the stop that ends the test labels."""
    with gzip.open(path, "rt") as file:
        return [row | {"income": row["income"].rstrip(".")} for row in csv.DictReader(file)]


@lru_cache(maxsize=1)
def data(folder: Path, seed: int = 0) -> tuple[FederatedData, FederatedData]:
    """Training and test people; a missing entry has no column of its own. Seed 0 keeps the files, others divide anew."""
    train, test = (read(folder / name) for name in FILES)
    known = [(column, value) for column in COLUMNS for value in sorted({row[column] for row in train} - {"?"})]

    def federated(rows: list[dict[str, str]]) -> FederatedData:
        x = np.array([[row[column] == value for column, value in known] for row in rows], np.float32)
        doctorate = np.array([row["education"] == "Doctorate" for row in rows])
        y = np.array([row["income"] == ">50K" for row in rows], np.int32)
        return FederatedData.from_arrays({"x": x, "y": y, "domain": doctorate.astype(np.int32)}, doctorate.astype(int))

    return federated([*train, *test]).split(1 / 3, seed=seed) if seed else (federated(train), federated(test))


def train(run: Run, folder: Path, whole: bool) -> Numbers:
    """One run."""
    rows, test = data(folder, run.seed)
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


def against(method: str, metric: str, setting: str, rule: Rule, remark: str, seeds: tuple[int, ...] | None = None) -> Row:
    """A method beside FedAvg by examples."""
    gap = differences((method, setting), ("fedavg", setting), metric)
    return Row(f"{method} - fedavg", setting, metric, None, PAPERS[method], rule, remark, gap, seeds)


LATER = "Not counted as holding: chosen after the first setting, in which AFL's worst accuracy was 0.06 below FedAvg's."
FIVE = "Five divisions of the same people, none of which had been run when the rule was fixed."


def chance(right: int, errors: float, trained: float, others: str) -> str:
    """Why one division of the five fails."""
    return (
        f"The test is too small. On the one division that fails 24 of its 198 doctorates turn wrong and {right} right, {errors} "
        f"standard errors; of those trained on {trained} are right, where FedAvg has 0.692. On twelve other divisions a NumPy "
        f"program, which has the same accuracies on divisions 1 to 3, {others}; the standard error of one is 0.03."
    )


FAILING = {
    ("afl", "worst accuracy"): chance(15, 1.5, 0.788, "gains 0.016 on average and loses 0.005 and 0.015 on two"),
    ("qfedavg q=5", "worst accuracy"): chance(13, 1.8, 0.778, "gains 0.017 on average and loses 0.005 on one"),
    ("qfedavg q=5", "gap"): chance(13, 1.8, 0.778, "shrinks the gap by 0.027 on average, and on each by 0.006 or more"),
}
CLAIMS = {
    ("afl", "worst training loss"): every_seed_at_most(0),
    ("afl", "worst accuracy"): every_seed_at_least(0),
    ("qfedavg q=5", "worst accuracy"): every_seed_at_least(0),
    ("qfedavg q=5", "worst training loss"): every_seed_at_most(0),
    ("qfedavg q=5", "gap"): every_seed_at_most(0),
}
ROWS = [
    *(against(*claim, SETTING, SHOWN, LATER) for claim in CLAIMS),
    *(against(*claim, ANEW, rule, f"{FIVE} {FAILING.get(claim, '')}".rstrip(), FRESH) for claim, rule in CLAIMS.items()),
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
    runs=[Run(method, ANEW if seed else SETTING, seed) for seed, method in product((0, *FRESH), METHODS)],
    train=train,
    rows=ROWS,
    draw=draw,
    files=FILES,
    minutes=(6, 6),
)
