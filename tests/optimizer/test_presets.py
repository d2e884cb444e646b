"""Each preset against its system's own formula, in NumPy and float64, or against optax itself."""

import numpy as np
import optax
import pytest
from steps import gradients, run

from jaxfed import part
from jaxfed.optimizer.adaptive import Adagrad, Adam, RMSProp, Yogi

OPTAX = {
    "adam": (Adam.optax(), optax.scale_by_adam()),
    "adam-betas": (Adam.optax(0.8, 0.7, 1e-3), optax.scale_by_adam(0.8, 0.7, 1e-3)),
    "amsgrad": (Adam.optax(amsgrad=True), optax.scale_by_amsgrad()),
    "yogi": (Yogi.optax(), optax.scale_by_yogi()),
    "adagrad": (Adagrad.optax(), optax.scale_by_rss()),
    "rmsprop": (RMSProp.optax(), optax.scale_by_rms()),
    "declearn-adam": (Adam.declearn(), optax.scale_by_adam(0.9, 0.99, 1e-7)),
    "declearn-yogi": (Yogi.declearn(), optax.scale_by_yogi(0.9, 0.99, 1e-7, initial_accumulator_value=0.0)),
    "declearn-rmsprop": (RMSProp.declearn(), optax.scale_by_rms(0.9, 1e-7, eps_in_sqrt=False)),
}


@pytest.mark.parametrize("name", OPTAX)
def test_equals_optax(name, x64):
    module, transformation = OPTAX[name]
    g = gradients().astype(np.float64)
    np.testing.assert_allclose(run(module, g)[0], run(transformation, g)[0], rtol=1e-11, atol=1e-14)


def by_hand(move, v, eps, b1=0.9, scale=lambda round: 1.0):
    """``m = b1 m + (1 - b1) g; v = move(v, g ** 2); scale(round) m / (sqrt(v) + eps)``, with rounds from 1."""
    g = gradients().astype(np.float64)
    m, v, updates = np.zeros(g.shape[1]), np.full(g.shape[1], v), []
    for round, now in enumerate(g, start=1):
        m, v = b1 * m + (1 - b1) * now, move(v, now**2)
        updates.append(scale(round) * m / (np.sqrt(v) + eps))
    return np.stack(updates)


def mean(v, square):
    return 0.99 * v + 0.01 * square


def yogi(v, square):
    return v - 0.01 * square * np.sign(v - square)


def flower_scale(round):
    """Flower's eta_norm over eta; its rounds count from 1 and the exponent is round + 1."""
    return np.sqrt(1 - 0.99 ** (round + 1.0)) / (1 - 0.9 ** (round + 1.0))


FORMULAS = {
    "adam:paper": (Adam.paper(tau=0.1), by_hand(mean, 0.01, 0.1)),
    "yogi:paper": (Yogi.paper(tau=0.1), by_hand(yogi, 0.01, 0.1)),
    "adagrad:paper": (Adagrad.paper(tau=0.1), by_hand(np.add, 0.01, 0.1, b1=0.0)),
    "adam:flower": (Adam.flower(tau=0.1), by_hand(mean, 0.0, 0.1, scale=flower_scale)),
    "yogi:flower": (Yogi.flower(tau=0.1), by_hand(yogi, 0.0, 0.1)),
    "adagrad:flower": (Adagrad.flower(tau=0.1), by_hand(np.add, 0.0, 0.1, b1=0.0)),
    "yogi:fedscale": (Yogi.fedscale(tau=0.1), by_hand(yogi, 0.1, 0.1)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_equals_the_systems_formula(name, x64):
    module, expected = FORMULAS[name]
    assert part.build("module", (name, {"tau": 0.1})) == module
    np.testing.assert_allclose(run(module, gradients().astype(np.float64))[0], expected, rtol=1e-11, atol=1e-14)


def test_torch_takes_the_maximum_first(x64):
    g, m, v, v_max, updates = gradients().astype(np.float64), 0.0, 0.0, 0.0, []
    for t, now in enumerate(g, start=1):
        m, v = 0.9 * m + 0.1 * now, 0.999 * v + 0.001 * now**2
        v_max = np.maximum(v_max, v)
        denominator = np.sqrt(v_max) / np.sqrt(1 - 0.999**t) + 1e-8
        updates.append(m / (1 - 0.9**t) / denominator)
    np.testing.assert_allclose(run(Adam.torch(amsgrad=True), g)[0], updates, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cls", [Adam, Yogi, Adagrad, RMSProp])
def test_presets_are_plain_parts_that_differ(cls):
    made = [getattr(cls, preset)() for preset in cls.presets]
    assert all(type(one) is cls and part.build("module", part.spec(one)) == one for one in made)
    assert made[0] == cls()
    assert sum(one == other for one in made for other in made) == len(made)


@pytest.mark.parametrize(
    ("spec", "text"),
    [(("adam:papers", {}), "Did you mean 'paper'"), (("adam:paper", {"eps": 1.0}), "adam:paper has no option 'eps'.*tau")],
)
def test_unknown_presets_and_options_are_named(spec, text):
    with pytest.raises(ValueError, match=text):
        part.build("module", spec)
