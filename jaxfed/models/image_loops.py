"""A convolution and its gradients a few images at a time, up to the last image that is there (pure JAX, for CPUs).

A client's last batch is rarely full, and a convolution is most of a CNN's time: a loop that ends at the last real row leaves
the others out. With ``x`` the padded inputs, ``k`` the kernel and ``g`` of the outputs' shape, one trilinear form has three
gradients, each computed here by a loop of its own:

    convolve(x, k) = d/dg,   by_inputs(g, k) = d/dx,   by_kernel(x, g) = d/dk   of   sum_b <g[b], S_b conv(x[b], k)>

so the gradients of each are the other two, and reverse mode goes to any order. A loop of unknown length has no forward mode.
``S_b`` is the identity, or takes from each block of outputs the entry that is chosen. So bias, ReLU and max pooling go along,
while an image is in a core's cache: they are read and written from memory four times less.
"""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from jaxfed.models.windows import Window, channels_last


class Loop(NamedTuple):
    """How a convolution is computed.

    Attributes:
        window: What slides over the padded inputs.
        space: Their spatial sizes.
        group: How many images are taken at a time; divides the batch.
        precision: Of the products.
        pool: The blocks of outputs of which one entry is taken; None if all are.
    """

    window: Window
    space: tuple[int, ...]
    group: int
    precision: lax.PrecisionLike
    pool: tuple[int, ...] | None = None


Chosen = jax.Array | None
"""``[B, *pooled, o]``: which entry of its block each output is, row-major, or their number for none; None without pooling."""


def present(mask: jax.Array) -> jax.Array:
    """How many rows there are up to the last that is there.

    >>> print(present(jnp.array([True, False, True, False])))
    3
    """
    return jnp.max(jnp.where(mask, jnp.arange(1, len(mask) + 1), 0), initial=0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve(loop: Loop, x: jax.Array, kernel: jax.Array, chosen: Chosen, count: jax.Array) -> jax.Array:
    """The outputs ``[B, *out, o]`` of padded inputs ``[B, *space, c]``; zeros for groups of images from ``count`` on."""
    return _lanes_in_turn(_convolve, loop, x, kernel, chosen, count)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_inputs(loop: Loop, g: jax.Array, kernel: jax.Array, chosen: Chosen, count: jax.Array) -> jax.Array:
    """The gradient ``[B, *space, c]`` by the inputs, for the outputs' cotangent ``g`` ``[B, *out, o]``."""
    return _lanes_in_turn(_by_inputs, loop, g, kernel, chosen, count)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_kernel(loop: Loop, x: jax.Array, g: jax.Array, chosen: Chosen, count: jax.Array) -> jax.Array:
    """The gradient ``[*window, c, o]`` by the kernel, for the outputs' cotangent ``g`` ``[B, *out, o]``."""
    return _lanes_in_turn(_by_kernel, loop, x, g, chosen, count)


def convolve_relu_pool(loop: Loop, x: jax.Array, kernel: jax.Array, bias: jax.Array, count: jax.Array) -> jax.Array:
    """``relu(bias + the largest entry of each block of outputs)``; zeros for groups of images from ``count`` on."""
    out, _ = _chosen_outputs(loop, x, kernel, bias, count)  # type: ignore[misc]
    return out


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chosen_outputs(loop: Loop, x: jax.Array, kernel: jax.Array, bias: jax.Array, count: jax.Array) -> tuple:
    return _lanes_in_turn(_convolve_relu_pool, loop, x, kernel, bias, count)


def _chosen_forward(loop: Loop, x: jax.Array, kernel: jax.Array, bias: jax.Array, count: jax.Array) -> tuple:
    out, chosen = _chosen_outputs(loop, x, kernel, bias, count)  # type: ignore[misc]
    return (out, chosen), (x, kernel, chosen, count)


def _chosen_backward(loop: Loop, kept: tuple, cotangents: tuple) -> tuple:
    x, kernel, chosen, count = kept
    g, _ = cotangents
    by_bias = jnp.where(chosen < math.prod(loop.pool or ()), g, 0).sum(range(g.ndim - 1))
    return by_inputs(loop, g, kernel, chosen, count), by_kernel(loop, x, g, chosen, count), by_bias, None


_chosen_outputs.defvjp(_chosen_forward, _chosen_backward)


def _lanes_in_turn(function: Callable, loop: Loop, *arguments: Any) -> Any:
    # Side by side, lanes would wait for the longest, and kernels of their own would make XLA's convolution a grouped one.
    return sequential_vmap(partial(function, loop))(*arguments)


def _convolve(loop: Loop, x: jax.Array, kernel: jax.Array, chosen: Chosen, count: jax.Array) -> jax.Array:
    return _map(loop, lambda x, chosen: _pick(loop, _outputs(loop, x, kernel), chosen), (x, chosen), count)


def _convolve_relu_pool(loop: Loop, x: jax.Array, kernel: jax.Array, bias: jax.Array, count: jax.Array) -> tuple:
    def some(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        entries = _blocks(loop).shifts(_outputs(loop, x, kernel))
        largest = functools.reduce(jnp.maximum, entries)
        out = largest + jnp.expand_dims(bias, range(largest.ndim - 1))
        first = len(entries) - 1
        for place in reversed(range(len(entries) - 1)):
            first = jnp.where(entries[place] == largest, place, first)
        return jnp.maximum(out, 0), jnp.where(out > 0, first, len(entries)).astype(jnp.int8)

    return _map(loop, some, (x,), count)


def _by_inputs(loop: Loop, g: jax.Array, kernel: jax.Array, chosen: Chosen, count: jax.Array) -> jax.Array:
    images = jax.ShapeDtypeStruct((loop.group, *loop.space, kernel.shape[-2]), g.dtype)
    patches = jax.eval_shape(partial(_patches, loop), images)
    weights = kernel.reshape(-1, kernel.shape[-1])

    def some(g: jax.Array, chosen: Chosen) -> jax.Array:
        slopes = jnp.matmul(_spread(loop, g, chosen, patches.shape), weights.T, precision=loop.precision)
        return jax.linear_transpose(partial(_patches, loop), images)(slopes.reshape(patches.shape))[0]

    return _map(loop, some, (g, chosen), count)


def _by_kernel(loop: Loop, x: jax.Array, g: jax.Array, chosen: Chosen, count: jax.Array) -> jax.Array:
    outputs, size = g.shape[-1], math.prod(loop.window.shape) * x.shape[-1]

    def add(number: jax.Array, total: jax.Array) -> jax.Array:
        images, some, places = _group(loop, (x, g, chosen), number)
        patches = _patches(loop, images)
        slopes = _spread(loop, some, places, patches.shape)
        # [o, k * c]: the quicker of the two ways round.
        return total + lax.dot_general(slopes, patches.reshape(-1, size), (((0,), (0,)), ((), ())), precision=loop.precision)

    total = lax.fori_loop(0, _groups(loop, count), add, jnp.zeros((outputs, size), x.dtype))
    return total.T.reshape(*loop.window.shape, x.shape[-1], outputs)


def _map(loop: Loop, function: Callable, arrays: tuple, count: jax.Array) -> Any:
    """``function`` of each group of images that there is, and zeros."""
    there, all_groups = _groups(loop, count), len(arrays[0]) // loop.group
    like = jax.eval_shape(lambda: function(*_group(loop, arrays, jnp.int32(0))))

    def put(number: jax.Array, out: Any, rows: Any) -> Any:
        return jax.tree.map(lambda o, r: lax.dynamic_update_slice_in_dim(o, r, number * loop.group, axis=0), out, rows)

    # Filling all of it with zeros first would write every image twice.
    out = jax.tree.map(lambda x: lax.empty((all_groups * loop.group, *x.shape[1:]), x.dtype), like)
    out = lax.fori_loop(0, there, lambda i, out: put(i, out, function(*_group(loop, arrays, i))), out)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return lax.fori_loop(there, all_groups, lambda i, out: put(i, out, nothing), out)


def _outputs(loop: Loop, images: jax.Array, kernel: jax.Array) -> jax.Array:
    layout = channels_last(len(loop.space))
    options = {"rhs_dilation": loop.window.dilation, "dimension_numbers": layout, "precision": loop.precision}
    return lax.conv_general_dilated(images, kernel, loop.window.strides, "VALID", **options)


def _patches(loop: Loop, images: jax.Array) -> jax.Array:
    return jnp.concatenate(loop.window.shifts(images), axis=-1)


def _pick(loop: Loop, outputs: jax.Array, chosen: Chosen) -> jax.Array:
    """The chosen entry of each block, 0 for none."""
    if chosen is None:
        return outputs
    return sum(jnp.where(chosen == place, entry, 0) for place, entry in enumerate(_blocks(loop).shifts(outputs)))  # type: ignore


def _spread(loop: Loop, g: jax.Array, chosen: Chosen, patches: tuple[int, ...]) -> jax.Array:
    """The transpose of :func:`_pick`, a row ``[o]`` for each patch."""
    if loop.pool is None or chosen is None:
        return g.reshape(-1, g.shape[-1])
    rank = len(loop.pool)
    # Blocks as axes of their own, [n, pooled, pool, ..., o].
    places = jnp.arange(math.prod(loop.pool)).reshape(1, *(n for size in loop.pool for n in (1, size)), 1)
    own = tuple(range(2, 2 * rank + 1, 2))
    spread = jnp.where(jnp.expand_dims(chosen, own) == places, jnp.expand_dims(g, own), 0)
    whole = spread.reshape(len(g), *(n * size for n, size in zip(g.shape[1:-1], loop.pool)), g.shape[-1])
    rest = [(0, out - size) for out, size in zip(patches[1:-1], whole.shape[1:-1])]
    return jnp.pad(whole, [(0, 0), *rest, (0, 0)]).reshape(-1, g.shape[-1])


def _blocks(loop: Loop) -> Window:
    return Window.of(loop.pool or (), loop.pool)


def _groups(loop: Loop, count: jax.Array) -> jax.Array:
    return -(-count // loop.group)


def _group(loop: Loop, arrays: tuple, number: jax.Array) -> tuple:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, number * loop.group, loop.group, axis=0), arrays)


def _differentiate(product: Callable, first: Callable, second: Callable) -> None:
    """Tells ``product(loop, a, b, ...)`` its gradients: functions of ``loop, a, b, cotangent`` and the rest."""

    def forward(loop: Loop, *arguments: Any) -> tuple[jax.Array, tuple]:
        return product(loop, *arguments), arguments

    def backward(loop: Loop, kept: tuple, cotangent: jax.Array) -> tuple:
        a, b, *rest = kept
        return first(loop, a, b, cotangent, *rest), second(loop, a, b, cotangent, *rest), None, None

    product.defvjp(forward, backward)  # type: ignore[attr-defined]


_differentiate(
    convolve,
    lambda loop, x, k, g, *rest: by_inputs(loop, g, k, *rest),
    lambda loop, x, k, g, *rest: by_kernel(loop, x, g, *rest),
)
_differentiate(
    by_inputs,
    lambda loop, g, k, x, *rest: convolve(loop, x, k, *rest),
    lambda loop, g, k, x, *rest: by_kernel(loop, x, g, *rest),
)
_differentiate(
    by_kernel,
    lambda loop, x, g, k, *rest: by_inputs(loop, g, k, *rest),
    lambda loop, x, g, k, *rest: convolve(loop, x, k, *rest),
)
