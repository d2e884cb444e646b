import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import gradients, random_part, run, through_json

from jaxfed import part
from jaxfed.optimizer.adaptive import Adagrad, Adam, RMSProp, Yogi, correction

MODULES = (Adagrad, RMSProp, Adam, Yogi)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_correction_is_precise_in_float32(decay, steps):
    """The plain power is off by 1.3e-5 at (0.999, 1); T-08."""
    expected = -np.expm1(steps * np.log(decay)) if decay else 1.0
    np.testing.assert_allclose(correction(decay, steps, jnp.ones(())), expected, rtol=2.5e-7)
    assert abs((1 - np.float32(0.999) ** 1) / 0.001 - 1) > 1e-5


@pytest.mark.parametrize("cls", [Adam, Yogi])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.999, 0.999)])
def test_first_step_is_the_sign(cls, betas):
    """Compiled with the decays as arguments, and as constants."""
    module, g = cls(*betas, eps=0.0), jnp.array([3.0, -1e-3, 0.0, 7e5])
    for first in (jax.jit(lambda m: m.update(g, m.init(g))[0])(module), module.update(g, module.init(g))[0]):
        np.testing.assert_allclose(first, [1, -1, 0, 1], rtol=4e-7)


def test_eager_rmsprop_forgets_with_a_decay_of_zero():
    updates, _ = run(RMSProp(beta=0.0, eps=0.0), jnp.array([[1e4], [1e-4]]))
    np.testing.assert_allclose(updates, 1.0, rtol=1e-6)


def adam_by_hand(g, b1, b2, eps, maximum):
    """AMSGrad in float64; ``maximum(v, v_max, b2, t) -> (divisor, v_max)``."""
    m = v = v_max = np.zeros(g.shape[1])
    for t, now in enumerate(g.astype(np.float64), start=1):
        m, v = b1 * m + (1 - b1) * now, b2 * v + (1 - b2) * now**2
        divisor, v_max = maximum(v, v_max, 1 - b2**t)
        yield m / (1 - b1**t) / (np.sqrt(divisor) + eps)


def before(v, v_max, c):
    return (np.maximum(v / c, v_max),) * 2


def after(v, v_max, c):
    return np.maximum(v, v_max) / c, np.maximum(v, v_max)


@pytest.mark.parametrize(("when", "maximum"), [("before-max", before), ("after-max", after)])
def test_amsgrad_takes_the_maximum_before_or_after_the_correction(when, maximum):
    """T-23: the two differ once gradients shrink."""
    g = gradients() * np.array([[10.0], [1], [1], [1], [1], [1]], np.float32)
    updates, _ = run(Adam(amsgrad=True, bias_correction=when), g)
    np.testing.assert_allclose(updates, list(adam_by_hand(g, 0.9, 0.99, 1e-7, maximum)), rtol=5e-6, atol=1e-6)
    other = {"before-max": "after-max", "after-max": "before-max"}[when]
    assert abs(run(Adam(amsgrad=True, bias_correction=other), g)[0] - updates).max() > 1e-2


@pytest.mark.parametrize("cls", MODULES)
@pytest.mark.parametrize("eps", [0.0, 1e-7])
def test_zero_gradients_give_zero_and_nan_shows(cls, eps):
    updates, _ = run(cls(eps=eps), jnp.zeros((3, 2)))
    assert (updates == 0).all()
    assert jnp.isnan(run(cls(eps=eps), jnp.array([[jnp.nan]]))[0]).all()


@pytest.mark.parametrize("cls", MODULES)
@pytest.mark.parametrize("params", [jnp.ones(()), {}, {"a": {}, "b": [jnp.ones((0, 3))]}])
def test_odd_trees(cls, params):
    module = cls()
    updates, _ = module.update(params, module.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.parametrize("cls", MODULES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_small_gradients_survive_low_precision(cls, dtype):
    """The square of 1e-4 is zero in float16, and a step divided by its root 1000 times too long."""
    g = (1e-4 * gradients()).astype(dtype)
    updates, state = run(cls(), jnp.asarray(g))
    assert updates.dtype == dtype
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} <= {"float32", "int32"}
    wide, _ = run(cls(), jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(updates.astype(np.float32), wide, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("cls", MODULES)
def test_float64_stays_float64(cls, x64):
    updates, state = run(cls(), gradients().astype(np.float64))
    assert updates.dtype == "float64"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} <= {"float64", "int32"}


@pytest.mark.parametrize("cls", MODULES)
def test_sweep_over_every_number_equals_a_loop(cls):
    module, g = random_part(cls, seed=4), gradients()
    other = jax.tree.map(lambda x: 0.5 * x, module)
    both = jax.tree.map(lambda *x: jnp.stack(x), *[jax.tree.map(jnp.asarray, m) for m in (module, other)])
    swept = jax.vmap(lambda m: run(m, g)[0])(both)
    np.testing.assert_allclose(swept, jnp.stack([run(module, g)[0], run(other, g)[0]]), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("cls", MODULES)
def test_a_changed_number_compiles_nothing(cls):
    traces = []

    @jax.jit
    def step(module, g):
        traces.append(1)
        return module.update(g, module.init(g))[0]

    first, second = step(cls(), jnp.ones(2)), step(cls(eps=1), jnp.ones(2))
    assert len(traces) == 1
    assert (first != second).all()


@pytest.mark.parametrize("cls", MODULES)
@pytest.mark.parametrize("seed", range(3))
def test_config_is_lossless(cls, seed):
    module = random_part(cls, seed)
    assert through_json(module) == module != cls()
    assert not through_json(module).carries_on


def test_the_guides_names_are_accepted():
    """T-32."""
    assert part.build("module", ("adam", {"beta1": 0.8, "beta2": 0.7})) == Adam(b1=0.8, b2=0.7) == Adam(0.8, 0.7)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"beta_1": 1}, ValueError, "Adam.beta_1: expected a finite number at least 0 and below 1, got 1"),
        ({"eps": -1}, ValueError, "Adam.eps"),
        ({"eps": "1e-3"}, TypeError, "Adam.eps: expected a number"),
        ({"bias_correction": "before_max"}, ValueError, "Did you mean 'before-max'"),
        ({"step_offset": 0.5}, TypeError, "Adam.step_offset: expected an integer"),
    ],
)
def test_bad_values_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        Adam(**options)
