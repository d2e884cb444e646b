"""Slow layers are named with their remedy, and only those."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxfed
from jaxfed.models import layers, reference, rnn
from jaxfed.models.advice import slow_layers, warn_of_slow_layers

IMAGES, TEXT = jnp.ones((2, 12, 12, 3)), jnp.ones((2, 5, 3))


def _advice(module, x):
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    return slow_layers(lambda variables, x: jnp.sum(module.apply(variables, x)), variables, x)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.SimpleCell])
def test_recurrent_layers_of_flax_are_named_and_ours_are_not(cell):
    (sentence,) = _advice(nn.RNN(cell(4)), TEXT)
    assert "jaxfed.models.rnn.RNN" in sentence
    assert _advice(rnn.RNN(cell(4)), TEXT) == []


def test_recurrent_layers_of_nnx_are_named_and_ours_are_not():
    cell = nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0))
    for kind, count in ((nnx.RNN, 1), (rnn.NNXRNN, 0)):
        graph, weights, rest = nnx.split(kind(cell), nnx.Param, ...)
        found = slow_layers(lambda w, x, g=graph, r=rest: nnx.merge(g, w, r, copy=True)(x).sum(), weights, TEXT)
        assert len(found) == count


def test_convolution_and_pooling_are_named_wherever_they_are():
    class Net(nn.Module):
        conv: Any
        pool: Any

        @nn.compact
        def __call__(self, x):
            return self.pool(nn.Conv(4, (3, 3), conv_general_dilated=self.conv)(x), (2, 2), (2, 2))

    assert len(_advice(Net(lax.conv_general_dilated, nn.max_pool), IMAGES)) == 2
    assert _advice(Net(layers.conv_general_dilated, layers.max_pool), IMAGES) == []
    (sentence,) = _advice(Net(lax.conv_general_dilated, layers.max_pool), IMAGES)
    assert "conv_general_dilated=" in sentence

    def inside(x):
        return jax.jit(lambda x: lax.fori_loop(0, 2, lambda _, y: y + nn.max_pool(y, (1, 1)), x))(x)

    (sentence,) = slow_layers(inside, IMAGES)
    assert "max_pool" in sentence


def test_loops_without_a_recurrent_kernel_are_not_named():
    def map_of_products(w, x):
        return lax.map(lambda row: row @ w, x).sum()

    def running_sum(w, x):
        return lax.scan(lambda total, row: (total + (row @ w), None), jnp.zeros((5, 3)), x)[0].sum()

    assert slow_layers(map_of_products, jnp.ones((3, 3)), TEXT) == []
    assert slow_layers(running_sum, jnp.ones((3, 3)), TEXT) == []
    (kernel, images), numbers = (jnp.ones((3, 3, 40, 8)), jnp.ones((4, 30, 30, 40))), ("NHWC", "HWIO", "NHWC")

    def convolution_by_image(kernel):
        return layers.conv_general_dilated(images, kernel, (1, 1), "VALID", dimension_numbers=numbers).sum()

    assert "scan" in str(jax.make_jaxpr(convolution_by_image)(kernel))
    assert slow_layers(convolution_by_image, kernel) == []


@pytest.mark.parametrize("name", ["emnist-cnn", "char-lstm"])
def test_reference_models_need_no_advice(name):
    sample = {"x": jnp.zeros((2, 28, 28)), "y": jnp.zeros(2, int)}
    if name == "char-lstm":
        sample = {"x": jnp.zeros((2, 6), int), "y": jnp.zeros((2, 6), int)}
    model = reference.build_model(name, sample)
    params, stats = jax.eval_shape(model.init, jax.random.key(0))
    batch = sample | {"mask": jnp.ones(2, bool)}
    assert slow_layers(lambda p: model.loss(p, stats, batch, jax.random.key(1))[0].sum(), params) == []


def slow_loss(params, batch, key):
    convolved = jax.lax.conv(batch["x"], params, (1, 1), "VALID")
    return convolved.sum((1, 2, 3))


def test_a_simulation_says_so_once():
    data = jaxfed.FederatedData.from_arrays({"x": np.ones((4, 1, 5, 5), np.float32)}, [0, 0, 1, 1])
    algorithm = jaxfed.fedavg(slow_loss, lrate=0.1, batch_size=2)

    def run():
        simulation = jaxfed.Simulation(algorithm, data)
        simulation.run(simulation.init(jnp.ones((1, 1, 3, 3)), key=jax.random.key(0)), rounds=1)

    with pytest.warns(UserWarning, match=r"pass conv_general_dilated=jaxfed.models.layers.conv_general_dilated"):
        run()
    run()  # a warning would be an error


def test_a_process_without_rows_looks_too():
    whole = jaxfed.FederatedData.from_arrays({"x": np.ones((4, 2, 3), np.float32), "y": np.arange(4)}, [0, 0, 0, 0])
    model = reference.build_model("mlp", whole.arrays)
    params, stats = jax.eval_shape(model.init, jax.random.key(0))
    # No row can be made flat: how long it would be is not told by none.
    warn_of_slow_layers(model, params, stats, whole.shard(2, 1).arrays, jax.random.key(0))
