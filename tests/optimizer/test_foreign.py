import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from steps import gradients, run, through_json

from jaxfed import FromOptax, Optimizer
from jaxfed.optimizer import foreign
from jaxfed.optimizer.schedules import ExponentialDecay

WEIGHTS = jnp.array([1.0, -2.0, 0.5, 3.0])


@pytest.mark.parametrize(
    ("name", "options"),
    [("scale_by_adam", {"b1": 0.8}), ("scale_by_lion", {}), ("clip_by_global_norm", {"max_norm": 0.5}), ("identity", {})],
)
def test_parts_of_optimizers_pass_as_they_are(name, options):
    expected, _ = run(getattr(optax, name)(**options), gradients(), WEIGHTS)
    np.testing.assert_allclose(run(FromOptax(name, **options), gradients(), WEIGHTS)[0], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adam", {"b2": 0.9}),
        ("sgd", {"momentum": 0.9, "nesterov": True}),
        ("adamw", {"weight_decay": 0.1}),
        ("contrib.prodigy", {}),
    ],
)
def test_complete_optimizers_step_as_in_optax(name, options):
    """Inside an Optimizer of rate 1, which subtracts what its modules return."""
    factory = optax.contrib.prodigy if "prodigy" in name else getattr(optax, name)
    alone, _ = run(factory(learning_rate=0.1, **options), gradients(), WEIGHTS)
    inside, _ = run(Optimizer(1.0, modules=[("optax", {"factory": name, "learning_rate": 0.1, **options})]), gradients(), WEIGHTS)
    np.testing.assert_allclose(inside, alone, rtol=1e-5, atol=1e-8)


def descends(name, factory):
    """Whether the updates for a positive gradient are negative after three steps; None if it needs more than that."""
    options = {"learning_rate": 0.1} if "learning_rate" in inspect.signature(factory).parameters else {}
    try:
        transformation = optax.with_extra_args_support(factory(**options))
        weights, gradient = jnp.ones((3, 4)), jnp.ones((3, 4))
        state = transformation.init(weights)
        for _ in range(3):
            extra = {"value": jnp.array(1.0), "grad": gradient, "value_fn": jnp.sum}
            update, state = transformation.update(gradient, state, weights, **extra)
    except (TypeError, ValueError):
        return None
    return None if abs(update.mean()) < 1e-5 else bool(update.mean() < 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_rule_of_signs_holds_for_all_of_optax():
    """A ``learning_rate`` descends, with named exceptions."""
    signs = {name: descends(name, factory) for name, factory in foreign._factories().items()}
    decided = {name: sign for name, sign in signs.items() if sign is not None}
    assert len(decided) > 70
    for name, sign in decided.items():
        options = {"learning_rate": 0.1} if "learning_rate" in inspect.signature(foreign._factories()[name]).parameters else {}
        assert FromOptax(name, **options).descent == sign, name


def test_ready_made_transformations_pass_unless_told():
    def update(module):
        return float(module.update(jnp.ones(()), module.init(jnp.ones(())))[0])

    with pytest.raises(ValueError, match="steps against the gradient by itself"):
        FromOptax(optax.sgd(0.1))
    plain, told = FromOptax(optax.sgd(0.1), descent=False), FromOptax(optax.sgd(0.1), descent=True)
    np.testing.assert_allclose([update(plain), update(told)], [-0.1, 0.1], rtol=1e-6)
    clip = Optimizer(1.0, modules=[optax.clip(0.5)]).modules[0]
    assert update(clip) == 0.5


def test_functions_are_factories():
    halve = FromOptax(functools.partial(optax.scale, step_size=0.5))
    np.testing.assert_allclose(run(halve, gradients())[0], 0.5 * gradients())
    assert FromOptax(optax.sgd, learning_rate=0.1).descent
    with pytest.raises(TypeError, match="expected a factory of optax transformations"):
        FromOptax(lambda: 3).init(WEIGHTS)


def test_numbers_are_leaves_that_sweep_without_a_retrace():
    traces = []

    @jax.jit
    def step(module):
        traces.append(1)
        return module.update(WEIGHTS, module.init(WEIGHTS))[0]

    slow, fast = (FromOptax("sgd", learning_rate=lr, momentum=0.9, nesterov=True) for lr in (0.1, 0.2))
    both = jnp.stack([step(slow), step(fast)])
    np.testing.assert_allclose(both, [0.19 * WEIGHTS, 0.38 * WEIGHTS], rtol=1e-6)
    assert len(traces) == 1
    assert jax.tree.leaves(slow) == [0.1, 0.9]
    swept = jax.vmap(lambda lr: slow.replace(learning_rate=lr).update(WEIGHTS, slow.init(WEIGHTS))[0])(jnp.array([0.1, 0.2]))
    np.testing.assert_allclose(swept, both, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_of_updates_and_state_are_kept(dtype):
    """A swept float32 number must not widen them, or no loop could carry the state."""
    module = FromOptax("adam", learning_rate=jnp.array([0.1]), b1=0.8)
    module = jax.tree.map(lambda x: jnp.float32(x).reshape(()), module)
    g = jnp.ones(3, dtype)
    state = module.init(g)
    update, after = module.update(g, state)
    assert update.dtype == dtype
    assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(state)]


def test_config_is_lossless():
    modules = [
        FromOptax("adam", learning_rate=0.1, b1=0.5, nesterov=True),
        FromOptax("adam", learning_rate=ExponentialDecay(0.1, 0.9), mu_dtype="float32"),
        FromOptax("scale_by_rprop", learning_rate=0.1, eta_minus=0.4, descent=True),
    ]
    for module in modules:
        assert through_json(module) == module
    assert modules[1].options["learning_rate"] == ExponentialDecay(0.1, 0.9)
    written = FromOptax("adam", learning_rate=0.1).get_config()
    assert written == {"factory": "adam", "descent": True, "learning_rate": 0.1}


def test_a_schedule_among_the_options_is_followed():
    module = FromOptax("sgd", learning_rate=["exponential-decay", {"base": 1.0, "rate": 0.5}])
    np.testing.assert_allclose(run(module, jnp.ones((3, 1)))[0][:, 0], [1.0, 0.5, 0.25])


@pytest.mark.parametrize("factory", [optax.adam, optax.clip(0.1)])
def test_what_is_no_data_has_no_config(factory):
    options = {"learning_rate": 0.1} if factory is optax.adam else {}
    with pytest.raises(ValueError, match="Name a factory of optax instead"):
        FromOptax(factory, **options).get_config()


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: FromOptax("adan_"), ValueError, "Did you mean"),
        (lambda: FromOptax("_src"), ValueError, "No factory of optax is called '_src'"),
        (lambda: FromOptax("apply_updates"), ValueError, "No factory"),
        (lambda: FromOptax("os.system"), ValueError, "No factory"),
        (lambda: FromOptax("adam"), ValueError, "adam needs learning_rate"),
        (lambda: FromOptax("adam", learning_rate=0.1, beta=1), ValueError, "adam has no option 'beta'"),
        (lambda: FromOptax("adam", learning_rate=float("nan")), ValueError, "FromOptax.learning_rate"),
        (lambda: FromOptax(optax.sgd(0.1), momentum=0.9), ValueError, "ready-made transformation has no option"),
        (lambda: FromOptax(3), TypeError, "FromOptax.factory: expected the name of a factory"),
        (lambda: FromOptax("sgd", learning_rate=0.1, descent="yes"), ValueError, "FromOptax.descent"),
        (lambda: FromOptax.from_config({"learning_rate": 0.1}), ValueError, "expected {'factory': name"),
        (lambda: foreign.wrap_optax("modules[0]", optax.adam), TypeError, "modules.0.: expected .* Call it first"),
        (lambda: foreign.wrap_optax("modules[0]", 3), TypeError, r"got 3 \(int\)"),
    ],
)
def test_bad_input_is_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_extra_arguments_reach_the_transformation():
    module = FromOptax(optax.polyak_sgd, max_learning_rate=1.0)
    assert module.descent
    update, _ = module.update(jnp.array([2.0]), module.init(jnp.ones(1)), jnp.ones(1), value=jnp.array(1.0))
    np.testing.assert_allclose(update, 0.5, rtol=1e-5)
