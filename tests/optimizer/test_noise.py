import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from steps import random_part, through_json

from jaxfed import RoundStart
from jaxfed.optimizer.noise import GaussianNoise, LaplaceNoise

SIZE = 20_000
KINDS = {GaussianNoise: stats.norm, LaplaceNoise: stats.laplace}
ZEROS = {"a": jnp.zeros((SIZE // 2, 2)), "b": jnp.zeros(SIZE)}


def draws(module, key=0, steps=1, tree=None):
    """The noise of each step of one client's round."""
    tree = ZEROS if tree is None else tree
    state, noise = module.start_round((), RoundStart(tree, key=jax.random.key(key))), []
    for _ in range(steps):
        update, state = module.update(tree, state)
        noise.append(update)
    return noise


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_distribution_and_scale(cls, scale):
    """Kolmogorov and Smirnov accept the scale, and refuse 2/3 and 3/2 of it."""
    noise = np.asarray(draws(cls(scale))[0]["b"], np.float64)
    right, small, large = (stats.kstest(noise, KINDS[cls](scale=s).cdf).pvalue for s in (scale, scale * 2 / 3, scale * 3 / 2))
    assert right > 1e-3
    assert max(small, large) < 1e-9


@pytest.mark.parametrize("cls", KINDS)
def test_clients_steps_and_leaves_are_independent(cls):
    (first, second), (other,) = draws(cls(), key=1, steps=2), draws(cls(), key=2)
    columns = [first["a"].ravel(), first["b"], second["a"].ravel(), second["b"], other["a"].ravel(), other["b"]]
    correlation = np.corrcoef(np.stack(columns)) - np.eye(len(columns))
    assert abs(correlation).max() < 5 / np.sqrt(SIZE)


@pytest.mark.parametrize("cls", KINDS)
def test_the_key_decides_and_a_seed_is_folded_in(cls):
    same, again, seeded = (draws(cls(seed=seed), key=3)[0]["b"] for seed in (None, None, 5))
    assert (same == again).all()
    assert (same != seeded).mean() > 0.99
    assert (seeded != draws(cls(seed=5), key=4)[0]["b"]).mean() > 0.99


@pytest.mark.parametrize("cls", KINDS)
def test_no_noise_from_nowhere(cls):
    """From the weights alone every client would draw the same."""
    with pytest.raises(ValueError, match=r"has no key. Give it a seed .*start_round"):
        cls().init(ZEROS)
    with pytest.raises(ValueError, match="has no key"):
        cls().start_round((), RoundStart(ZEROS))
    assert cls(seed=0).init(ZEROS).steps == 0
    assert not cls().carries_on


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_kept_and_all_is_finite(cls, dtype):
    """declearn returns float64 for float32 gradients, and an infinity once in 3e7; T-13."""
    noise = draws(cls(1.0), tree=jnp.zeros(1_000_000, dtype))[0]
    assert noise.dtype == dtype
    assert jnp.isfinite(noise).all()
    assert len(np.unique(noise.astype(np.float32))) > 1000


@pytest.mark.parametrize("cls", KINDS)
def test_float64_is_drawn_in_float64(cls, x64):
    noise = draws(cls(), tree=jnp.zeros(1000, "float64"))[0]
    assert noise.dtype == "float64"
    assert (noise != noise.astype("float32")).mean() > 0.9


@pytest.mark.parametrize("cls", KINDS)
def test_noise_is_added(cls):
    ones = jax.tree.map(jnp.ones_like, ZEROS)
    np.testing.assert_allclose(draws(cls(), tree=ones)[0]["b"], 1 + draws(cls())[0]["b"], rtol=1e-6)
    assert (draws(cls(0.0), tree=ones)[0]["a"] == 1).all()


@pytest.mark.parametrize("cls", KINDS)
def test_compiled_over_clients_and_scales_equals_a_loop(cls):
    def noise(key, scale):
        start = RoundStart(jnp.zeros(5), key=key)
        return cls(scale).update(jnp.zeros(5), cls(scale).start_round((), start))[0]

    keys, scales = jax.random.split(jax.random.key(7), 2), jnp.array([0.5, 3.0])
    loop = jnp.stack([noise(jax.random.clone(key), s) for key, s in zip(keys, scales)])
    np.testing.assert_allclose(jax.jit(jax.vmap(noise))(keys, scales), loop, rtol=1e-5)


@pytest.mark.parametrize("cls", KINDS)
def test_config_is_lossless(cls):
    module = random_part(cls, seed=6)
    assert through_json(module) == module != cls()


def test_safe_mode_is_accepted_and_warns():
    with pytest.warns(UserWarning, match="safe_mode has no effect"):
        module = GaussianNoise(0.5, safe_mode=True)
    with pytest.warns(UserWarning, match="safe_mode"):
        assert through_json(module) == module


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [({"std": -1}, ValueError, "std"), ({"seed": 0.5}, TypeError, "seed"), ({"seed": 2**32}, ValueError, r"below 2\*\*32")],
)
def test_bad_values_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        GaussianNoise(**options)
