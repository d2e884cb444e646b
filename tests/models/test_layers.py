"""Convolution and pooling against ``jax.lax`` and Flax, values and gradients."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.test_util import check_grads

from jaxfed.models import layers

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
LAST = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NHWDC", "HWDIO", "NHWDC")}

# inputs [B, *space, c], window, outputs, strides, padding, kernel dilation, groups
CONVOLUTIONS = {
    "3x3": ((4, 8, 8, 3), (3, 3), 5, (1, 1), "VALID", (1, 1), 1),
    "same": ((2, 7, 6, 3), (3, 3), 4, (1, 1), "SAME", (1, 1), 1),
    "even window, same": ((2, 7, 6, 3), (4, 2), 4, (1, 1), "SAME", (1, 1), 1),
    "same lower": ((2, 7, 6, 3), (4, 2), 4, (2, 2), "SAME_LOWER", (1, 1), 1),
    "1x1": ((3, 5, 5, 7), (1, 1), 4, (1, 1), "VALID", (1, 1), 1),
    "1x1 strided": ((3, 6, 5, 7), (1, 1), 4, (2, 2), "VALID", (1, 1), 1),
    "window is the image": ((3, 4, 4, 2), (4, 4), 6, (1, 1), "VALID", (1, 1), 1),
    "strides that leave a rest": ((3, 10, 9, 2), (3, 3), 4, (2, 3), "VALID", (1, 1), 1),
    "stride over the window": ((2, 11, 11, 2), (2, 2), 3, (4, 3), "SAME", (1, 1), 1),
    "pairs": ((2, 6, 6, 2), (3, 3), 3, (1, 2), ((2, 0), (1, 3)), (1, 1), 1),
    "negative pairs crop": ((2, 9, 9, 2), (3, 3), 3, (1, 1), ((-1, 0), (0, -2)), (1, 1), 1),
    "dilated": ((2, 10, 9, 2), (3, 3), 3, (1, 1), "SAME", (2, 3), 1),
    "dilated, strided": ((2, 11, 9, 2), (3, 2), 3, (2, 1), "VALID", (2, 3), 1),
    "groups": ((2, 6, 6, 6), (3, 3), 9, (1, 1), "SAME", (1, 1), 3),
    "groups, strided, dilated": ((2, 9, 8, 4), (3, 2), 6, (2, 1), ((1, 1), (0, 2)), (2, 1), 2),
    "depthwise": ((2, 6, 6, 4), (3, 3), 4, (1, 1), "SAME", (1, 1), 4),
    "depthwise, multiplied": ((2, 6, 6, 3), (3, 3), 6, (2, 2), "SAME", (1, 1), 3),
    "image by image": ((3, 30, 30, 40), (3, 3), 2, (1, 1), "VALID", (1, 1), 1),
    "in groups of images": ((6, 14, 14, 40), (3, 3), 2, (1, 2), "SAME", (1, 2), 1),
    "few rows, many weights": ((1, 3, 3, 40), (3, 3), 8, (1, 1), "VALID", (1, 1), 1),
    "one axis": ((3, 12, 4), (3,), 5, (2,), "SAME", (1,), 1),
    "one axis, causal": ((3, 12, 4), (3,), 5, (1,), ((4, 0),), (2,), 1),
    "three axes": ((2, 5, 4, 6, 2), (2, 3, 2), 3, (1, 2, 1), "SAME", (1, 1, 2), 1),
}


def _close(got, expected, dtype, scale=1.0):
    assert got.dtype == expected.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


def _normal(seed, shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _arrays(shape, window, outputs, groups, dtype):
    return _normal(0, shape, dtype), _normal(1, (*window, shape[-1] // groups, outputs), dtype)


def _value_and_gradients(function, *arguments):
    """The output and the pull-back of a fixed random cotangent."""
    cotangent = _normal(9, jax.eval_shape(function, *arguments).shape, arguments[0].dtype)

    def run(*arguments):
        out, pull = jax.vjp(function, *arguments)
        return out, *pull(cotangent)

    return jax.jit(run)(*arguments)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float64") for name in CONVOLUTIONS] + [(name, "float32") for name in ("3x3", "groups", "depthwise")],
)
def test_convolution_and_its_gradients_equal_lax(name, dtype):
    shape, window, outputs, strides, padding, dilation, groups = CONVOLUTIONS[name]
    options = {"rhs_dilation": dilation, "feature_group_count": groups, "dimension_numbers": LAST[len(window)]}
    with jax.enable_x64(True):
        arrays = _arrays(shape, window, outputs, groups, dtype)
        ours, theirs = (
            _value_and_gradients(lambda x, k, conv=conv: conv(x, k, strides, padding, **options), *arrays)
            for conv in (layers.conv_general_dilated, lax.conv_general_dilated)
        )
        for got, expected in zip(ours, theirs):
            _close(got, expected, dtype, scale=10.0)


@pytest.mark.parametrize("numbers", [None, ("NCHW", "OIHW", "NCHW"), ("CNHW", "HWOI", "NHCW")], ids=str)
def test_other_layouts_are_transposed(numbers):
    shape = (4, 2, 7, 6) if numbers and numbers[0] == "CNHW" else (2, 4, 7, 6)
    kernel = (3, 2, 5, 4) if numbers and numbers[1] == "HWOI" else (5, 4, 3, 2)
    x, k = _normal(0, shape), _normal(1, kernel)
    ours, theirs = (
        conv(x, k, (2, 1), "SAME", dimension_numbers=numbers) for conv in (layers.conv_general_dilated, lax.conv_general_dilated)
    )
    _close(ours, theirs, "float32", scale=10.0)


def test_input_dilation_is_a_transposed_convolution():
    x, k = _arrays((2, 5, 4, 3), (3, 3), 2, 1, "float32")
    options = {"lhs_dilation": (2, 3), "dimension_numbers": LAST[2]}
    ours, theirs = (
        _value_and_gradients(lambda x, k, conv=conv: conv(x, k, (1, 1), ((2, 2), (1, 2)), **options), x, k)
        for conv in (layers.conv_general_dilated, lax.conv_general_dilated)
    )
    for got, expected in zip(ours, theirs):
        _close(got, expected, "float32", scale=10.0)


def test_bfloat16_can_accumulate_in_float32():
    x, k = _arrays((2, 5, 5, 4), (3, 3), 4, 1, "bfloat16")
    for groups, kernel in ((1, k), (4, k[:, :, :1])):
        options = {"dimension_numbers": LAST[2], "feature_group_count": groups, "preferred_element_type": jnp.float32}
        wide = layers.conv_general_dilated(x, kernel, (1, 1), "VALID", **options)
        exact = lax.conv_general_dilated(x.astype("f4"), kernel.astype("f4"), (1, 1), "VALID", **options)
        _close(wide, exact, "float32", scale=10.0)


def test_gradients_agree_with_finite_differences_in_both_modes():
    with jax.enable_x64(True):
        x, k = _arrays((2, 6, 5, 2), (3, 2), 4, 2, "float64")

        def wave(x, k):
            y = layers.conv_general_dilated(x, k, (2, 1), "SAME", dimension_numbers=LAST[2], feature_group_count=2)
            return jnp.sin(layers.avg_pool(layers.max_pool(y, (2, 2)), (2, 2))).sum()

        check_grads(jax.jit(wave), (x, k), order=1, modes=("fwd", "rev"), rtol=1e-6)


def test_clients_with_their_own_kernels_equal_a_loop():
    x = _normal(0, (3, 4, 8, 8, 2))
    kernels = _normal(1, (3, 3, 3, 2, 5))

    @jax.jit
    def gradient(kernel, x):
        conv = functools.partial(layers.conv_general_dilated, dimension_numbers=LAST[2])
        return jax.grad(lambda k: jnp.square(conv(x, k, (1, 1), "SAME")).mean())(kernel)

    together = jax.jit(jax.vmap(gradient))(kernels, x)
    for i in range(3):
        _close(together[i], gradient(kernels[i], x[i]), "float32")


def test_no_convolution_is_left_in_the_program():
    x, k = _arrays((2, 8, 8, 4), (3, 3), 4, 2, "float32")

    def loss(k):
        y = layers.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=LAST[2], feature_group_count=2)
        return layers.max_pool(y, (2, 2), (2, 2)).sum()

    program = str(jax.make_jaxpr(jax.grad(loss))(k))
    assert "dot_general" in program
    assert "conv_general" not in program
    assert "select_and_scatter" not in program


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"batch_group_count": 2}, "batch_group_count=2 is not computed .* Use jax.lax"),
        ({"feature_group_count": 2}, "3 channels in 2 groups needs a kernel"),
        ({"lhs_dilation": (2, 2), "padding": "SAME"}, "no meaning with an input dilation"),
        ({"window_strides": (1,)}, "2 spatial axes with one stride"),
        ({"rhs_dilation": (9, 1)}, r"reaches over \(19, 3\) does not fit"),
    ],
)
def test_convolution_refuses_what_it_cannot_do(change, text):
    x, k = _arrays((2, 5, 5, 3), (3, 3), 4, 1, "float32")
    arguments = {"window_strides": (1, 1), "padding": "VALID", "dimension_numbers": LAST[2]} | change
    with pytest.raises(ValueError, match=text):
        layers.conv_general_dilated(x, k, **arguments)


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR", 2])
def test_flax_layers_take_it(padding):
    x = _normal(0, (2, 3, 9, 8, 4))  # two leading axes, which Flax folds
    options = {"kernel_size": (3, 3), "padding": padding, "strides": (2, 1), "feature_group_count": 2}
    plain, ours = nn.Conv(6, **options), nn.Conv(6, **options, conv_general_dilated=layers.conv_general_dilated)
    variables = plain.init(jax.random.key(1), x)
    _close(ours.apply(variables, x), plain.apply(variables, x), "float32", scale=10.0)
    plain, ours = (
        nnx.Conv(4, 6, **options, conv_general_dilated=conv, rngs=nnx.Rngs(0))
        for conv in (lax.conv_general_dilated, layers.conv_general_dilated)
    )
    _close(ours(x), plain(x), "float32", scale=10.0)


# inputs, window, strides, padding
POOLS = {
    "2x2": ((3, 6, 8, 2), (2, 2), (2, 2), "VALID"),
    "2x2 with a rest": ((3, 7, 9, 2), (2, 2), (2, 2), "VALID"),
    "overlapping": ((2, 7, 8, 3), (3, 3), (2, 2), "VALID"),
    "overlapping, same": ((2, 7, 8, 3), (3, 3), (2, 1), "SAME"),
    "no strides": ((2, 5, 5, 1), (2, 3), None, "VALID"),
    "pairs": ((2, 5, 5, 1), (3, 2), (2, 2), ((1, 1), (0, 1))),
    "one axis": ((2, 9, 4), (3,), (3,), "SAME"),
    "no batch axis": ((6, 6, 2), (2, 2), (2, 2), "VALID"),
    "two batch axes": ((2, 3, 6, 6, 2), (2, 2), (2, 2), "SAME"),
    "the whole image": ((2, 4, 4, 2), (4, 4), (1, 1), "VALID"),
    "1x1": ((2, 4, 4, 2), (1, 1), (1, 1), "VALID"),
}


def _average_without_padding(x, *arguments):
    return layers.avg_pool(x, *arguments, count_include_pad=False)


def _flax_average_without_padding(x, *arguments):
    return nn.avg_pool(x, *arguments, count_include_pad=False).astype(x.dtype)


@pytest.mark.parametrize(("name", "dtype"), [(name, "float64") for name in POOLS] + [("overlapping, same", "float32")])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (layers.max_pool, nn.max_pool),
        (layers.avg_pool, nn.avg_pool),
        (_average_without_padding, _flax_average_without_padding),
    ],
    ids=["max", "mean", "mean without padding"],
)
def test_pooling_and_its_gradient_equal_flax(ours, theirs, name, dtype):
    shape, *arguments = POOLS[name]
    with jax.enable_x64(True):
        x = _normal(0, shape, dtype) - 3.0  # all negative: a zero of the padding must not win
        for got, expected in zip(*(_value_and_gradients(lambda x, f=f: f(x, *arguments), x) for f in (ours, theirs))):
            _close(got, expected, dtype)


@pytest.mark.parametrize(
    ("values", "shares"),
    [
        ([0.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]),
        ([1.0, 0.0, 1.0, 0.0], [0.5, 0.0, 0.5, 0.0]),
        ([1.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]),
        ([1.0, 1.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3, 0.0]),
    ],
)
def test_tied_maxima_share_the_gradient(values, shares):
    x = jnp.array(values).reshape(1, 2, 2, 1)
    gradient = jax.grad(lambda x: layers.max_pool(x, (2, 2), (2, 2)).sum())(x)
    np.testing.assert_allclose(gradient.ravel(), shares, rtol=1e-6)


def test_pooling_of_integers_and_nan():
    assert layers.max_pool(jnp.full((1, 3, 1), -7), (2,), (2,), "SAME").ravel().tolist() == [-7, -7]
    assert jnp.isnan(layers.max_pool(jnp.array([[[1.0], [jnp.nan]]]), (2,), (2,))).all()


def test_pooling_refuses_a_window_that_does_not_fit():
    with pytest.raises(ValueError, match="does not fit into inputs"):
        layers.max_pool(jnp.ones((1, 3, 3, 1)), (4, 4))
    with pytest.raises(ValueError, match="needs 2 spatial axes"):
        layers.avg_pool(jnp.ones((3, 1)), (2, 2))
