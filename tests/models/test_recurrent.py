"""Recurrent layers against Flax's, values and gradients, and against a plain loop over time."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxfed.models import recurrent, rnn
from jaxfed.models.recurrent import Kernels

TOLERANCE = {"float32": 2e-5, "float64": 1e-12}
LINEN = [nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.SimpleCell]
NNX = [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell]
LENGTHS = np.array([4, 1, 7])
CALLS = {
    "plain": {},
    "carry": {"return_carry": True},
    "reverse": {"reverse": True, "return_carry": True},
    "reverse in order": {"reverse": True, "keep_order": True},
    "lengths": {"seq_lengths": LENGTHS, "return_carry": True},
    "lengths, reverse in order": {"seq_lengths": LENGTHS, "reverse": True, "keep_order": True, "return_carry": True},
}


def _normal(seed, shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _like(tree):
    return jax.tree.map(lambda leaf: _normal(7, leaf.shape, leaf.dtype), tree)


def _close(ours, theirs, dtype):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        assert got.dtype == expected.dtype == jnp.dtype(dtype)
        np.testing.assert_allclose(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def _value_and_gradients(function, *arguments):
    """The outputs and the pull-back of a fixed random cotangent."""

    def run(*arguments):
        out, pull = jax.vjp(function, *arguments)
        return out, pull(_like(out))

    return jax.jit(run)(*arguments)


def _kernels(gates, width, hidden, dtype="float64", recurrent_bias=False):
    shapes = [(width, hidden), (hidden, hidden), (hidden,)] + [(hidden,)] * recurrent_bias
    draw = np.random.default_rng(5)
    return Kernels(*([jnp.asarray(draw.normal(size=shape) / 2, dtype) for _ in range(gates)] for shape in shapes))


@pytest.mark.parametrize(
    ("cell", "call"), [(c, "lengths, reverse in order") for c in LINEN] + [(LINEN[0], c) for c in CALLS][:-1]
)
def test_linen_layer_and_its_gradients_equal_flax(cell, call):
    with jax.enable_x64(True):
        x = _normal(0, (3, 7, 5), "float64")
        made = cell(6, param_dtype=jnp.float64)
        plain, ours = nn.RNN(made), rnn.RNN(made)
        variables = _like(plain.init(jax.random.key(0), x))
        results = (_value_and_gradients(lambda v, x, m=m: m.apply(v, x, **CALLS[call]), variables, x) for m in (ours, plain))
        _close(*results, "float64")


@pytest.mark.parametrize("cell", LINEN)
def test_linen_layer_begins_with_the_weights_of_flax(cell):
    x = _normal(0, (2, 3, 4))
    ours, theirs = (kind(cell(5)).init(jax.random.key(3), x) for kind in (rnn.RNN, nn.RNN))
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    _close(rnn.RNN(cell(5)).apply(ours, x), nn.RNN(cell(5)).apply(theirs, x), "float32")


def test_linen_layer_inside_a_module_keeps_the_names():
    class Net(nn.Module):
        layer: Any

        @nn.compact
        def __call__(self, x):
            return nn.Bidirectional(self.layer(nn.GRUCell(4)), self.layer(nn.GRUCell(4)))(x)

    x = _normal(0, (2, 3, 4))
    ours, theirs = (Net(kind) for kind in (rnn.RNN, nn.RNN))
    variables = theirs.init(jax.random.key(0), x)
    assert jax.tree.structure(ours.init(jax.random.key(0), x)) == jax.tree.structure(variables)
    _close(ours.apply(variables, x), theirs.apply(variables, x), "float32")


@pytest.mark.parametrize(("cell", "call"), [(c, "lengths") for c in NNX] + [(NNX[2], "plain")])
def test_nnx_layer_and_its_gradients_equal_flax(cell, call):
    with jax.enable_x64(True):
        x = _normal(0, (3, 7, 5), "float64")
        made = cell(5, 6, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        results = []
        for layer in (rnn.NNXRNN(made), nnx.RNN(made)):
            graph, weights, rest = nnx.split(layer, nnx.Param, ...)
            weights = _like(nnx.to_pure_dict(weights))

            def run(weights, x, graph=graph, rest=rest):
                return nnx.merge(graph, weights, rest, copy=True)(x, **CALLS[call])

            results.append(_value_and_gradients(run, weights, x))
        _close(*results, "float64")


@pytest.mark.parametrize("time_major", [False, True])
def test_more_batch_axes_and_an_initial_carry(time_major):
    x = _normal(0, (4, 2, 3, 5) if time_major else (2, 3, 4, 5))
    carry = (_normal(1, (2, 3, 6)), _normal(2, (2, 3, 6)))
    plain, ours = (kind(nn.LSTMCell(6), time_major=time_major, return_carry=True) for kind in (nn.RNN, rnn.RNN))
    variables = plain.init(jax.random.key(0), x)
    results = (
        _value_and_gradients(lambda v, x, carry, m=m: m.apply(v, x, initial_carry=carry), variables, x, carry)
        for m in (ours, plain)
    )
    _close(*results, "float32")


def _loop(step, inputs, carry):
    states = []
    for x in inputs:
        carry = step(x, carry)
        states.append(carry)
    return tuple(jnp.stack(parts) for parts in zip(*states))


def _gru_step(k, x, carry):
    def product(gate):
        return x @ k.inputs[gate] + k.bias[gate][None], carry[0] @ k.recurrent[gate] + k.recurrent_bias[gate][None]

    r, z = (jax.nn.sigmoid(sum(product(gate))) for gate in (0, 1))
    new, old = product(2)
    return ((1 - z) * jnp.tanh(new + r * old) + z * carry[0],)


def _lstm_step(k, x, carry):
    i, f, g, o = (x @ w + carry[1] @ u + b[None] for w, u, b in zip(*k[:3]))
    c = jax.nn.sigmoid(f) * carry[0] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return c, jax.nn.sigmoid(o) * jnp.tanh(c)


def _simple_step(k, x, carry):
    return (jnp.tanh(x @ k.inputs[0] + carry[0] @ k.recurrent[0] + k.bias[0][None]),)


PLAIN = [(recurrent.lstm, _lstm_step, 4, 2), (recurrent.gru, _gru_step, 3, 1), (recurrent.simple, _simple_step, 1, 1)]


@pytest.mark.parametrize(("layer", "step", "gates", "states"), PLAIN)
def test_functions_and_all_their_gradients_equal_a_plain_loop(layer, step, gates, states):
    with jax.enable_x64(True):
        x, kernels = _normal(0, (6, 3, 4), "float64"), _kernels(gates, 4, 5, recurrent_bias=gates == 3)
        carry = tuple(_normal(i, (3, 5), "float64") for i in range(states))
        theirs = _value_and_gradients(lambda x, k, c: _loop(functools.partial(step, k), x, c), x, kernels, carry)
        _close(_value_and_gradients(layer, x, kernels, carry), theirs, "float64")


def test_gradient_of_a_gradient_equals_a_plain_loop():
    with jax.enable_x64(True):
        x, kernels = _normal(0, (4, 2, 3), "float64"), _kernels(4, 3, 3)
        carry = (jnp.zeros((2, 3)), jnp.zeros((2, 3)))

        def slope(run):
            inner = jax.grad(lambda x: jnp.square(run(x)[1]).sum())
            return jax.jit(jax.grad(lambda x: jnp.sin(inner(x)).sum()))(x)

        ours = slope(lambda x: recurrent.lstm(x, kernels, carry))
        _close(ours, slope(lambda x: _loop(functools.partial(_lstm_step, kernels), x, carry)), "float64")


def test_clients_with_their_own_weights_equal_a_loop():
    x, carry = _normal(0, (3, 6, 2, 4)), (jnp.zeros((2, 5)), jnp.zeros((2, 5)))
    clients = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), _kernels(4, 4, 5, "float32"))

    @jax.jit
    def gradient(kernels, x):
        return jax.grad(lambda k: jnp.square(recurrent.lstm(x, k, carry)[1]).mean())(kernels)

    together = jax.jit(jax.vmap(gradient))(clients, x)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], clients)
        _close(jax.tree.map(lambda leaf, i=i: leaf[i], together), gradient(one, x[i]), "float32")


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (nn.MGUCell(4), "got MGUCell. Use Flax's RNN"),
        (nn.LSTMCell(4, gate_fn=nn.hard_sigmoid), "gate_fn other than Flax's default"),
        (nn.SimpleCell(4, residual=True), "residual other than"),
        (nn.GRUCell(4, activation_fn=nn.relu), "activation_fn other than"),
        (nn.LSTMCell(4, dtype=jnp.bfloat16), "dtype=bfloat16 over values of float32"),
    ],
)
def test_cells_that_are_not_computed_are_refused(cell, text):
    x = jnp.ones((2, 3, 4))
    variables = nn.RNN(cell).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=text):
        rnn.RNN(cell).apply(variables, x)


def test_shapes_that_do_not_fit_are_refused():
    kernels, carry = _kernels(4, 4, 5, "float32"), (jnp.zeros((2, 5)), jnp.zeros((2, 5)))
    with pytest.raises(ValueError, match="Move the time axis"):
        recurrent.lstm(jnp.ones((3, 4)), kernels, carry)
    with pytest.raises(ValueError, match=r"one time step or more, got shape \(0, 2, 4\)"):
        recurrent.lstm(jnp.ones((0, 2, 4)), kernels, carry)
    with pytest.raises(ValueError, match=r"expected kernels\.inputs of shapes"):
        recurrent.lstm(jnp.ones((3, 2, 9)), kernels, carry)
    with pytest.raises(ValueError, match="expected a carry of shapes"):
        recurrent.lstm(jnp.ones((3, 7, 4)), kernels, carry)
    layer, x = rnn.RNN(nn.SimpleCell(4)), jnp.ones((2, 3, 4))
    with pytest.raises(TypeError, match="unknown arguments"):
        layer.apply(layer.init(jax.random.key(0), x), x, carries=None)
