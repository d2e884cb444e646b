"""Recurrent layers that stay fast inside a compiled loop, in the place of Flax's ``nn.RNN`` and ``nnx.RNN``.

Same cells, same arguments, same weights under the same names, same values; only the loop over time is that of
:mod:`jaxfed.models.recurrent`, whose gradient is about half of the time.

Example:
    >>> import flax.linen as nn
    >>> import jax, jax.numpy as jnp
    >>> layer = RNN(nn.OptimizedLSTMCell(16))
    >>> inputs = jnp.ones((2, 5, 3))  # 5 time steps
    >>> layer.apply(layer.init(jax.random.key(0), inputs), inputs).shape
    (2, 5, 16)
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.linen.recurrent import flip_sequences

from jaxfed.models import recurrent
from jaxfed.models.recurrent import Kernels

_CALL = ("initial_carry", "seq_lengths", "return_carry", "time_major", "reverse", "keep_order")


class RNN(nn.RNN):
    """``flax.linen.RNN`` over an ``LSTMCell``, ``OptimizedLSTMCell``, ``GRUCell`` or ``SimpleCell``.

    Weights, initial values and results are those of ``nn.RNN`` over the same cell, ``seq_lengths`` and the like included.

    Raises:
        ValueError: In the call, if the cell is another one, has activations of its own or computes in a dtype of its own.

    Example:
        >>> layer = RNN(nn.GRUCell(4), return_carry=True)
        >>> inputs = jnp.ones((2, 5, 3))
        >>> carry, outputs = layer.apply(layer.init(jax.random.key(0), inputs), inputs)
        >>> carry.shape, outputs.shape
        ((2, 4), (2, 5, 4))
    """

    def __call__(self, inputs: jax.Array, *, init_key: Any = None, **options: Any) -> Any:
        """As ``nn.RNN``'s: outputs ``[*batch, T, h]``, or ``(carry, outputs)``."""
        compute, read = _recurrence(self.cell, _LINEN)
        if self.is_initializing():
            return super().__call__(inputs, init_key=init_key, **options)
        key = jax.random.key(0) if init_key is None else init_key
        weights = self.cell.variables["params"]

        def begin(shape: tuple[int, ...]) -> Any:
            return self.cell.initialize_carry(key, shape)

        return _run(self, inputs, options, compute, read(weights), begin)


class NNXRNN(nnx.RNN):
    """``flax.nnx.RNN`` over an ``LSTMCell``, ``OptimizedLSTMCell``, ``GRUCell`` or ``SimpleCell``.

    Weights and results are those of ``nnx.RNN`` over the same cell, ``seq_lengths`` and the like included.

    Raises:
        ValueError: In the call, if the cell is another one, has activations of its own or computes in a dtype of its own.

    Example:
        >>> layer = NNXRNN(nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0)))
        >>> layer(jnp.ones((2, 5, 3))).shape
        (2, 5, 4)
    """

    def __call__(self, inputs: jax.Array, *, rngs: Any = None, **options: Any) -> Any:
        """As ``nnx.RNN``'s: outputs ``[*batch, T, h]``, or ``(carry, outputs)``."""
        compute, read = _recurrence(self.cell, _NNX)
        rngs = self.rngs if rngs is None else rngs
        rngs = rngs.carry.fork() if isinstance(rngs, nnx.Rngs) else rngs

        def begin(shape: tuple[int, ...]) -> Any:
            return self.cell.initialize_carry(shape, rngs)

        return _run(self, inputs, options, compute, read(self.cell), begin)


def _run(layer: Any, inputs: jax.Array, options: dict, compute: Callable, kernels: Kernels, begin: Callable) -> Any:
    """What both layers do with their arguments, around the loop over time."""
    unknown = set(options) - set(_CALL)
    if unknown:
        raise TypeError(f"{type(layer).__name__}: unknown arguments {sorted(unknown)}. It takes: {', '.join(_CALL)}.")
    return_carry, time_major, reverse, keep_order = (_option(layer, options, name) for name in _CALL[2:])
    lengths, carry = options.get("seq_lengths"), options.get("initial_carry")
    time = 0 if time_major else inputs.ndim - 2

    def flip(x: jax.Array) -> jax.Array:
        return flip_sequences(x, lengths, num_batch_dims=inputs.ndim - 2, time_major=time_major)

    x = jnp.moveaxis(flip(inputs) if reverse else inputs, time, 0)
    batch = x.shape[1:-1]
    carry = begin((*batch, x.shape[-1])) if carry is None else carry
    _check_dtype(layer.cell, x, kernels, carry)
    flat = tuple(state.reshape(-1, state.shape[-1]) for state in jax.tree.leaves(carry))
    states = compute(x.reshape(len(x), -1, x.shape[-1]), kernels, flat)
    outputs = jnp.moveaxis(states[-1].reshape(len(x), *batch, -1), 0, time)
    outputs = flip(outputs) if reverse and keep_order else outputs
    if not return_carry:
        return outputs
    last = [_at_end(state, lengths).reshape(*batch, -1) for state in states]
    return jax.tree.unflatten(jax.tree.structure(carry), last), outputs


def _option(layer: Any, options: dict, name: str) -> bool:
    given = options.get(name)
    return getattr(layer, name) if given is None else given


def _at_end(state: jax.Array, lengths: jax.Array | None) -> jax.Array:
    return state[-1] if lengths is None else state[lengths.ravel() - 1, jnp.arange(state.shape[1])]


def _check_dtype(cell: Any, inputs: jax.Array, kernels: Kernels, carry: Any) -> None:
    dtype = jnp.result_type(inputs, *jax.tree.leaves((kernels, carry)))
    if cell.dtype is not None and jnp.dtype(cell.dtype) != dtype:
        remedy = "Cast weights and inputs instead, or use Flax's RNN."
        raise ValueError(f"{type(cell).__name__}: dtype={jnp.dtype(cell.dtype)} over values of {dtype} is not computed. {remedy}")


def _recurrence(cell: Any, known: Mapping[type, tuple[Callable, Callable]]) -> tuple[Callable, Callable]:
    """The recurrence of a cell and the function that reads its weights."""
    if type(cell) not in known:
        names = ", ".join(kind.__name__ for kind in known)
        raise ValueError(f"Expected a cell of {names}, got {type(cell).__name__}. Use Flax's RNN for it.")
    wanted = {"gate_fn": nn.sigmoid, "activation_fn": nn.tanh, "residual": False}
    for name, value in wanted.items():
        if getattr(cell, name, value) != value:
            raise ValueError(f"{type(cell).__name__}: {name} other than Flax's default is not computed. Use Flax's RNN for it.")
    return known[type(cell)]


def _linen_lstm(weights: Any) -> Kernels:
    hidden = [weights[f"h{gate}"] for gate in "ifgo"]
    inputs = [weights[f"i{gate}"]["kernel"] for gate in "ifgo"]
    return Kernels(inputs, [part["kernel"] for part in hidden], [part["bias"] for part in hidden])


def _linen_gru(weights: Any) -> Kernels:
    inputs, hidden = ([weights[f"{side}{gate}"] for gate in "rzn"] for side in "ih")
    zero = jnp.zeros_like(hidden[2]["bias"])
    recurrent_bias = [zero, zero, hidden[2]["bias"]]
    return Kernels([p["kernel"] for p in inputs], [p["kernel"] for p in hidden], [p["bias"] for p in inputs], recurrent_bias)


def _linen_simple(weights: Any) -> Kernels:
    return Kernels([weights["i"]["kernel"]], [weights["h"]["kernel"]], [weights["i"]["bias"]])


def _nnx_lstm(cell: Any) -> Kernels:
    hidden = [cell.hi, cell.hf, cell.hg, cell.ho]
    inputs = [layer.kernel[...] for layer in (cell.ii, cell.if_, cell.ig, cell.io)]
    return Kernels(inputs, [layer.kernel[...] for layer in hidden], [layer.bias[...] for layer in hidden])


def _nnx_joined(gates: int) -> Callable[[Any], Kernels]:
    """Reads a cell whose gates lie side by side in ``dense_i`` and ``dense_h``, one of which has the bias."""

    def read(cell: Any) -> Kernels:
        bias = cell.dense_i.bias if cell.dense_i.bias is not None else cell.dense_h.bias
        inputs, hidden = cell.dense_i.kernel[...], cell.dense_h.kernel[...]
        return Kernels(jnp.split(inputs, gates, axis=-1), jnp.split(hidden, gates, axis=-1), jnp.split(bias[...], gates))

    return read


_LINEN = {
    nn.LSTMCell: (recurrent.lstm, _linen_lstm),
    nn.OptimizedLSTMCell: (recurrent.lstm, _linen_lstm),
    nn.GRUCell: (recurrent.gru, _linen_gru),
    nn.SimpleCell: (recurrent.simple, _linen_simple),
}
_NNX = {
    nnx.LSTMCell: (recurrent.lstm, _nnx_lstm),
    nnx.OptimizedLSTMCell: (recurrent.lstm, _nnx_joined(4)),
    nnx.GRUCell: (recurrent.gru, _nnx_joined(3)),
    nnx.SimpleCell: (recurrent.simple, _nnx_joined(1)),
}
