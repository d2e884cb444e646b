import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from steps import gradients, random_part, run, through_json

from jaxfed.optimizer.momentum import EWMA, Momentum, YogiMomentum

MODULES = (Momentum, EWMA, YogiMomentum)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_equals_optax(beta, nesterov):
    g = gradients()
    expected, _ = run(optax.trace(beta, nesterov=nesterov), g)
    np.testing.assert_allclose(run(Momentum(beta, nesterov), g)[0], expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_ewma_equals_optax_without_debias(beta):
    g = gradients()
    expected, _ = run(optax.ema(beta, debias=False), g)
    np.testing.assert_allclose(run(EWMA(beta), g)[0], expected, rtol=2e-6, atol=1e-7)


def test_yogi_momentum_moves_by_a_share_of_the_new_value():
    s, expected = np.zeros(4), []
    for g in gradients() ** 2:
        s = s - np.sign(s - g) * 0.2 * g
        expected.append(s)
    np.testing.assert_allclose(run(YogiMomentum(0.8), gradients() ** 2)[0], expected, rtol=2e-6)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
def test_ewma_of_a_constant_is_its_closed_form(beta):
    updates, _ = run(EWMA(beta), jnp.ones((50, 1)))
    np.testing.assert_allclose(updates[:, 0], 1 - beta ** np.arange(1, 51), rtol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_follows_float32(dtype):
    """In bfloat16 0.999 is 1: a mean held there would only ever grow."""
    g = jnp.ones((400, 2), dtype)
    updates, state = run(EWMA(0.999), g)
    assert updates.dtype == dtype
    assert state.dtype == "float32"
    np.testing.assert_allclose(updates[-1].astype(np.float32), 1 - 0.999**400, rtol=8e-3)


def test_float64_stays_float64(x64):
    g = gradients().astype(np.float64)
    for cls in MODULES:
        updates, state = run(cls(), g)
        assert updates.dtype == state.dtype == "float64"


@pytest.mark.parametrize("cls", MODULES)
def test_sweep_over_beta(cls):
    g = gradients()
    swept = jax.vmap(lambda beta: run(cls(beta=beta), g)[0])(jnp.array([0.3, 0.8]))
    np.testing.assert_allclose(swept, jnp.stack([run(cls(beta=b), g)[0] for b in (0.3, 0.8)]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cls", MODULES)
def test_config_is_lossless(cls):
    """declearn's loses round_reset; T-05."""
    module = random_part(cls, seed=2)
    assert through_json(module) == module != cls()
    assert through_json(module).round_reset
    assert cls().carries_on
    assert not module.carries_on


@pytest.mark.parametrize("cls", MODULES)
@pytest.mark.parametrize("bad", [1, 1.0, -0.1, float("nan")])
def test_beta_lies_in_its_interval(cls, bad):
    with pytest.raises(ValueError, match="beta: expected a finite number at least 0 and below 1"):
        cls(beta=bad)
