"""A convolution and its gradients a few images at a time, up to the last image that is there (pure JAX, for CPUs).

A client's last batch is rarely full, and a convolution is most of a CNN's time: a loop that ends at the last real row leaves
the others out. With ``x`` the padded inputs, ``k`` the kernel and ``g`` of the outputs' shape, one trilinear form has three
gradients, each computed here by a loop of its own:

    convolve(x, k) = d/dg,   by_inputs(g, k) = d/dx,   by_kernel(x, g) = d/dk   of   sum_b <g[b], conv(x[b], k)>

so the gradients of each are the other two, and reverse mode goes to any order. A loop of unknown length has no forward mode.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from jaxfed.models.windows import Window


class Loop(NamedTuple):
    """How a convolution is computed.

    Attributes:
        window: What slides over the padded inputs.
        space: Their spatial sizes.
        group: How many images are taken at a time; divides the batch.
        precision: Of the products.
    """

    window: Window
    space: tuple[int, ...]
    group: int
    precision: lax.PrecisionLike


def present(mask: jax.Array) -> jax.Array:
    """How many rows there are up to the last that is there.

    >>> print(present(jnp.array([True, False, True, False])))
    3
    """
    return jnp.max(jnp.where(mask, jnp.arange(1, len(mask) + 1), 0), initial=0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve(loop: Loop, x: jax.Array, kernel: jax.Array, count: jax.Array) -> jax.Array:
    """The outputs ``[B, *out, o]`` of padded inputs ``[B, *space, c]``; zeros for groups of images from ``count`` on."""
    return _lanes_in_turn(_convolve, loop, x, kernel, count)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_inputs(loop: Loop, g: jax.Array, kernel: jax.Array, count: jax.Array) -> jax.Array:
    """The gradient ``[B, *space, c]`` by the inputs, for the outputs' cotangent ``g`` ``[B, *out, o]``."""
    return _lanes_in_turn(_by_inputs, loop, g, kernel, count)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_kernel(loop: Loop, x: jax.Array, g: jax.Array, count: jax.Array) -> jax.Array:
    """The gradient ``[*window, c, o]`` by the kernel, for the outputs' cotangent ``g`` ``[B, *out, o]``."""
    return _lanes_in_turn(_by_kernel, loop, x, g, count)


def _lanes_in_turn(product: Callable, loop: Loop, a: jax.Array, b: jax.Array, count: jax.Array) -> jax.Array:
    # Side by side, lanes would wait for the longest, and kernels of their own would make XLA's convolution a grouped one.
    return sequential_vmap(partial(product, loop))(a, b, count)


def _convolve(loop: Loop, x: jax.Array, kernel: jax.Array, count: jax.Array) -> jax.Array:
    rank = len(loop.space)
    last = (0, rank + 1, *range(1, rank + 1))
    layout = lax.ConvDimensionNumbers(last, (rank + 1, rank, *range(rank)), last)
    options = {"rhs_dilation": loop.window.dilation, "dimension_numbers": layout, "precision": loop.precision}

    def some(images: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(images, kernel, loop.window.strides, "VALID", **options)

    return _map(loop, some, x, count)


def _by_inputs(loop: Loop, g: jax.Array, kernel: jax.Array, count: jax.Array) -> jax.Array:
    images = jax.ShapeDtypeStruct((loop.group, *loop.space, kernel.shape[-2]), g.dtype)
    patches = jax.eval_shape(partial(_patches, loop), images)
    weights = kernel.reshape(-1, kernel.shape[-1])

    def some(g: jax.Array) -> jax.Array:
        slopes = jnp.matmul(g.reshape(-1, g.shape[-1]), weights.T, precision=loop.precision)
        return jax.linear_transpose(partial(_patches, loop), images)(slopes.reshape(patches.shape))[0]

    return _map(loop, some, g, count)


def _by_kernel(loop: Loop, x: jax.Array, g: jax.Array, count: jax.Array) -> jax.Array:
    outputs, size = g.shape[-1], math.prod(loop.window.shape) * x.shape[-1]

    def add(number: jax.Array, total: jax.Array) -> jax.Array:
        patches, slopes = _patches(loop, _group(loop, x, number)), _group(loop, g, number)
        rows = (((0,), (0,)), ((), ()))
        # [o, k * c]: the quicker of the two ways round.
        return total + lax.dot_general(slopes.reshape(-1, outputs), patches.reshape(-1, size), rows, precision=loop.precision)

    total = lax.fori_loop(0, _groups(loop, count), add, jnp.zeros((outputs, size), x.dtype))
    return total.T.reshape(*loop.window.shape, x.shape[-1], outputs)


def _map(loop: Loop, function: Callable[[jax.Array], jax.Array], x: jax.Array, count: jax.Array) -> jax.Array:
    """``function`` of each group of images that there is, and zeros."""
    there, all_groups = _groups(loop, count), len(x) // loop.group
    like = jax.eval_shape(function, jax.ShapeDtypeStruct((loop.group, *x.shape[1:]), x.dtype))

    def put(number: jax.Array, out: jax.Array, rows: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(out, rows, number * loop.group, axis=0)

    # Filling all of it with zeros first would write every image twice.
    out = lax.empty((len(x), *like.shape[1:]), like.dtype)
    out = lax.fori_loop(0, there, lambda i, out: put(i, out, function(_group(loop, x, i))), out)
    return lax.fori_loop(there, all_groups, lambda i, out: put(i, out, jnp.zeros(like.shape, like.dtype)), out)


def _patches(loop: Loop, images: jax.Array) -> jax.Array:
    return jnp.concatenate(loop.window.shifts(images), axis=-1)


def _groups(loop: Loop, count: jax.Array) -> jax.Array:
    return -(-count // loop.group)


def _group(loop: Loop, x: jax.Array, number: jax.Array) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, number * loop.group, loop.group, axis=0)


def _differentiate(product: Callable, first: Callable, second: Callable) -> None:
    """Tells ``product(loop, a, b, count)`` its gradients: functions of ``loop, a, b, cotangent, count``."""

    def forward(loop: Loop, a: jax.Array, b: jax.Array, count: jax.Array) -> tuple[jax.Array, tuple]:
        return product(loop, a, b, count), (a, b, count)

    def backward(loop: Loop, kept: tuple, cotangent: jax.Array) -> tuple:
        a, b, count = kept
        return first(loop, a, b, cotangent, count), second(loop, a, b, cotangent, count), None

    product.defvjp(forward, backward)  # type: ignore[attr-defined]


_differentiate(
    convolve,
    lambda loop, x, k, g, count: by_inputs(loop, g, k, count),
    lambda loop, x, k, g, count: by_kernel(loop, x, g, count),
)
_differentiate(
    by_inputs,
    lambda loop, g, k, x, count: convolve(loop, x, k, count),
    lambda loop, g, k, x, count: by_kernel(loop, x, g, count),
)
_differentiate(
    by_kernel,
    lambda loop, x, g, k, count: by_inputs(loop, g, k, count),
    lambda loop, x, g, k, count: convolve(loop, x, k, count),
)
