"""LSTM, GRU and simple recurrence over time, with gradients that stay fast inside a compiled loop (pure JAX).

Reverse mode through ``lax.scan`` adds the gradient of the recurrent kernels into its carry at every time step, which costs
as much as the step itself. Here the backward loop only collects the gradients of the pre-activations, ``d_t`` ``[B, gates * h]``,
and the kernels' gradient is one product after the loop:

    grad kernel = sum_t h_{t-1}^T d_t

Every gate has a product of its own in the forward loop, on an XLA CPU backend a third faster than one product that is sliced.
What the backward loop needs is written where it stays.
The functions are reverse-mode differentiable, any number of times. :mod:`jaxfed.models.rnn` has them as Flax layers.

References:
    Appleyard et al., `Optimizing Performance of Recurrent Neural Networks on GPUs <https://arxiv.org/abs/1604.01946>`_, 2016
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Arrays = tuple[jax.Array, ...]
Keep = Callable[[jax.Array], jax.Array]


class Kernels(NamedTuple):
    """The weights of a recurrent layer, gates in the order of the layer; biases are added where there are some."""

    inputs: Sequence[jax.Array]
    """``[d, h]`` for each gate."""
    recurrent: Sequence[jax.Array]
    """``[h, h]`` for each gate."""
    bias: Sequence[jax.Array]
    """``[h]`` for each gate, beside the inputs' product."""
    recurrent_bias: Sequence[jax.Array] | None = None
    """``[h]`` for each gate, beside the recurrent product; as good as ``bias`` but in a GRU."""


def lstm(inputs: jax.Array, kernels: Kernels, carry: Arrays) -> Arrays:
    """A long short-term memory, gates in the order i, f, g, o.

        i, f, o = sigmoid(W x + U h + b),  g = tanh(W x + U h + b),  c' = f c + i g,  h' = o tanh(c')

    Args:
        inputs: ``[T, B, d]``, T time steps.
        kernels: Four gates.
        carry: ``(c, h)`` before the first step, ``[B, h]`` each.

    Returns:
        ``(c, h)`` after every step, ``[T, B, h]`` each.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> kernels = Kernels([jnp.ones((3, 2))] * 4, [jnp.zeros((2, 2))] * 4, [jnp.zeros(2)] * 4)
        >>> c, h = lstm(jnp.zeros((5, 1, 3)), kernels, (jnp.ones((1, 2)), jnp.zeros((1, 2))))
        >>> print(c[:, 0, 0])
        [0.5     0.25    0.125   0.0625  0.03125]

    References:
        Hochreiter and Schmidhuber, `Long Short-Term Memory <https://doi.org/10.1162/neco.1997.9.8.1735>`_, 1997
    """
    return _layer("lstm", _Cell(4, 5, _lstm_forward, _lstm_backward), inputs, kernels, carry)


def gru(inputs: jax.Array, kernels: Kernels, carry: Arrays) -> Arrays:
    """A gated recurrent unit, gates in the order r, z, n.

        r, z = sigmoid(W x + U h + b),  n = tanh(W x + b + r (U h + b')),  h' = (1 - z) n + z h

    Args:
        inputs: ``[T, B, d]``, T time steps.
        kernels: Three gates.
        carry: ``(h,)`` before the first step, ``[B, h]``.

    Returns:
        ``(h,)`` after every step, ``[T, B, h]``.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> kernels = Kernels([jnp.ones((3, 2))] * 3, [jnp.zeros((2, 2))] * 3, [jnp.zeros(2)] * 3)
        >>> (h,) = gru(jnp.zeros((3, 1, 3)), kernels, (jnp.ones((1, 2)),))
        >>> print(h[:, 0, 0])
        [0.5   0.25  0.125]

    References:
        Cho et al., `Learning Phrase Representations using RNN Encoder-Decoder <https://arxiv.org/abs/1406.1078>`_, 2014
    """
    return _layer("gru", _Cell(3, 4, _gru_forward, _gru_backward), inputs, kernels, carry)


def simple(inputs: jax.Array, kernels: Kernels, carry: Arrays) -> Arrays:
    """The plain recurrence ``h' = tanh(W x + U h + b)``.

    Args:
        inputs: ``[T, B, d]``, T time steps.
        kernels: One gate.
        carry: ``(h,)`` before the first step, ``[B, h]``.

    Returns:
        ``(h,)`` after every step, ``[T, B, h]``.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> kernels = Kernels([jnp.ones((3, 2))], [jnp.eye(2)], [jnp.zeros(2)])
        >>> (h,) = simple(jnp.zeros((1, 1, 3)), kernels, (jnp.ones((1, 2)),))
        >>> print(h)
        [[[0.7615942 0.7615942]]]
    """
    return _layer("simple", _Cell(1, 0, _simple_forward, _simple_backward), inputs, kernels, carry)


class _Cell(NamedTuple):
    """The elementwise part of a step; the state h is the carry's last array.

    ``forward(x, u, carry, keep) -> (carry, saved)`` takes the gates' input and recurrent products, and saves what it has kept.
    ``backward(saved, before, after, d) -> (d_x, d_u, d_before)`` gives one object for ``d_x`` and ``d_u`` where they are equal,
    and leaves the way through the products to its caller.
    """

    gates: int
    saved: int
    forward: Callable
    backward: Callable


def _lstm_forward(x: Arrays, u: Arrays, carry: Arrays, keep: Keep) -> tuple[Arrays, Arrays]:
    functions = (lax.logistic, lax.logistic, lax.tanh, lax.logistic)
    i, f, g, o = (keep(function(a + b)) for function, a, b in zip(functions, x, u))
    c = f * carry[0] + i * g
    t = keep(lax.tanh(c))
    return (c, o * t), (i, f, g, o, t)


def _lstm_backward(saved: Arrays, before: Arrays, after: Arrays, d: Arrays) -> tuple[Arrays, Arrays, tuple]:
    del after
    i, f, g, o, t = saved
    dc = d[0] + d[1] * o * (1 - t * t)
    gates = (dc * g * i * (1 - i), dc * before[0] * f * (1 - f), dc * i * (1 - g * g), d[1] * t * o * (1 - o))
    return gates, gates, (dc * f, 0)


def _gru_forward(x: Arrays, u: Arrays, carry: Arrays, keep: Keep) -> tuple[Arrays, Arrays]:
    r, z, last = keep(lax.logistic(x[0] + u[0])), keep(lax.logistic(x[1] + u[1])), keep(u[2])
    n = keep(lax.tanh(x[2] + r * last))
    return ((1 - z) * n + z * carry[0],), (r, z, last, n)


def _gru_backward(saved: Arrays, before: Arrays, after: Arrays, d: Arrays) -> tuple[Arrays, Arrays, tuple]:
    del after
    r, z, last, n = saved
    dn = d[0] * (1 - z) * (1 - n * n)
    dr, dz = dn * last * r * (1 - r), d[0] * (before[0] - n) * z * (1 - z)
    return (dr, dz, dn), (dr, dz, dn * r), (d[0] * z,)


def _simple_forward(x: Arrays, u: Arrays, carry: Arrays, keep: Keep) -> tuple[Arrays, Arrays]:
    del carry, keep
    return (lax.tanh(x[0] + u[0]),), ()


def _simple_backward(saved: Arrays, before: Arrays, after: Arrays, d: Arrays) -> tuple[Arrays, Arrays, tuple]:
    del saved, before
    gates = (d[0] * (1 - after[0] * after[0]),)
    return gates, gates, (0,)


def _layer(name: str, cell: _Cell, inputs: jax.Array, kernels: Kernels, carry: Arrays) -> Arrays:
    _check(name, cell, inputs, kernels, carry)
    dtype = jnp.result_type(inputs, *jax.tree.leaves(kernels), *carry)
    inputs, kernels, carry = jax.tree.map(lambda a: a.astype(dtype), (inputs, kernels, tuple(carry)))
    bias = jnp.concatenate(list(kernels.bias))
    pre = _project(inputs, jnp.concatenate(list(kernels.inputs), axis=1)) + bias.reshape(1, 1, -1)
    recurrent_bias = None if kernels.recurrent_bias is None else tuple(kernels.recurrent_bias)
    return _recur(cell, pre, tuple(kernels.recurrent), recurrent_bias, carry)


def _check(name: str, cell: _Cell, inputs: jax.Array, kernels: Kernels, carry: Arrays) -> None:
    if inputs.ndim != 3 or inputs.shape[0] == 0:
        wanted = "expected inputs [T, B, d] of one time step or more"
        raise ValueError(f"{name}: {wanted}, got shape {inputs.shape}. Move the time axis to the front.")
    batch, width, hidden = inputs.shape[1], inputs.shape[2], carry[-1].shape[-1]
    biases = None if kernels.recurrent_bias is None else [(hidden,)] * cell.gates
    expected = ([(width, hidden)] * cell.gates, [(hidden, hidden)] * cell.gates, [(hidden,)] * cell.gates, biases)
    for field, shapes, arrays in zip(Kernels._fields, expected, kernels):
        got = None if arrays is None else [a.shape for a in arrays]
        if got != shapes:
            given = got if got is None or len(got) <= cell.gates else f"{len(got)} arrays, the first of shape {got[0]}"
            raise ValueError(f"{name}: expected kernels.{field} of shapes {shapes}, one for each gate, got {given}.")
    if any(state.shape != (batch, hidden) for state in carry):
        raise ValueError(f"{name}: expected a carry of shapes {(batch, hidden)}, got {[state.shape for state in carry]}.")


@jax.custom_vjp
def _project(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    """``[T, B, d]`` times ``[d, g]``."""
    return inputs @ kernel


def _project_backward(saved: Arrays, d_out: jax.Array) -> Arrays:
    inputs, kernel = saved
    return d_out @ kernel.T, _rows_product(inputs, d_out)


_project.defvjp(lambda inputs, kernel: (inputs @ kernel, (inputs, kernel)), _project_backward)


def _rows_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """``sum_tb a[t, b, i] b[t, b, j]`` as one long sum; over two axes, XLA's CPU backend first moves both arrays about."""
    rows = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return lax.dot_general(*rows, (((0,), (0,)), ((), ())))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recur(cell: _Cell, pre: jax.Array, kernels: Arrays, bias: Arrays | None, carry: Arrays) -> Arrays:
    """The carry after every step, from the input products ``pre`` ``[T, B, gates * h]``."""
    return _plainly(cell, pre, kernels, bias, carry)[0]


def _forward(cell: _Cell, *operands: Any) -> tuple[Arrays, Any]:
    found: Any = _recorded(cell, *operands)
    return found[0], (*found, *operands[1:])


def _step(cell: _Cell, x: jax.Array, kernels: Arrays, bias: Arrays | None, carry: Arrays, keep: Keep) -> tuple[Arrays, Arrays]:
    products = tuple(carry[-1] @ kernel for kernel in kernels)
    if bias is not None:
        products = tuple(u + b[None] for u, b in zip(products, bias))
    return cell.forward(tuple(jnp.split(x, cell.gates, axis=-1)), products, carry, keep)


def _plainly(cell: _Cell, pre: jax.Array, kernels: Arrays, bias: Arrays | None, carry: Arrays) -> tuple[Arrays, Arrays]:
    """The carry after every step and what is saved at every step, ``[T, B, h]`` each."""

    def step(carry: Arrays, x: jax.Array) -> tuple[Arrays, tuple[Arrays, Arrays]]:
        carry, saved = _step(cell, x, kernels, bias, carry, lambda value: value)
        return carry, (carry, saved)

    return lax.scan(step, carry, pre)[1]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recorded(cell: _Cell, pre: jax.Array, kernels: Arrays, bias: Arrays | None, carry: Arrays) -> tuple[Arrays, Arrays]:
    """As :func:`_plainly`; what is kept is written where it is saved, and read from there.

    A CPU's kernel that writes over its own input, as one from a gate's product to the gate would, may go number by number.
    """

    def step(t: int, so_far: tuple[Arrays, Arrays]) -> tuple[Arrays, Arrays]:
        carry, written = so_far[0], []

        def keep(value: jax.Array) -> jax.Array:
            array = lax.dynamic_update_slice(so_far[1][len(written)], lax.expand_dims(value, [0]), (t, 0, 0))
            # Whoever reads the row would otherwise be given the value, before it is written.
            written.append(lax.optimization_barrier(array))
            return lax.dynamic_index_in_dim(written[-1], t, 0, keepdims=False)

        x = lax.dynamic_index_in_dim(pre, t, 0, keepdims=False)
        carry, _ = _step(cell, x, kernels, bias, carry, keep)
        return tuple(map(keep, carry)), tuple(written)

    room = jnp.zeros((len(pre), *carry[-1].shape), pre.dtype)
    _, arrays = lax.fori_loop(0, len(pre), step, (carry, (room,) * (cell.saved + len(carry))))
    return arrays[cell.saved :], arrays[: cell.saved]


def _recorded_forward(cell: _Cell, *operands: Any) -> tuple[Any, Any]:
    return jax.vjp(partial(_plainly, cell), *operands)


# Only second derivatives come here: a loop that writes into whole arrays is dear to differentiate.
_recorded.defvjp(_recorded_forward, lambda cell, pull, d_arrays: pull(d_arrays))


def _backward(cell: _Cell, residuals: Any, d_states: Arrays) -> tuple:
    states, saved, kernels, bias, start = residuals
    before = tuple(jnp.concatenate([first[None], state[:-1]]) for first, state in zip(start, states))
    # Transposed once: a product with a transposed kernel takes twice the time of a plain one, at every time step.
    transposed = jnp.concatenate([kernel.T for kernel in kernels])

    def step(d_carry: Arrays, t: tuple) -> tuple[Arrays, tuple]:
        d_out, saved, before, after = t
        d = tuple(a + b for a, b in zip(d_carry, d_out))
        d_x, d_u, d_before = cell.backward(saved, before, after, d)
        joined = jnp.concatenate(d_u, axis=-1)
        d_carry = (*d_before[:-1], d_before[-1] + joined @ transposed)
        return d_carry, (joined, None if d_x is d_u else jnp.concatenate(d_x, axis=-1))

    zeros = jax.tree.map(jnp.zeros_like, start)
    d_start, (d_u, d_x) = lax.scan(step, zeros, (d_states, saved, before, states), reverse=True)
    d_kernels = tuple(jnp.split(_rows_product(before[-1], d_u), cell.gates, axis=1))
    d_bias = None if bias is None else tuple(jnp.split(d_u.sum((0, 1)), cell.gates))
    return d_u if d_x is None else d_x, d_kernels, d_bias, d_start


_recur.defvjp(_forward, _backward)
