import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import random_part, through_json

from jaxfed import FedProx, Lasso, RoundStart
from jaxfed.optimizer.regularizers import Ridge

WEIGHTS = {"a": jnp.array([1.0, -2.0, 0.0]), "b": jnp.array(3.0)}
ANCHOR = {"a": jnp.array([0.5, 1.0, -1.0]), "b": jnp.array(-1.0)}
PENALTIES = {
    FedProx: lambda w: 0.5 * sum(jnp.sum((w[k] - ANCHOR[k]) ** 2) for k in w),
    Lasso: lambda w: sum(jnp.sum(jnp.abs(w[k])) for k in w),
    Ridge: lambda w: sum(jnp.sum(w[k] ** 2) for k in w),
}


@pytest.mark.parametrize("cls", PENALTIES)
def test_adds_the_gradient_of_the_penalty(cls):
    """By automatic differentiation of the loss term, away from the kinks."""
    regularizer = cls(alpha=0.3)
    weights = jax.tree.map(lambda w: w + 0.25, WEIGHTS)
    got, _ = regularizer.update(jax.tree.map(jnp.ones_like, weights), regularizer.init(ANCHOR), weights)
    expected = jax.grad(PENALTIES[cls])(weights)
    for name in weights:
        np.testing.assert_allclose(got[name], 1 + 0.3 * expected[name], rtol=1e-6)


def test_fedprox_is_finite_and_zero_at_the_anchor():
    """The gradient of a norm is NaN there; T-27."""
    prox = FedProx(0.5)
    got, _ = prox.update({"a": jnp.zeros(3), "b": jnp.zeros(())}, prox.init(ANCHOR), ANCHOR)
    assert all(not leaf.any() for leaf in jax.tree.leaves(got))
    assert np.isnan(jax.grad(lambda w: jnp.linalg.norm(w - ANCHOR["a"]) ** 2)(ANCHOR["a"])).all()


def test_fedprox_pulls_towards_the_anchor():
    """Gradient steps on the penalty alone contract; a wrong sign pushes away; T-10."""
    prox, weights = FedProx(0.5), jnp.array([4.0])
    anchor = prox.init(jnp.array([1.0]))
    for _ in range(20):
        weights -= 0.5 * prox.update(jnp.zeros(1), anchor, weights)[0]
    np.testing.assert_allclose(weights, 1 + 3 * 0.75**20, rtol=1e-5)


def test_fedprox_anchor_survives_a_donated_original():
    prox, weights = FedProx(0.5), jnp.array([1.0, 2.0])
    anchor = prox.start_round((), RoundStart(weights))
    moved = jax.jit(lambda w: w + 1, donate_argnums=0)(weights)
    np.testing.assert_allclose(prox.update(jnp.zeros(2), anchor, moved)[0], 0.5)


def test_fedprox_anchor_is_set_anew_every_round():
    prox = FedProx(1.0)
    anchor = prox.start_round((), RoundStart(jnp.array([7.0])))
    np.testing.assert_allclose(prox.update(jnp.zeros(1), anchor, jnp.array([8.0]))[0], 1.0)
    assert not prox.carries_on


@pytest.mark.parametrize("cls", PENALTIES)
def test_missing_weights_say_what_to_do(cls):
    with pytest.raises(ValueError, match=r"update\(updates, state, params\)"):
        cls().update(jnp.ones(2), jnp.ones(2))


@pytest.mark.parametrize("cls", PENALTIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gradient_dtype_is_kept(cls, dtype):
    """Even where the weights are wider and the strength is a float32 array."""
    regularizer = cls(alpha=0.5).replace(alpha=jnp.float32(0.5))
    regularizer = jax.tree.map(jnp.float32, regularizer)
    got, _ = regularizer.update(jnp.ones(2, dtype), regularizer.init(jnp.ones(2)), jnp.ones(2))
    assert got.dtype == dtype


@pytest.mark.parametrize("cls", PENALTIES)
def test_sweep_over_the_strength(cls):
    def penalize(alpha):
        regularizer = cls(alpha=alpha)
        return regularizer.update(WEIGHTS, regularizer.init(ANCHOR), WEIGHTS)[0]["a"]

    strengths = jnp.array([0.1, 2.0])
    np.testing.assert_allclose(jax.vmap(penalize)(strengths), jnp.stack([penalize(0.1), penalize(2.0)]), rtol=1e-6)


def test_the_papers_name_is_accepted():
    assert FedProx(mu=0.25) == FedProx(alpha=0.25) == FedProx.from_config({"mu": 0.25})


@pytest.mark.parametrize("cls", PENALTIES)
def test_config_is_lossless(cls):
    regularizer = random_part(cls, seed=1)
    assert through_json(regularizer) == regularizer != cls()
    with pytest.raises(ValueError, match="alpha: expected a finite number at least 0"):
        cls(alpha=-1)
