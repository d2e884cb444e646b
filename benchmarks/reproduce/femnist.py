"""FederatedScope's ConvNet2 on FEMNIST: 155 writers, a fifth of them a round, test accuracy over each writer's own rows.

The writers are others than FederatedScope's, nearly as many as its 5 %; rows of each are 60 / 20 / 20 % for training, validation
(left aside) and testing. Each method has the hyper-parameters of its script, but FedProx the published table's mu, as its script
has ten times that, and where a name says so a rate of 0.1 with one epoch, both of the grid that the published figures are the
best of. Accuracies of other writers can only be shown; what is held to is the order of the methods, and the size of their gains.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

import jaxfed
from jaxfed.data import FederatedData
from jaxfed.models.reference import convnet2

from . import pictures
from .data import arrays
from .federation import SHOWN, Federation, Numbers, Results, Row, Rule, Run, at_least, differences, within
from .training import by_client, resumed, sample

FILES = ("femnist_leaf/femnist_leaf155.npz",)
SETTING, SEED, FRESH, COHORT = "155 writers", 0, 1, 31
MEAN, STD = 0.9637, 0.1592


def clipped(rate: float) -> jaxfed.Optimizer:
    """SGD whose gradients are clipped to the norm 5."""
    return jaxfed.Optimizer(rate, modules=[jaxfed.L2GlobalClipping(5.0)])


DITTO, PFEDME = "ditto 0.1", "pfedme 0.1"
_GLOBAL: Any = {"batch_size": 10, "epochs": 1}
METHODS: dict[str, Callable[[Any], jaxfed.Algorithm]] = {
    "fedavg": lambda loss: jaxfed.fedavg(loss, lrate=clipped(0.01), **_GLOBAL),
    "fedopt": lambda loss: jaxfed.fedavg(loss, lrate=clipped(0.01), server_lrate=1.0, **_GLOBAL),
    "fedprox": lambda loss: jaxfed.fedprox(loss, mu=0.01, lrate=clipped(0.01), **_GLOBAL),
    "fedbn": lambda loss: jaxfed.fedbn(loss, lrate=clipped(0.1), batch_size=64, epochs=1),
    "fedem": lambda loss: jaxfed.fedem(loss, models=3, lrate=clipped(0.5), batch_size=64, epochs=1),
    "ditto": lambda loss: jaxfed.ditto(loss, strength=0.1, lrate=clipped(0.5), batch_size=64, epochs=3),
    DITTO: lambda loss: jaxfed.ditto(loss, strength=0.1, lrate=clipped(0.1), batch_size=64, epochs=1),
    # Last: it takes as long as all others.
    PFEDME: lambda loss: jaxfed.pfedme(
        loss, strength=1.0, inner_steps=5, lrate=0.1, personal_lrate=clipped(0.1), batch_size=64, epochs=1
    ),
}
PUBLISHED = dict(zip(METHODS, (0.8493, 0.8492, 0.8477, 0.8548, 0.8479, 0.8661, 0.8661, 0.8765)))
PERSONAL = ("fedbn", "fedem", "ditto", DITTO, PFEDME)


@lru_cache(maxsize=1)
def data(folder: Path) -> tuple[FederatedData, FederatedData]:
    """Training and test rows of each writer."""
    x, y, client = arrays(folder / FILES[0], "x", "y", "client")
    pixels = ((x / np.float32(255) - MEAN) / STD).astype(np.float32)
    rows, rest = FederatedData.from_arrays({"x": pixels, "y": y.astype(np.int32)}, client).split(0.4, seed=1234)
    return rows, rest.split(0.5, seed=1234)[1]


def train(run: Run, folder: Path, whole: bool) -> Numbers:
    """One run; killed, it goes on from its last checkpoint."""
    rows, test = data(folder)
    model = convnet2(sample(rows), hidden=2048 if whole else 256)
    simulation = jaxfed.Simulation(METHODS[run.method](model), rows, COHORT)
    options: Any = {"rounds": 300 if whole else 60, "eval_every": 10, "eval_data": test}
    state, found = resumed(simulation, ("femnist", *run, whole), run.seed, **options)
    return by_client(simulation.evaluate_in_use(state, test)) | found


def best_gain(results: Results) -> list[float]:
    """The most accurate of the personal methods that have been run less FedAvg, seed by seed."""
    fedavg, *others = (results.by_seed(method, SETTING, "accuracy") for method in ("fedavg", *PERSONAL))
    best = {seed: max(values[seed] for values in others if seed in values) for seed in set().union(*others)}
    return [best[seed] - fedavg[seed] for seed in sorted(best) if seed in fedavg]


def gain(method: str, rule: Rule, remark: str = "", seeds: tuple[int, ...] = (SEED,)) -> Row:
    """A method less FedAvg, beside the published difference."""
    ours = differences((method, SETTING), ("fedavg", SETTING), "accuracy")
    published = round(PUBLISHED[method] - PUBLISHED["fedavg"], 4)
    return Row(f"{method} - fedavg", SETTING, "accuracy", published, GUIDE, rule, remark, ours, seeds)


GUIDE = "FederatedScope's guide"
OTHERS = "Published for other writers, 300 rounds and 2048 units."
BEST = round(PUBLISHED[PFEDME] - PUBLISHED["fedavg"], 4)
FASTER = "Of those that have been run. Their scripts have 10 to 50 times FedAvg's rate, from which FedBN's gain is."
DEAD = (
    "At its script's rate of 0.5 the first local steps raise the loss to 6.6 (62 equal chances: 4.1); then every prediction is "
    "the most frequent class. So it is with FedAvg at that rate, with PyTorch's first weights, and with 2048 units. Published "
    "figures are the best of a grid of rates from 0.005 to 0.5."
)
SAME_DEATH = "with that, its script's, it had 0.057 after ten rounds and was run no further."
# Written before any of these runs, but for remarks: a published gain of more than a point has to be one here, a smaller one
# a gain. Rows of a rate of 0.1 were written when "ditto" had run and nothing with their rate.
ROWS = [
    *(Row(m, SETTING, "accuracy", x, GUIDE, SHOWN, OTHERS, seeds=(SEED,)) for m, x in PUBLISHED.items()),
    Row("best personal - fedavg", SETTING, "accuracy", BEST, GUIDE, at_least(0.01), FASTER, best_gain, (SEED,)),
    gain("ditto", at_least(0.01), DEAD),
    gain(
        DITTO,
        at_least(0.01),
        "On seed 1, new when the rule was written: the rate was chosen after 0.5 had failed on seed 0.",
        (FRESH,),
    ),
    gain(
        PFEDME,
        SHOWN,
        f"Still rising, by 2.7 points in the last ten rounds. The rate was chosen after 0.5 had failed: {SAME_DEATH}",
    ),
    gain(
        "fedbn",
        at_least(0.0),
        "It is from the script's rate and batch, 0.1 and 64 (FedAvg's: 0.01 and 10), not local layers: with them FedAvg has "
        "0.496, 0.673 and 0.726 after 10, 20 and 30 rounds, FedBN 0.476, 0.659 and 0.719.",
    ),
    gain("fedem", SHOWN, "The published FedEM has one posterior for a whole batch."),
    gain("fedprox", within(0.01)),
    gain("fedopt", within(0.01), "With the script's server rate of 1 it is FedAvg."),
]


def draw(figure: Any, results: Results) -> None:
    """Accuracy by round, and after the last beside what was published."""
    way, final = figure.subplots(1, 2, sharey=True)
    for place, (method, color) in enumerate(zip(METHODS, pictures.COLORS)):
        found = list(results.by_seed(method, SETTING, "accuracy_curve").values())
        rounds = next(iter(results.by_seed(method, SETTING, "round").values()), [])
        pictures.band(way, rounds, found, color, method)
        pictures.dots(final, place, list(results.by_seed(method, SETTING, "accuracy").values()), color)
        label = "published, other writers" if place == 0 else None
        final.plot([place], [PUBLISHED[method]], label=label, **pictures.REFERENCE)
    final.set_xticks(range(len(METHODS)), METHODS, rotation=30)
    final.set_xlim(-0.5, len(METHODS) - 0.5)
    way.set_xlabel("round")
    for panel in (way, final):
        panel.legend(frameon=False, loc="center right")
        pictures.grid(panel, percent=True)


FEDERATION = Federation(
    name="femnist",
    title="FEMNIST: FederatedScope's ConvNet2 on 155 writers, eight methods",
    runs=[Run(method, SETTING, SEED) for method in METHODS] + [Run(method, SETTING, FRESH) for method in ("fedavg", DITTO)],
    train=train,
    rows=ROWS,
    draw=draw,
    files=FILES,
    short="60 rounds instead of 300, 256 hidden units instead of 2048.",
    minutes=(120, 3000),
)
