import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from steps import random_part, through_json

from jaxfed.optimizer.clipping import L2Clipping, L2GlobalClipping

TREE = {"a": jnp.array([[3.0, 4.0]]), "b": jnp.array([0.3, 0.4]), "c": jnp.array(-12.0)}


def clip(module, tree):
    return module.update(tree, module.init(tree))[0]


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 13.5, 100.0])
def test_global_clipping_equals_optax(max_norm):
    expected, _ = optax.clip_by_global_norm(max_norm).update(TREE, optax.EmptyState())
    clipped = clip(L2GlobalClipping(max_norm), TREE)
    for name in TREE:
        np.testing.assert_allclose(clipped[name], expected[name], rtol=1e-6)


def test_each_leaf_is_clipped_by_itself():
    clipped = clip(L2Clipping(1.0), TREE)
    for name, expected in {"a": [[0.6, 0.8]], "b": [0.3, 0.4], "c": -1.0}.items():
        np.testing.assert_allclose(clipped[name], expected, rtol=1e-6)


def test_only_global_clipping_bounds_the_whole():
    """Per leaf, L leaves have a norm of up to sqrt(L) times the bound; T-02."""
    big = jax.tree.map(lambda x: 100 * x, TREE)
    np.testing.assert_allclose(optax.tree.norm(clip(L2GlobalClipping(2.0), big)), 2.0, rtol=1e-6)
    np.testing.assert_allclose(optax.tree.norm(clip(L2Clipping(2.0), big)), 2.0 * np.sqrt(3), rtol=1e-6)


@pytest.mark.parametrize("module", [L2Clipping(0.5), L2GlobalClipping(0.5)])
def test_zero_stays_zero_and_nan_shows(module):
    """T-20. Compiled and under debug_nans, which an inner 0 / 0 would trip."""
    with jax.debug_nans(True):
        zeros = jax.jit(clip)(module, jax.tree.map(jnp.zeros_like, TREE))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(zeros))
    assert jnp.isnan(clip(module, jnp.array([1.0, jnp.nan]))).any()
    assert clip(module, {}) == {}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_norms_are_summed_in_float32(dtype):
    """Ten thousand squares of 0.1 add up to 32 in bfloat16, and 300 squared overflows float16."""
    many = jnp.full(10_000, 0.1, dtype)
    clipped = clip(L2GlobalClipping(1.0), many)
    assert clipped.dtype == dtype
    np.testing.assert_allclose(clipped.astype(np.float32), 0.01, rtol=1e-2)
    large = clip(L2Clipping(1.0), jnp.array([300.0, 400.0], dtype))
    np.testing.assert_allclose(large.astype(np.float32), [0.6, 0.8], rtol=1e-2)


@pytest.mark.parametrize("cls", [L2Clipping, L2GlobalClipping])
def test_sweep_and_config(cls):
    swept = jax.vmap(lambda c: clip(cls(c), TREE)["a"])(jnp.array([0.5, 2.0]))
    np.testing.assert_allclose(swept, jnp.stack([clip(cls(c), TREE)["a"] for c in (0.5, 2.0)]), rtol=1e-6)
    module = random_part(cls, seed=3)
    assert through_json(module) == module != cls()
    with pytest.raises(ValueError, match="max_norm: expected a finite number above 0"):
        cls(0)
