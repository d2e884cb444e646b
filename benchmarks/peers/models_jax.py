"""The three models in plain JAX for the peers that are JAX; weights are the dicts of ``workloads``.

``--layers`` chooses between formulations of the same function. XLA's CPU compiler runs the gradient of an ordinary convolution
inside a compiled loop 15 to 60 times slower than outside of one, so a peer is measured with what is fastest for it:

=======  ==================================================  ================================================
         W2, convolutions and pooling                        W3, recurrent layers
=======  ==================================================  ================================================
lax      ``lax.conv_general_dilated``, ``reduce_window``     ``lax.scan`` and its own gradient
im2col   nine slices and one product                         as lax
tuned    gradients written as forward convolutions           the recurrent weight's gradient out of the loop
=======  ==================================================  ================================================
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

LAYERS = ("lax", "im2col", "tuned")
FASTEST = {"W1": "lax", "W2": "im2col", "W3": "tuned"}
"""In one compiled call a round; with one call a step, ``tuned`` is."""
_NHWC = ("NHWC", "HWIO", "NHWC")
Params = dict[str, jax.Array]


def example_losses(workload: str, layers: str = "lax") -> Callable[[Params, jax.Array, jax.Array], jax.Array]:
    """``(params, x, y) -> values [B]``; for sequences the mean over letters."""
    conv = {"lax": _lax_conv, "im2col": _im2col, "tuned": _tuned_conv}[layers]
    pool = _window_pool if layers == "lax" else _reshape_pool
    recur = _tuned_recurrence if layers == "tuned" else _scan_recurrence
    models = {
        "W1": lambda params, x: x @ params["w"] + params["b"],
        "W2": lambda params, x: _cnn(params, x, conv, pool),
        "W3": lambda params, x: _letters(params, x, recur),
    }

    def losses(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        chances = jax.nn.log_softmax(models[workload](params, x))
        values = -jnp.take_along_axis(chances, y[..., None], axis=-1)[..., 0]
        return values.reshape(len(values), -1).mean(axis=1)

    return losses


def mean_loss(workload: str, params: Params, x: np.ndarray, y: np.ndarray, rows: int = 250) -> float:
    """The mean loss over all rows."""
    losses = example_losses(workload)
    total = jax.jit(lambda params, x, y: losses(params, x, y).sum())
    return sum(float(total(params, x[i : i + rows], y[i : i + rows])) for i in range(0, len(x), rows)) / len(x)


def _cnn(params: Params, x: jax.Array, conv: Callable, pool: Callable) -> jax.Array:
    for layer in ("c1", "c2"):
        x = jax.nn.relu(conv(x, params[layer]) + params[f"{layer}b"])
    x = pool(x).reshape(len(x), -1)
    x = jax.nn.relu(x @ params["d1"] + params["d1b"])
    return x @ params["d2"] + params["d2b"]


def _lax_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=_NHWC)


def _im2col(x: jax.Array, kernel: jax.Array) -> jax.Array:
    size = x.shape[1] - 2
    shifts = [x[:, i : i + size, j : j + size] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifts, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


@jax.custom_vjp
def _tuned_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _lax_conv(x, kernel)


def _conv_forward(x: jax.Array, kernel: jax.Array) -> tuple:
    return _lax_conv(x, kernel), (x, kernel)


def _conv_backward(saved: tuple, g: jax.Array) -> tuple:
    """Both gradients in the one layout that has a fast kernel inside a loop."""
    x, kernel = saved
    reach = kernel.shape[0] - 1
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    dx = jax.lax.conv_general_dilated(g, flipped, (1, 1), ((reach, reach), (reach, reach)), dimension_numbers=_NHWC)
    return dx, _lax_conv(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)).transpose(1, 2, 0, 3)


_tuned_conv.defvjp(_conv_forward, _conv_backward)


def _window_pool(x: jax.Array) -> jax.Array:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def _reshape_pool(x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


def _letters(params: Params, x: jax.Array, recur: Callable) -> jax.Array:
    h = params["emb"][x].swapaxes(0, 1)
    for layer in ("l0", "l1"):
        bias = params[f"{layer}bi"] + params[f"{layer}bh"]
        h = recur(h @ params[f"{layer}wi"].T + bias, params[f"{layer}wh"])
    return (h @ params["d"] + params["db"]).swapaxes(0, 1)


def _cell(gates: jax.Array, c: jax.Array) -> tuple:
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
    new = f * c + i * g
    return o * jnp.tanh(new), new, jnp.concatenate([i, f, g, o], axis=-1)


def _unroll(inputs: jax.Array, weights: jax.Array) -> tuple:
    """Outputs, and what a gradient needs: the cells before each step, the gates."""
    zeros = jnp.zeros((inputs.shape[1], weights.shape[1]), inputs.dtype)

    def step(carry: tuple, x: jax.Array) -> tuple:
        h, c = carry
        h, new, gates = _cell(x + h @ weights.T, c)
        return (h, new), (h, c, gates)

    return jax.lax.scan(step, (zeros, zeros), inputs)[1]


def _scan_recurrence(inputs: jax.Array, weights: jax.Array) -> jax.Array:
    return _unroll(inputs, weights)[0]


@jax.custom_vjp
def _tuned_recurrence(inputs: jax.Array, weights: jax.Array) -> jax.Array:
    return _unroll(inputs, weights)[0]


def _recurrence_forward(inputs: jax.Array, weights: jax.Array) -> tuple:
    saved = _unroll(inputs, weights)
    return saved[0], (*saved, weights)


def _recurrence_backward(saved: tuple, dh: jax.Array) -> tuple:
    """The recurrent weight's gradient leaves the time loop: one large product at the end."""
    h, cells, gates, weights = saved
    zeros = jnp.zeros_like(h[0])

    def step(carry: tuple, now: tuple) -> tuple:
        dh_next, dc_next = carry
        dh, c, gates = now
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        t = jnp.tanh(f * c + i * g)
        dh = dh + dh_next
        dc = dh * o * (1 - t * t) + dc_next
        parts = [dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g), dh * t * o * (1 - o)]
        dgates = jnp.concatenate(parts, axis=-1)
        return (dgates @ weights, dc * f), dgates

    dgates = jax.lax.scan(step, (zeros, zeros), (dh, cells, gates), reverse=True)[1]
    before = jnp.concatenate([zeros[None], h[:-1]])
    return dgates, jnp.einsum("tbg,tbh->gh", dgates, before)


_tuned_recurrence.defvjp(_recurrence_forward, _recurrence_backward)
