"""Every registered part, one line each, keeps the laws of ``jaxfed.testing``; so does a part of a third party."""

import jax
import jax.numpy as jnp
import pytest

import jaxfed
from jaxfed import part
from jaxfed.testing import check_aggregator, check_config, check_module, check_pytree, check_schedule

MODULES = {
    "momentum": {"beta": 0.8, "nesterov": True, "round_reset": True},
    "ewma": {"beta": 0.7},
    "yogi-momentum": {"beta": 0.8},
    "adagrad": {"eps": 1e-3},
    "rmsprop": {"beta": 0.8, "eps": 1e-4},
    "adam": {"beta_1": 0.8, "beta_2": 0.95, "amsgrad": True, "eps": 1e-3},
    "yogi": {"beta_1": 0.8, "beta_2": 0.95, "eps": 1e-3},
    "l2-clipping": {"max_norm": 0.5},
    "l2-global-clipping": {"max_norm": 0.5},
    "gaussian-noise": {"std": 0.3},
    "laplace-noise": {"scale": 0.3},
    "optax": {"factory": "scale_by_adam", "b1": 0.8},
    "scaffold-client": {"option": "I"},
    "scaffold-server": {"denominator": "seen"},
    "adaalter-client": {"eps": 0.5},
    "adaalter-server": {"init_v": 2.0},
    "feddyn-client": {"alpha": 0.3},
    "feddyn-server": {},
    "mime-client": {},
    "mime-server": {"base": ["momentum", {"beta": 0.3}]},
    "mime-adam": {"beta_1": 0.8, "beta_2": 0.95, "eps": 1e-2, "init_v": 0.5},
}
# What the server sends, where that is not like the weights.
SENT = {"mime-client": lambda params: (jaxfed.EWMA(0.3), jaxfed.EWMA(0.3).init(params))}
REGULARIZERS = {"fedprox": {"alpha": 0.3}, "lasso": {"alpha": 0.3}, "ridge": {"alpha": 0.3}}
AGGREGATORS = {
    "averaging": {"by": "uniform"},
    "sum": {},
    "gradient-masked-averaging": {"by": "examples", "threshold": 0.4},
    "median": {},
    "trimmed-mean": {"ratio": 0.34},
    # Of three clients two are always each other's nearest: only two together are the same in any order.
    "krum": {"byzantine": 0, "chosen": 2, "by": "examples"},
    "bulyan": {"byzantine": 0},
    "geometric-median": {"smoothing": 1e-3, "iterations": 5, "by": "examples"},
    "centred-clipping": {"radius": 2.0, "iterations": 3, "by": "steps"},
    "private-mean": {"max_norm": 0.7, "noise_multiplier": 1.5, "expected": 4},
    "adaptive-private-mean": {
        **{"max_norm": 0.7, "noise_multiplier": 1.5, "expected": 4, "quantile": 0.4, "rate": 0.3, "count_std": 2.0}
    },
    "buffered": {"by": "examples", "power": 0.25},
    "norm-bounding": {"max_norm": 2.0, "by": "examples"},
    "fednova": {"by": "uniform"},
    "q-fair": {"by": "uniform", "q": 0.7, "lrate": 0.3},
    "agnostic": {"by": "steps", "domains": 3, "rate": 0.4, "ascent": "projected"},
}


def own(kind: str) -> set[str]:
    """The registered names that are the library's; tests register parts of their own."""
    return {name for name, cls in part.registered(kind).items() if cls.__module__.startswith("jaxfed.")}


def test_tables_hold_every_registered_part():
    assert set(MODULES) == own("module")
    assert set(REGULARIZERS) == own("regularizer")
    assert set(AGGREGATORS) == own("aggregator")
    assert set(SCHEDULES) | NO_PLAIN_SCHEDULES == own("schedule")


@pytest.mark.parametrize("name", MODULES)
def test_module(name):
    check_module(part.build("module", (name, MODULES[name])), aux=SENT.get(name))


@pytest.mark.parametrize("name", REGULARIZERS)
def test_regularizer(name):
    check_module(part.build("regularizer", (name, REGULARIZERS[name])))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_aggregator(name):
    check_aggregator(part.build("aggregator", (name, AGGREGATORS[name])))


def test_optimizer_in_optax_chain():
    check_config(jaxfed.Momentum(0.5))
    optimizer = jaxfed.Optimizer(0.1, 0.01, ["fedprox"], [("adam", {"eps": 1e-3})])
    assert jaxfed.Optimizer.from_config(optimizer.get_config()) == optimizer


SCHEDULES = {
    "exponential-decay": {"base": 0.1, "rate": 0.9},
    "inverse-scaling": {"base": 0.1, "rate": 0.5},
    "linear-decay": {"base": 0.1, "rate": 0.2},
    "polynomial-decay": {"base": 0.1, "power": 2, "limit": 5},
    "piecewise-decay": {"base": 0.1, "rate": 0.5, "step_size": 2},
    "cosine-annealing": {"base": 0.001, "max_lr": 0.1, "duration": 5},
    "cosine-annealing-warm-restarts": {"base": 0.001, "max_lr": 0.1, "period": 3, "step_level": False},
    "cyclic-triangular": {"base": 0.001, "max_lr": 0.1, "stepsize": 2, "decay": True},
    "cyclic-exp-range": {"base": 0.001, "max_lr": 0.1, "stepsize": 2, "decay": 0.9},
    "warmup": {"base": ["exponential-decay", {"base": 0.1, "rate": 0.5}], "warmup": 3},
    "warmup-rounds": {"base": 0.1, "warmup": 2},
    "constant": {"rate": 0.3},
}
# A rate per leaf is no single number, and a function has no config.
NO_PLAIN_SCHEDULES = {"by-label", "function"}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule(name):
    check_schedule(part.build("schedule", (name, SCHEDULES[name])))


OTHERS = {
    "batches": {
        "epochs": {"batch_size": 3, "shuffle": False, "epochs": 2},
        "steps": {"batch_size": None, "steps": 4},
        "poisson": {"batch_size": 5, "steps": 2, "rate": 0.3},
    },
    "selector": {
        "everyone": {},
        "uniform": {"size": 3},
        "poisson": {"size": 2, "rate": 0.4},
        "weighted": {"size": 2, "weights": [0.5, 0.0, 3.0]},
        "criterion": {"size": 2, "metric": "update_norm", "lowest": True, "over": "mean", "missing": "equal"},
        "composition": {"selectors": [["uniform", {"size": 3}], ["criterion", {"size": 1}]]},
        "asynchronous": {
            "selector": ["uniform", {"size": 2}],
            "buffer": 1,
            "seconds": [3.0, 4.0],
            "availability": ["windows", {"begins": [[0.0], [1.0]], "ends": [[2.0], [3.0]], "period": [5.0, 6.0]}],
            "versions": 3,
        },
        "oort": {
            "size": 2,
            "examples": [4.0, 5.0],
            "seconds": [1.0, 2.0],
            "metric": "loss",
            **{"explore": 0.5, "explore_decay": 0.9, "explore_least": 0.1, "clip": 0.8, "penalty": 1.0, "cutoff": 0.5},
            **{"window": 2.0, "percentile": 40.0, "pacer_step": 3, "pacer_delta": 10.0, "most_picks": 7},
        },
        "first-to-finish": {
            "selector": ["uniform", {"size": 2}],
            "keep": 1,
            "seconds": [3.0, 4.0],
            "availability": ["windows", {"begins": [[0.0], [1.0]], "ends": [[2.0], [3.0]], "period": [5.0, 6.0]}],
        },
        "stragglers": {"selector": ["uniform", {"size": 3}], "share": 0.4, "late": "drop", "epochs": 7},
    },
    "gradient": {
        "mean": {},
        "svrg": {"rule": "mean"},
        "half-precision": {"rule": "svrg", "dtype": "float16"},
        "private": {"expected": 3.0},
    },
    "survey": {"full-gradient": {}},
    "measure": {"domain": {}, "loss_rms": {}, "start_loss": {}, "update_divergence": {}, "update_norm": {}},
    "availability": {"windows": {"begins": [[0.0, 3.0]], "ends": [[1.0, 4.0]], "period": [5.0]}},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_parts_survive_config_and_flattening(kind):
    assert set(OTHERS[kind]) == own(kind)
    for name, options in OTHERS[kind].items():
        value = part.build(kind, (name, options))
        check_config(value)
        check_pytree(value)


class Broken(jaxfed.OptiModule, register=False):
    """A part that breaks one law after the other."""

    law: str = jaxfed.static(default="")

    def init(self, params):
        return jnp.zeros(())

    def update(self, updates, state, params=None):
        if self.law == "dtype":
            return jax.tree.map(lambda g: g.astype(jnp.float32) * jnp.float32(2), updates), state
        if self.law == "state":
            return updates, (state, state)
        if self.law == "finite":
            return jax.tree.map(lambda g: g / jnp.abs(g), updates), state
        return updates, state


class Third(jaxfed.OptiModule):
    """A third party's part, in under ten lines."""

    name = "third-party-cubic"
    strength: float = jaxfed.number(default=0.1, at_least=0)

    def update(self, updates, state, params=None):
        return jax.tree.map(lambda g: g + self.strength * g**3, updates), state


class Named(Broken):
    name = "named-broken"


def test_third_party_part():
    check_module(Third(0.3))


@pytest.mark.parametrize(("law", "text"), [("dtype", "dtype"), ("state", "structure"), ("finite", "finite")])
def test_broken_laws_are_found(law, text):
    with pytest.raises(AssertionError, match=text):
        check_module(Named(law))


def test_part_without_a_name_has_no_config():
    with pytest.raises(ValueError, match="no registered name"):
        check_module(Broken())
