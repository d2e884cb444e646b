"""FedEM's own setting on its synthetic federation: who gains by a mixture of models?

300 clients, all in every round, 200 rounds of one epoch in batches of 128, labels as they are meant. The optimum of one model for
all, the fate of clients that train alone, and of one that knows the mixture were computed independently on another draw.
"""

from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import jaxfed
from jaxfed.data import FederatedData, linear_mixture
from jaxfed.models.reference import mlp

from . import pictures
from .federation import Federation, Numbers, Results, Row, Run, between, differences, every_seed_at_least
from .training import by_client, curve, trained

ROUNDS, TEST_ROWS, SEEDS, SETTING = 200, 1000, (0, 1, 2), "labels as meant"
METHODS = {
    "local": lambda loss, work: jaxfed.ditto(loss, strength=0.0, lrate=0.1, **work),
    "fedavg": lambda loss, work: jaxfed.fedavg(loss, lrate=0.1, **work),
    "fedavg, finetuned": lambda loss, work: jaxfed.finetuned(loss, lrate=0.1, **work),
    "fedem": lambda loss, work: jaxfed.fedem(loss, models=3, lrate=0.3, **work),
}
BOUNDS = {"optimum of one model": 0.718, "each client alone, l2": 0.651, "true mixture known": 0.871}
NUMPY = "independent NumPy program on another draw of the recipe"


@lru_cache(maxsize=1)
def data(seed: int) -> tuple[FederatedData, FederatedData]:
    """Training and test rows."""
    train, test = linear_mixture(test_rows=TEST_ROWS, seed=seed).split_by("is_test")
    return train, test


def train(run: Run, folder: Path, whole: bool) -> Numbers:
    """One run; the seed is the data's, too."""
    rows, test = data(run.seed)
    model = mlp(rows.client(0), hidden=(), classes=2)
    algorithm = METHODS[run.method](model, {"batch_size": 128, "epochs": 1})
    simulation = jaxfed.Simulation(algorithm, rows)
    state, history = trained(simulation, run.seed, rounds=ROUNDS, eval_every=10, eval_data=test)
    return by_client(simulation.evaluate_in_use(state, test)) | curve(history)


GAP = differences(("fedem", SETTING), ("fedavg", SETTING), "accuracy")
ROWS = [
    Row("local", SETTING, "accuracy", 0.651, NUMPY, between(0.63, 0.67)),
    Row("fedavg", SETTING, "accuracy", 0.718, NUMPY, between(0.66, 0.73)),
    Row("fedem - fedavg", SETTING, "accuracy", 0.04, NUMPY, every_seed_at_least(0.04), "", GAP),
]


def draw(figure: Any, results: Results) -> None:
    """Accuracy by round beside the bounds, and the clients' deciles after the last round."""
    curves, deciles = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for method, color in zip(METHODS, pictures.COLORS):
        found = list(results.by_seed(method, SETTING, "accuracy_curve").values())
        rounds = next(iter(results.by_seed(method, SETTING, "round").values()), [])
        pictures.band(curves, rounds, found, color, method)
    for (name, value), style in zip(BOUNDS.items(), (":", "--", "-.")):
        curves.axhline(value, color="#777777", linestyle=style, linewidth=1.1, label=f"{name} ({value:.1%})")
    curves.set_xlabel("round")
    curves.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    curves.set_title("Mean over all test rows", loc="left")
    metrics = {"accuracy lowest tenth": "v", "accuracy by client": "o", "accuracy highest tenth": "^"}
    for (place, (method, color)), (metric, marker) in product(enumerate(zip(METHODS, pictures.COLORS)), metrics.items()):
        values = list(results.by_seed(method, SETTING, metric).values())
        deciles.plot([place] * len(values), values, marker, color=color, markersize=6)
    deciles.set_xticks(range(len(METHODS)), METHODS)
    deciles.tick_params(axis="x", rotation=20)
    deciles.set_title("Worst tenth, mean and best tenth of clients", loc="left")
    for panel in (curves, deciles):
        pictures.grid(panel, percent=True)


FEDERATION = Federation(
    name="fedem-synthetic",
    title="FedEM on its synthetic federation: a mixture of three models against one for all and one for each",
    runs=[Run(method, SETTING, seed) for seed, method in product(SEEDS, METHODS)],
    train=train,
    rows=ROWS,
    draw=draw,
    minutes=(5, 5),
)
