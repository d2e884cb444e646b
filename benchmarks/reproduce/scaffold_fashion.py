"""How many rounds SCAFFOLD, FedAvg and SGD need, by how alike clients are, on Fashion-MNIST.

The paper's setting on another data set: 100 clients, 20 a round, softmax regression, batches of a fifth of a client's rows, so
that an epoch is five steps; the rate is the best of a grid for each method. SGD is one step on all of a client's rows.
"""

from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxfed
from jaxfed.data import FederatedData, by_similarity
from jaxfed.models.reference import logistic_regression

from . import pictures
from .data import arrays
from .federation import SHOWN, Federation, Numbers, Results, Row, Rule, Run, every_seed_at_least

FILES = ("fashion_mnist/fashion_mnist.npz",)
CLIENTS, COHORT, BATCH, TARGET, MOST = 100, 20, 120, 0.75, 300
SIMILARITIES, SEEDS, RATES = (0, 10, 100), (0, 1), (0.1, 0.03, 0.3, 0.01)
METHODS = {
    "sgd": lambda loss, rate: jaxfed.fedavg(loss, lrate=rate, batch_size=None, steps=1),
    "fedavg E=1": lambda loss, rate: jaxfed.fedavg(loss, lrate=rate, batch_size=BATCH, epochs=1),
    "fedavg E=5": lambda loss, rate: jaxfed.fedavg(loss, lrate=rate, batch_size=BATCH, epochs=5),
    "scaffold E=1": lambda loss, rate: jaxfed.scaffold(loss, lrate=rate, batch_size=BATCH, epochs=1),
    "scaffold E=5": lambda loss, rate: jaxfed.scaffold(loss, lrate=rate, batch_size=BATCH, epochs=5),
}
PAPER = "Karimireddy et al. 2020: the order, on EMNIST"
ROUNDS, FEWER = "rounds", every_seed_at_least(1)


def setting(similarity: int) -> str:
    """How a degree of similarity is called."""
    return f"{similarity}% alike, to {TARGET:.0%}"


@lru_cache(maxsize=1)
def data(folder: Path, similarity: int, seed: int) -> tuple[FederatedData, FederatedData]:
    """Training rows of 100 clients, all test rows in one place."""
    x, y, test_x, test_y = arrays(folder / FILES[0], "x_train", "y_train", "x_test", "y_test")
    owners = by_similarity(y, clients=CLIENTS, similarity=similarity / 100, seed=seed)
    test = FederatedData.from_arrays({"x": test_x, "y": test_y.astype(np.int32)}, np.zeros(len(test_y), int))
    return FederatedData.from_arrays({"x": x, "y": y.astype(np.int32)}, owners), test


def rounds_needed(simulation: jaxfed.Simulation, seed: int, test: FederatedData, most: int) -> int:
    """Rounds until the accuracy is reached; ``most`` if it is not reached before."""
    state = simulation.init(key=jax.random.key(seed))
    while (done := int(state.round)) < most:
        state, history = simulation.run(state, rounds=min(5, most - done), eval_every=1, eval_data=test)
        if (reached := history["eval_accuracy"] >= TARGET).any():
            return done + 1 + int(reached.argmax())
    return most


def train(run: Run, folder: Path, whole: bool) -> Numbers:
    """The best of all rates; none is tried for longer than the best one took."""
    rows, test = data(folder, next(s for s in SIMILARITIES if setting(s) == run.setting), run.seed)
    model, best, rate = logistic_regression(rows.client(0), classes=10), MOST, None
    for tried in RATES:
        simulation = jaxfed.Simulation(METHODS[run.method](model, tried), rows, COHORT, chunk=5)
        needed = rounds_needed(simulation, run.seed, test, best)
        if needed < best:
            best, rate = needed, tried
    return {ROUNDS: float(best), "rate": rate}


TUNED = "Each method with its best rate on the test rows."


def ratio(one: str, other: str, similarity: int, rule: Rule = FEWER) -> Row:
    """How many times as many rounds ``one`` needs."""

    def ours(results: Results) -> list[float]:
        first, second = (results.by_seed(m, setting(similarity), ROUNDS) for m in (one, other))
        return [first[seed] / second[seed] for seed in first if seed in second]

    return Row(f"{one} / {other}", setting(similarity), ROUNDS, None, PAPER, rule, TUNED, ours)


ROWS = [
    ratio("fedavg E=5", "scaffold E=5", 10),
    ratio("sgd", "fedavg E=5", 10),
    ratio("sgd", "scaffold E=5", 10),
    ratio("fedavg E=5", "scaffold E=5", 0),
    ratio("fedavg E=5", "scaffold E=5", 100, SHOWN),
    ratio("sgd", "fedavg E=1", 10),
]


def draw(figure: Any, results: Results) -> None:
    """Rounds by similarity, a panel for each."""
    for panel, similarity in zip(figure.subplots(1, len(SIMILARITIES), sharey=True), SIMILARITIES):
        for place, (method, color) in enumerate(zip(METHODS, pictures.COLORS)):
            values = list(results.by_seed(method, setting(similarity), ROUNDS).values())
            mean = results.mean(method, setting(similarity), ROUNDS)
            panel.bar(place, mean, color=color, width=0.7)
            panel.plot([place] * len(values), values, ".", color="#222222", markersize=4)
            if values:
                text = f"{mean:.3g}" if max(values) < MOST else f"over {MOST}"
                panel.annotate(text, (place, max(values)), (0, 4), textcoords="offset points", ha="center", fontsize=8)
        panel.set_xticks(range(len(METHODS)), METHODS)
        panel.tick_params(axis="x", rotation=35)
        panel.set_title(f"clients {similarity}% alike", loc="left")
        pictures.grid(panel)
    figure.axes[0].set_ylabel(f"rounds to {TARGET:.0%} test accuracy")


FEDERATION = Federation(
    name="scaffold-fashion",
    title="Rounds that SGD, FedAvg and SCAFFOLD need on Fashion-MNIST, each at its best rate",
    runs=[Run(m, setting(similarity), seed) for similarity, seed, m in product((10, 0, 100), SEEDS, METHODS)],
    train=train,
    rows=ROWS,
    draw=draw,
    files=FILES,
    minutes=(15, 15),
)
