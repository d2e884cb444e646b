"""The papers' models: their sizes, their formulas and their options."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfed.models import image_loops, reference

RNG = np.random.default_rng(0)
TEXT = {"x": np.array([[1, 2, 3], [3, 2, 1]]), "y": np.array([[2, 3, 4], [2, 1, 1]])}
IMAGES = {"x": RNG.integers(0, 256, (4, 28, 28)).astype("uint8"), "y": np.array([0, 3, 1, 9])}


def _weights(model):
    """Normal weights in the model's shapes: quicker than compiling its initializers."""
    params, _ = jax.eval_shape(model.init, _key())
    return jax.tree.map(lambda x: jnp.asarray(RNG.normal(0, 0.05, x.shape), x.dtype), params)


def _ones(shapes):
    return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)


def _key(seed=0):
    return jax.random.key(seed)


def _batch(sample):
    return {key: jnp.array(value) for key, value in sample.items()} | {"mask": jnp.ones(len(sample["y"]), bool)}


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("logistic-regression", {"classes": 10}, 784 * 10 + 10),
        ("mlp", {"classes": 10}, 199_210),  # the 2NN of McMahan et al., section 3
        ("emnist-cnn", {}, 1_206_590),
        ("mnist-cnn", {}, 1_663_370),  # McMahan et al., section 3
        ("lenet", {}, 44_426),
        # Convolutions and two numbers a channel for the batch norm, then 3136 -> 2048 -> 62.
        ("convnet2", {}, (25 * 32 + 32 + 64) + (25 * 32 * 64 + 64 + 128) + (3136 * 2048 + 2048) + (2048 * 62 + 62)),
    ],
)
def test_sizes_are_the_papers(name, options, size):
    params, stats = jax.eval_shape(reference.build_model(name, IMAGES, **options).init, _key())
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == size
    assert (stats == {}) == (name != "convnet2")


def test_kernels_begin_glorot_uniform_and_biases_at_zero():
    sample = {"x": np.zeros((1, 60)), "y": np.zeros(1, int)}
    params, _ = jax.jit(reference.mlp(sample, hidden=(90,), classes=2).init)(_key())
    kernel, limit = params["Dense_0"]["kernel"], np.sqrt(6 / (60 + 90))
    assert 0.99 * limit < jnp.abs(kernel).max() <= limit
    assert abs(kernel.std() / (limit / np.sqrt(3)) - 1) < 0.03  # 5 sigma of 5,400 uniform draws
    assert not any(layer["bias"].any() for layer in params.values())


@pytest.mark.parametrize("name", ["logistic-regression", "mlp", "emnist-cnn", "mnist-cnn", "lenet"])
def test_images_may_be_bytes_or_floats_with_or_without_channel(name):
    model = reference.build_model(name, IMAGES, classes=10)
    params, stats = _weights(model), {}
    scaled = IMAGES["x"].astype("float32") / 255
    predict = jax.jit(model.predict)
    expected = predict(params, stats, {"x": jnp.array(scaled)})
    assert expected.shape == (4, 10)
    for x in (IMAGES["x"], IMAGES["x"][..., None], scaled[..., None]):
        np.testing.assert_allclose(predict(params, stats, {"x": jnp.array(x)}), expected, rtol=1e-5, atol=1e-6)


def _emnist_forward(params, x):
    """The same network in lax convolutions and Flax's pooling."""
    for layer in ("Conv_0", "Conv_1"):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, params[layer]["kernel"], (1, 1), "VALID", dimension_numbers=numbers)
        x = jnp.maximum(x + params[layer]["bias"].reshape(1, 1, 1, -1), 0)
    x = nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)
    x = jnp.maximum(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None], 0)
    return x @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"][None]


def test_emnist_cnn_and_its_gradient_equal_plain_lax():
    model, batch = reference.emnist_cnn(IMAGES, dropout=(0, 0)), _batch(IMAGES)
    params, stats = _weights(model), {}

    def plain(params):
        logits = _emnist_forward(params, batch["x"][..., None] / 255.0)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    value, gradient = jax.jit(jax.value_and_grad(lambda p: model.loss(p, stats, batch, _key())[0].mean()))(params)
    expected, expected_gradient = jax.jit(jax.value_and_grad(plain))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradient, expected_gradient)


def test_char_lstm_equals_the_layers_of_flax():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Embed(5, 8)(x)
            for width in (6, 7):
                x = nn.RNN(nn.OptimizedLSTMCell(width))(x)
            return nn.Dense(5)(x)

    model = reference.char_lstm(TEXT, classes=5, hidden=(6, 7))
    params = _weights(model)

    def plain(params):
        logits = Plain().apply({"params": params}, jnp.asarray(TEXT["x"]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, TEXT["y"]).mean()

    value, gradient = jax.jit(jax.value_and_grad(lambda p: model.loss(p, {}, _batch(TEXT), _key())[0].mean()))(params)
    expected, expected_gradient = jax.jit(jax.value_and_grad(plain))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), gradient, expected_gradient)


def test_char_lstm_has_the_size_of_the_paper():
    params, _ = jax.eval_shape(reference.char_lstm(TEXT).init, _key())
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 820_522  # Reddi et al., table 6


def test_convnet2_is_its_layers():
    """Convolution, batch norm by running statistics, ReLU and pooling, twice; then two dense layers."""
    model, batch = reference.convnet2(IMAGES, hidden=32), _batch(IMAGES)
    params, stats = _weights(model), _ones(jax.eval_shape(model.init, _key())[1])
    x = batch["x"][..., None] / jnp.float32(255)
    for layer in "01":
        kernel, norm = params[f"Conv_{layer}"]["kernel"], params[f"BatchNorm_{layer}"]
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = x + params[f"Conv_{layer}"]["bias"].reshape(1, 1, 1, -1) - 1  # a running mean of 1
        x = x / jnp.sqrt(1 + 1e-5) * norm["scale"].reshape(1, 1, 1, -1) + norm["bias"].reshape(1, 1, 1, -1)
        x = nn.max_pool(jnp.maximum(x, 0), (2, 2), (2, 2))
    x = x.reshape(4, -1) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None]
    logits = jnp.maximum(x, 0) @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"][None]
    np.testing.assert_allclose(model.predict(params, stats, batch), logits, rtol=1e-4, atol=1e-5)


def test_lenet_is_its_layers():
    model, batch = reference.lenet(IMAGES), _batch(IMAGES)
    params = _weights(model)
    x = batch["x"][..., None] / jnp.float32(255)
    for layer in ("Conv_0", "Conv_1"):
        kernel, bias = params[layer]["kernel"], params[layer]["bias"].reshape(1, 1, 1, -1)
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")) + bias
        x = nn.max_pool(jnp.maximum(x, 0), (2, 2), (2, 2))
    x = x.reshape(4, -1)
    for layer in ("Dense_0", "Dense_1", "Dense_2"):
        x = jnp.maximum(x, 0) if layer != "Dense_0" else x
        x = x @ params[layer]["kernel"] + params[layer]["bias"][None]
    np.testing.assert_allclose(model.predict(params, {}, batch), x, rtol=1e-4, atol=1e-5)


def test_emnist_cnn_drops_out_in_training_only():
    model, batch = reference.emnist_cnn(IMAGES), _batch(IMAGES)
    params, stats = _weights(model), {}
    one, other = jax.jit(jax.vmap(lambda key: model.loss(params, stats, batch, key)[0]))(jax.random.split(_key()))
    assert not np.allclose(one, other)
    still = reference.emnist_cnn(IMAGES, dropout=(0, 0))
    expected = jax.jit(still.loss)(params, stats, batch, _key())[0]
    np.testing.assert_allclose(jax.jit(model.loss)(params, stats, batch, None)[0], expected, rtol=1e-5)


def test_logistic_regression_begins_at_the_uniform_guess():
    model = reference.logistic_regression(IMAGES)
    params, stats = jax.jit(model.init)(_key())
    batch = _batch(IMAGES)
    np.testing.assert_allclose(model.metrics(params, stats, batch)["loss"], np.log(10), rtol=1e-6)
    gradient = jax.grad(lambda p: model.loss(p, stats, batch, _key())[0].mean())(params)
    x = IMAGES["x"].reshape(4, -1) / 255.0
    residual = (0.1 - np.eye(10)[IMAGES["y"]]) / 4
    np.testing.assert_allclose(gradient["Dense_0"]["kernel"], x.T @ residual, rtol=1e-4, atol=1e-6)


def test_mlp_equals_its_formula():
    sample = {"x": RNG.normal(size=(5, 3)).astype("float32"), "y": np.array([0, 1, 2, 3, 1])}
    model = reference.mlp(sample, hidden=[6, 4])
    params, stats = jax.jit(model.init)(_key())
    x = sample["x"]
    for layer in ("Dense_0", "Dense_1"):
        x = np.maximum(x @ np.asarray(params[layer]["kernel"]), 0)
    np.testing.assert_allclose(
        model.predict(params, stats, _batch(sample)), x @ params["Dense_2"]["kernel"], rtol=1e-5, atol=1e-6
    )
    assert x.shape == (5, 4)


@pytest.mark.parametrize("name", ["emnist-cnn", "mnist-cnn", "convnet2"])
def test_convolutions_leave_out_rows_that_are_not_there(name, monkeypatch):
    masks = []
    monkeypatch.setattr(image_loops, "present", lambda mask: masks.append(mask) or jnp.int32(len(mask)))
    model = reference.build_model(name, IMAGES)
    jax.eval_shape(model.loss, *jax.eval_shape(model.init, _key()), _batch(IMAGES), _key())
    assert [mask.shape for mask in masks if len(mask) == 4] == [(4,)]  # the second convolution's; the first is too small


@pytest.mark.parametrize("name", reference.MODELS)
def test_every_model_takes_a_sample_and_keyword_options(name):
    first, *options = inspect.signature(reference.MODELS[name]).parameters.values()
    assert first.name == "sample"
    assert all(option.kind is option.KEYWORD_ONLY and option.default is not option.empty for option in options)


@pytest.mark.parametrize(
    ("name", "changes", "options", "text"),
    [
        ("emnist", {}, {}, "No model is called 'emnist'. Did you mean 'emnist-cnn'"),
        ("mlp", {}, {"width": 3}, "mlp has no option 'width'. It accepts: hidden, classes"),
        ("mlp", {}, {"hidden": (0,)}, "mlp: hidden: expected an integer at least 1"),
        ("mlp", {"y": np.zeros(4)}, {}, "Expected integer class labels at 'y', got float64. Cast"),
        ("mlp", {"y": np.array([1, 2, -1, 0])}, {}, "from 0 up, got -1 to 2"),
        ("mnist-cnn", {"y": np.array([1, 2, 10, 0])}, {}, "from 0 to 9, got 0 to 10"),
        ("mnist-cnn", {"x": np.zeros((4, 784))}, {}, r"Expected images at \"x\".* got rows of \(784,\)"),
        ("emnist-cnn", {}, {"dropout": (0.5,)}, "expected two dropout rates, got 1"),
        ("emnist-cnn", {}, {"dropout": (0.5, 1.0)}, "emnist_cnn: dropout: expected a finite number at least 0 and below 1"),
        ("char-lstm", TEXT, {"classes": 4}, "from 0 to 3, got 1 to 4"),
        ("char-lstm", TEXT | {"y": np.zeros(2, int)}, {}, r"both \[B, T\], got rows of \(3,\) and \(\)"),
        ("char-lstm", TEXT | {"x": TEXT["x"] / 2}, {}, "Expected integer class labels"),
        ("logistic-regression", {"x": np.zeros((0, 3)), "y": np.zeros(0, int)}, {}, "at least one row"),
    ],
)
def test_bad_options_and_data_are_refused(name, changes, options, text):
    with pytest.raises(ValueError, match=text):
        reference.build_model(name, {**IMAGES, **changes}, **options)
