"""NIID-Bench on Fashion-MNIST: four algorithms over ten clients whose labels a Dirichlet distribution skews.

LeNet, all clients in each round, batches of 64, rate 0.01 with momentum 0.9 and decay 1e-5; the best test accuracy of a run.
"""

from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import jaxfed
from jaxfed.data import FederatedData, dirichlet_by_label
from jaxfed.models.reference import lenet

from . import pictures
from .data import arrays
from .federation import SHOWN, Federation, Numbers, Results, Row, Run, at_least, differences, every_seed_at_least, within
from .training import resumed, sample

FILES = ("fashion_mnist/fashion_mnist.npz",)
SETTING, SEEDS = "Dir(0.5), 10 clients", (0, 1, 2)


def scaffold_on_steps(loss: Any, *, lrate: jaxfed.Optimizer, **options: Any) -> jaxfed.Algorithm:
    """SCAFFOLD as the benchmark has it: what is corrected is a step, after momentum, and a control variate is the mean step."""
    client = lrate.replace(modules=(*lrate.modules, jaxfed.ScaffoldClient("II")))
    return jaxfed.fedavg(loss, lrate=client, server_lrate=jaxfed.Optimizer(1.0, modules=["scaffold-server"]), **options)


METHODS: dict[str, Any] = {
    "fedavg": jaxfed.fedavg,
    # Option II takes the mean step for a gradient, which with momentum it is not, unless a step is what is corrected.
    "scaffold": lambda loss, **options: jaxfed.scaffold(loss, option="I", **options),
    "fedprox": lambda loss, **options: jaxfed.fedprox(loss, mu=0.01, **options),
    "fednova": jaxfed.fednova,
    "scaffold on steps": scaffold_on_steps,
}
PUBLISHED = {"fedavg": 0.8809, "scaffold": 0.8844, "fedprox": 0.8815, "fednova": 0.8822}
FLOWER = "Flower's run of NIID-Bench, whole"


@lru_cache(maxsize=1)
def data(folder: Path, seed: int) -> tuple[FederatedData, FederatedData]:
    """Ten clients' training rows, all test rows in one place."""
    x, y, test_x, test_y = arrays(folder / FILES[0], "x_train", "y_train", "x_test", "y_test")
    owners = dirichlet_by_label(y, clients=10, alpha=0.5, min_size=10, seed=seed)
    test = FederatedData.from_arrays({"x": test_x, "y": test_y.astype(np.int32)}, np.zeros(len(test_y), int))
    return FederatedData.from_arrays({"x": x, "y": y.astype(np.int32)}, owners), test


def train(run: Run, folder: Path, whole: bool) -> Numbers:
    """One run; killed, it goes on from its last checkpoint."""
    rows, test = data(folder, run.seed)
    # The decay is part of the gradient there, which momentum carries on.
    client = jaxfed.Optimizer(0.01, regularizers=[jaxfed.Ridge(0.5e-5)], modules=[jaxfed.Momentum(0.9)])
    rounds, epochs = (50, 10) if whole else (5, 2)
    algorithm = METHODS[run.method](lenet(sample(rows)), lrate=client, batch_size=64, epochs=epochs)
    simulation = jaxfed.Simulation(algorithm, rows)
    _, found = resumed(simulation, ("niid-fashion", *run, whole), run.seed, rounds=rounds, eval_every=1, eval_data=test)
    return {"best accuracy": max(found["accuracy_curve"])} | found


AHEAD, AHEAD_ON_STEPS = (
    differences((method, SETTING), ("fedavg", SETTING), "best accuracy") for method in ("scaffold", "scaffold on steps")
)
WHOLE = (
    "Seed 0 alone, 50 rounds of 10 epochs. The bound is three of the published standard deviations over seeds (0.0029), rounded "
    "up; the publication trains on nine tenths of each client's rows. Rule written after the shortened runs, before this one."
)
RISES = (
    "Too few epochs: one seed of three has it, all gained 1 to 2 points in the last round, and whole, with ten epochs a round, "
    "seed 0 has 0.862 after three rounds."
)
DIVERGES = (
    "It diverges in the second round, as momentum makes the correction ten times as large: with option I behind momentum seed 0 "
    "has 0.747 after two rounds, and 0.173 like this."
)
AFTER = "Not counted as holding: added after SCAFFOLD's option I under momentum had diverged."
ROWS = [
    Row("fedavg", SETTING, "best accuracy", PUBLISHED["fedavg"], FLOWER, at_least(0.84), RISES),
    Row("fedavg", SETTING, "best accuracy", PUBLISHED["fedavg"], FLOWER, within(0.01), WHOLE, seeds=(0,), whole=True),
    *(Row(m, SETTING, "best accuracy", PUBLISHED[m], FLOWER, SHOWN) for m in ("scaffold", "fedprox", "fednova")),
    Row("scaffold - fedavg", SETTING, "best accuracy", 0.0035, FLOWER, every_seed_at_least(-0.005), DIVERGES, AHEAD),
    Row("scaffold on steps", SETTING, "best accuracy", PUBLISHED["scaffold"], FLOWER, SHOWN, AFTER),
    Row("scaffold on steps - fedavg", SETTING, "best accuracy", 0.0035, FLOWER, SHOWN, AFTER, AHEAD_ON_STEPS),
]


def draw(figure: Any, results: Results) -> None:
    """Accuracy by round."""
    panel = figure.subplots()
    for method, color in zip(METHODS, pictures.COLORS):
        found = list(results.by_seed(method, SETTING, "accuracy_curve").values())
        rounds = next(iter(results.by_seed(method, SETTING, "round").values()), [])
        pictures.band(panel, rounds, found, color, method)
        if method in PUBLISHED:
            panel.axhline(PUBLISHED[method], color=color, linestyle=":", linewidth=1)
    panel.set_xlabel("round (dotted: published, after 50 rounds)")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.legend(frameon=False, loc="center right")
    pictures.grid(panel, percent=True)


FEDERATION = Federation(
    name="niid-fashion",
    title="NIID-Bench on Fashion-MNIST, labels skewed by Dir(0.5)",
    runs=[Run(method, SETTING, seed) for seed, method in product(SEEDS, METHODS)],
    train=train,
    rows=ROWS,
    draw=draw,
    files=FILES,
    short="5 rounds of 2 epochs instead of 50 of 10.",
    minutes=(20, 1000),
)
