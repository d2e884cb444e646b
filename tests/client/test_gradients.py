"""Losses as Models, and the mean gradient over real rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxfed import MeanGradient, Model
from jaxfed.client.gradients import as_model, masked_mean

KEY = jax.random.key(0)


def loss(params, batch, key):
    return jnp.square(batch["x"] * params)


def loss_with_metrics(params, batch, key):
    return loss(params, batch, key), {"sign": jnp.sign(batch["x"])}


def batch(values, mask):
    return {"x": jnp.array(values, jnp.float32), "mask": jnp.array(mask)}


def test_a_plain_loss_is_lifted():
    model = as_model("loss", loss)
    values, stats = model.loss(2.0, {"seen": 1}, batch([1, 3], [True, True]), KEY)
    assert values.tolist() == [4.0, 36.0]
    assert stats == {"seen": 1}
    assert {k: v.tolist() for k, v in model.metrics(2.0, {}, batch([1, 3], [True, True])).items()} == {"loss": [4.0, 36.0]}


def test_metrics_of_a_loss_join_its_evaluation():
    metrics = as_model("loss", loss_with_metrics).metrics(2.0, {}, batch([1, -3], [True, True]))
    assert {k: v.tolist() for k, v in metrics.items()} == {"loss": [4.0, 36.0], "sign": [1.0, -1.0]}


def scaled(scale, params, batch, key):
    return scale * loss(params, batch, key)


def test_arrays_bound_to_a_loss_are_leaves():
    model = as_model("loss", Partial(scaled, jnp.array(3.0)))
    assert set(map(float, jax.tree.leaves(model))) == {3.0}
    assert model.loss(1.0, {}, batch([2.0], [True]), KEY)[0].tolist() == [12.0]


def test_models_pass_and_equal_losses_make_equal_models():
    model = as_model("loss", loss)
    assert as_model("loss", model) is model
    assert jax.tree.structure(as_model("loss", loss)) == jax.tree.structure(model)


@pytest.mark.parametrize("value", [3.0, "softmax", None])
def test_what_is_no_loss_is_refused(value):
    with pytest.raises(TypeError, match=r"expected a loss\(params, batch, key\) or a Model, got"):
        as_model("loss", value)


@pytest.mark.parametrize("name", ["init", "predict"])
def test_a_plain_loss_says_what_it_cannot_do(name):
    model = as_model("loss", loss)
    with pytest.raises(ValueError, match="is a plain loss"):
        getattr(model, name)(*[KEY] * {"init": 1, "predict": 3}[name])


@pytest.mark.parametrize(
    ("values", "mask", "mean"),
    [([1, 2, 6], [1, 1, 1], 3), ([1, 2, 6], [1, 0, 1], 3.5), ([1, 2, 6], [0, 0, 0], 0), ([1, np.nan, np.inf], [1, 0, 0], 1)],
)
def test_masked_mean(values, mask, mean):
    assert float(masked_mean(jnp.array(values, jnp.float32), jnp.array(mask, bool))) == mean


@pytest.mark.parametrize("shape", [(), (1,), (3, 1)])
def test_a_loss_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"must give values of shape \[B\] = \(3,\), got"):
        masked_mean(jnp.zeros(shape), jnp.ones(3, bool))


@pytest.mark.parametrize("mask", [[True] * 4, [True, True, False, False], [False] * 4])
def test_the_gradient_of_the_mean_over_real_rows(mask):
    x = np.array([1.0, 2.0, 3.0, 4.0])
    value, stats, gradient = MeanGradient()(as_model("loss", loss), jnp.array(3.0), {}, batch(x, mask), KEY)
    mean = np.square(x[mask]).mean() if any(mask) else 0.0
    assert float(value) == pytest.approx(9 * mean)
    assert float(gradient) == pytest.approx(2 * 3 * mean)
    assert stats == {}


def infinite_slope(params, batch, key):
    return jnp.sqrt(batch["x"] * params)


def test_a_masked_row_with_a_finite_slope_leaves_no_trace():
    values, params = [1.0, 1e6], jnp.array(4.0)
    _, _, gradient = MeanGradient()(as_model("loss", infinite_slope), params, {}, batch(values, [True, False]), KEY)
    assert float(gradient) == 0.25


def counting(params, stats, batch, key):
    return params * batch["x"], {"rows": stats["rows"] + batch["mask"].sum()}


def test_statistics_train_along_and_carry_no_gradient():
    model = Model(loss, counting, loss, loss)
    _, stats, gradient = MeanGradient()(model, jnp.array(1.0), {"rows": jnp.array(5)}, batch([1, 2, 6], [True, True, False]), KEY)
    assert int(stats["rows"]) == 7
    assert float(gradient) == 1.5
