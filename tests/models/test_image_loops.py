"""Convolutions that leave out the rows that are not there, against ``jax.lax`` on those that are."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

import jaxfed
from jaxfed.client.gradients import MeanGradient
from jaxfed.client.precision import HalfPrecision
from jaxfed.models import adapters, layers
from jaxfed.step_costs import step_costs

# inputs [B, *space, c], window, strides, padding, kernel dilation, images at a time
SHAPES = {
    "image by image": ((5, 30, 30, 40), (3, 3), (1, 1), "VALID", (1, 1), 1),
    "in threes": ((6, 24, 24, 32), (3, 3), (1, 2), "SAME", (1, 2), 3),
    "strides that leave a rest": ((4, 41, 40, 48), (2, 3), (2, 3), "VALID", (1, 1), 2),
    "negative pairs crop": ((3, 34, 34, 40), (3, 3), (1, 1), ((-1, 0), (0, -2)), (1, 1), 1),
    "one axis": ((4, 800, 40), (5,), (1,), "SAME", (2,), 1),
}
MASKS = {"first": [1, 1, 0, 0, 0, 0], "with a gap": [1, 0, 1, 0, 0, 0], "all": [1] * 6, "nobody": [0] * 6}


def _layout(rank):
    return {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC")}[rank]


def _case(name, rows="first", dtype="float64"):
    """Inputs, kernel and cotangent, zero where no row is; the mask; and the convolutions of a module with their options."""
    shape, window, strides, padding, dilation, group = SHAPES[name]
    rng = np.random.default_rng(0)
    options = {"rhs_dilation": dilation, "dimension_numbers": _layout(len(window))}
    x, kernel = (jnp.asarray(rng.normal(size=size), dtype) for size in (shape, (*window, shape[-1], 3)))
    theirs = functools.partial(lax.conv_general_dilated, window_strides=strides, padding=padding, **options)
    mask = jnp.array(MASKS[rows][: len(x)], bool)
    ours = functools.partial(layers.conv_general_dilated, window_strides=strides, padding=padding, **options)
    g = jnp.asarray(rng.normal(size=jax.eval_shape(theirs, x, kernel).shape), dtype)
    return x, kernel, g * mask.reshape(-1, *(1,) * (x.ndim - 1)), mask, ours, theirs, group


def _with_gradients(convolution, x, kernel, g, *more):
    @jax.jit
    def run(x, kernel, g, *more):
        out, pull = jax.vjp(lambda x, kernel: convolution(x, kernel, *more), x, kernel)
        return out, *pull(g)

    return run(x, kernel, g, *more)


@pytest.mark.parametrize(("name", "rows"), [*((n, "first") for n in SHAPES), *(("in threes", r) for r in MASKS)])
def test_rows_that_are_there_and_gradients_equal_lax(name, rows):
    with jax.enable_x64(True):
        x, kernel, g, mask, ours, theirs, _ = _case(name, rows)
        out, *gradients = _with_gradients(lambda x, k, mask: ours(x, k, mask=mask), x, kernel, g, mask)
        expected, *expected_gradients = _with_gradients(theirs, x, kernel, g)
        np.testing.assert_allclose(out[mask], expected[mask], rtol=1e-12, atol=1e-10)
        for got, wanted in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_not_there_is_not_computed(name):
    """NaN in a row that no group computes reaches nothing."""
    x, kernel, g, mask, ours, _, group = _case(name, dtype="float32")
    computed = -(-2 // group) * group
    x = x.at[computed:].set(jnp.nan)
    out, *gradients = _with_gradients(lambda x, k, mask: ours(x, k, mask=mask), x, kernel, g, mask)
    assert jnp.all(out[computed:] == 0)
    assert jnp.all(out[:2] != 0)
    assert all(jnp.isfinite(gradient).all() for gradient in gradients)


def test_a_batch_that_is_known_to_be_full_has_both_modes():
    x, kernel, *_, ours, theirs, _ = _case("image by image", "all", "float32")
    full = functools.partial(ours, mask=np.ones(len(x), bool))
    got, expected = (jax.jvp(lambda k, c=c: c(x, k), (kernel,), (kernel + 1,))[1] for c in (full, theirs))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)


def test_second_derivatives_in_reverse_mode():
    with jax.enable_x64(True):
        x, kernel, g, mask, ours, _, _ = _case("in threes", "with a gap")

        def wave(x, kernel):
            return (jnp.sin(ours(x, kernel, mask=mask)) * g).sum() / 1e3

        check_grads(jax.jit(wave), (x, kernel), order=2, modes=("rev",), rtol=1e-5)


def test_clients_with_their_own_kernels_and_rows_equal_a_loop():
    x, kernel, _, _, ours, _, _ = _case("in threes", dtype="float32")
    xs, kernels = jnp.stack([x, x + 1, 2 * x]), jnp.stack([kernel, -kernel, kernel + 1])
    masks = jnp.array([MASKS[name] for name in ("with a gap", "all", "nobody")], bool)

    @jax.jit
    def gradient(kernel, x, mask):
        def loss(kernel):
            return (jnp.square(ours(x, kernel, mask=mask)).mean((1, 2, 3)) * mask).sum()

        return jax.grad(loss)(kernel)

    together = jax.jit(jax.vmap(gradient))(kernels, xs, masks)
    expected = [gradient(*one) for one in zip(kernels, xs, masks)]
    for got, wanted in zip(together, expected):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert not together[2].any()

    # Settings side by side, each with all clients: rows and masks are the same in every setting.
    settings = jax.vmap(jax.vmap(gradient), in_axes=(0, None, None))
    both = jax.jit(settings)(jnp.stack([kernels, 0 * kernels]), xs, masks)
    np.testing.assert_allclose(both[0], jnp.stack(expected), rtol=1e-5, atol=1e-5)
    assert not both[1].any()


# pooled blocks for each shape: with and without a rest that is cut off
POOLS = {"image by image": (2, 2), "in threes": (2, 3), "strides that leave a rest": (3, 2), "one axis": (3,)}


def _pooled_case(name, rows, dtype="float64"):
    """As ``_case``, with a bias; and the layer beside ReLU and Flax's pooling, which gives the first of equals all as well."""
    x, kernel, _, mask, _, theirs, _ = _case(name, rows, dtype)
    _, _, strides, padding, _, _ = SHAPES[name]
    pool, rng = POOLS[name], np.random.default_rng(2)
    bias = jnp.asarray(rng.normal(size=kernel.shape[-1]), dtype)
    kernel = kernel / 20  # so that a third of the outputs is below zero

    def plain(x, kernel, bias):
        out = theirs(x, kernel, rhs_dilation=None) + jnp.expand_dims(bias, range(x.ndim - 1)) - 1
        return nn.max_pool(nn.relu(out), pool, pool)

    def ours(x, kernel, bias, mask=None):
        return layers.conv_relu_max_pool(x, kernel, bias - 1, pool, strides=strides, padding=padding, mask=mask)

    g = jnp.asarray(rng.normal(size=jax.eval_shape(plain, x, kernel, bias).shape), dtype)
    return (x, kernel, bias), g * mask.reshape(-1, *(1,) * (x.ndim - 1)), mask, ours, plain


@pytest.mark.parametrize(("name", "rows"), [*((n, "first") for n in POOLS), *(("in threes", r) for r in MASKS)])
def test_convolution_relu_and_pooling_in_one_equal_the_three(name, rows):
    with jax.enable_x64(True):
        arrays, g, mask, ours, plain = _pooled_case(name, rows)
        pulled = jax.jit(lambda arrays, mask: _pull(lambda *arrays: ours(*arrays, mask), arrays, g))(arrays, mask)
        (expected, expected_gradients), (out, gradients) = jax.jit(lambda a: _pull(plain, a, g))(arrays), pulled
        assert 0.05 < (expected == 0).mean() < 0.95
        np.testing.assert_allclose(out[mask], expected[mask], rtol=1e-12, atol=1e-10)
        for got, wanted in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-10)


def _pull(function, arrays, g):
    out, pull = jax.vjp(function, *arrays)
    return out, pull(g)


def test_blocks_of_more_entries_than_a_byte_counts():
    x, kernel, *_ = _case("image by image", dtype="float32")
    mask, bias = jnp.ones(len(x), bool), jnp.zeros(3)

    def pooled(x, mask):
        return layers.conv_relu_max_pool(x, kernel, bias, (14, 14), mask=mask)

    got, expected = (jax.grad(lambda x, m=m: jnp.square(pooled(x, m)).mean())(x) for m in (mask, None))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_without_a_mask_the_one_is_the_three():
    arrays, g, _, ours, plain = _pooled_case("image by image", "all", "float32")
    (out, gradients), (expected, expected_gradients) = (jax.jit(lambda a, f=f: _pull(f, a, g))(arrays) for f in (ours, plain))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients, expected_gradients)


def test_second_derivatives_of_the_three_in_one():
    with jax.enable_x64(True):
        arrays, g, mask, ours, _ = _pooled_case("in threes", "with a gap")

        def wave(*arrays):
            return (jnp.sin(ours(*arrays, mask)) * g).sum() / 1e3

        check_grads(jax.jit(wave), arrays, order=2, modes=("rev",), rtol=1e-4, eps=1e-7)


def test_clients_of_the_three_in_one_equal_a_loop():
    arrays, _, _, ours, _ = _pooled_case("in threes", "all", "float32")
    masks = jnp.array([MASKS[name] for name in ("first", "all")], bool)
    clients = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), arrays)

    @jax.jit
    def gradient(arrays, mask):
        return jax.grad(lambda arrays: (jnp.square(ours(*arrays, mask)).mean((1, 2, 3)) * mask).sum())(arrays)

    together = jax.jit(jax.vmap(gradient))(clients, masks)
    for i in range(2):
        one = gradient(jax.tree.map(lambda x, i=i: x[i], clients), masks[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5), together, one)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"bias": jnp.zeros(2)}, r"a bias of shape \(3,\), got 4 axes, \(2, 2\) and \(2,\)"),
        ({"pool": (2,)}, "2 sizes of blocks"),
        ({"x": jnp.zeros((6, 9, 9))}, "inputs of 4 axes"),
        ({"x": jnp.zeros((6, 9, 9, 5))}, "A convolution of 5 channels"),
        ({"mask": jnp.ones(5, bool)}, r"expected shape \(6,\), got \(5,\)"),
        ({"pool": (9, 9)}, r"reaches over \(9, 9\) does not fit"),
    ],
)
def test_wrong_arguments_of_the_three_in_one(change, text):
    arrays = {"x": jnp.zeros((6, 9, 9, 2)), "kernel": jnp.zeros((3, 3, 2, 3)), "bias": jnp.zeros(3), "pool": (2, 2)}
    with pytest.raises(ValueError, match=text):
        layers.conv_relu_max_pool(**arrays | change)


def test_a_mask_of_another_length_is_refused():
    x, kernel, _, mask, ours, _, _ = _case("in threes", dtype="float32")
    with pytest.raises(ValueError, match=r"expected shape \(6,\), got \(5,\)"):
        ours(x, kernel, mask=mask[:5])


class _Net(nn.Module):
    """A network whose convolution goes image by image."""

    @nn.compact
    def __call__(self, x, mask=None):
        convolution = functools.partial(layers.conv_general_dilated, mask=mask)
        return nn.Dense(2)(nn.relu(nn.Conv(3, (3, 3), conv_general_dilated=convolution)(x)).mean((1, 2)))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(1)
    return {"x": rng.normal(size=(7, 30, 30, 40)).astype("float32"), "y": rng.integers(0, 2, 7)}


@pytest.mark.parametrize("rule", [MeanGradient(), HalfPrecision()], ids=["float32", "bfloat16"])
def test_a_model_that_takes_the_mask_trains_as_one_that_does_not(images, rule):
    batch = {name: jnp.asarray(x[:4]) for name, x in images.items()} | {"mask": jnp.array([True, True, True, False])}

    def gradient(module):
        model = adapters.from_linen(module, images)
        params, stats = model.init(jax.random.key(0))
        return jax.jit(functools.partial(rule, model))(params, stats, batch, jax.random.key(1))[2]

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.relu(nn.Conv(3, (3, 3))(x)).mean((1, 2)))

    got, expected = gradient(_Net()), gradient(Plain())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), got, expected)


def test_a_local_step_is_counted_with_a_full_batch(images):
    """Three products of 900 places, 360 entries of a window and 3 channels for each of 4 images."""
    model = adapters.from_linen(_Net(), images)
    data = jaxfed.FederatedData.from_arrays(images, np.array([0, 0, 0, 0, 1, 1, 1]))
    simulation = jaxfed.Simulation(jaxfed.fedavg(model, lrate=0.1, batch_size=4), data)
    state = simulation.init(key=jax.random.key(0))
    step, _ = step_costs(simulation, simulation.population, state)
    products = 3 * 2 * 4 * 900 * 360 * 3
    assert products / 1.6 <= step.flops <= 1.3 * products
