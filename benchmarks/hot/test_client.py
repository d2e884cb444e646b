"""One client's round, and a single local step, of models small and large."""

import jax
import jax.numpy as jnp
import pytest

import jaxfed
from jaxfed.client.batches import ClientRows
from jaxfed.messages import Broadcast
from jaxfed.models import layers


def logistic(params, batch, key):
    """60 features, 10 classes."""
    return cross_entropy(batch["x"] @ params["w"] + params["b"], batch["y"])


def convolutional(params, batch, key):
    """A 3x3 convolution of 32 channels, pooled, and a dense layer."""
    layout = ("NHWC", "HWIO", "NHWC")
    x = layers.conv_general_dilated(batch["x"], params["c"], (1, 1), "VALID", dimension_numbers=layout)
    x = layers.max_pool(jax.nn.relu(x), (2, 2), (2, 2))
    return cross_entropy(x.reshape(len(x), -1) @ params["w"] + params["b"], batch["y"])


def cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]


MODELS = {
    "logistic": (logistic, (60,), {"w": (60, 10), "b": (10,)}),
    "convolutional": (convolutional, (28, 28, 1), {"c": (3, 3, 1, 32), "w": (13 * 13 * 32, 10), "b": (10,)}),
}


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("model", MODELS)
def test_local_steps(timed, model, steps):
    """The difference between 5 and 1 is four bare steps; the rest is what a round of a client costs anyway."""
    loss, row, shapes = MODELS[model]
    keys = iter(jax.random.split(jax.random.key(0), 5))
    params = {name: 0.1 * jax.random.normal(next(keys), shape) for name, shape in shapes.items()}
    rows = ClientRows.of({"x": jax.random.normal(next(keys), (100, *row)), "y": jnp.arange(100) % 10})
    client = jaxfed.fedavg(loss, lrate=0.01, batch_size=20, steps=steps).client

    def run(params, rows, key):
        start = Broadcast(params, {}, {}, 0)
        return client.run(start, client.init_kept(start, key), rows, key)[0].delta

    timed(run, params, rows, jax.random.key(1))
