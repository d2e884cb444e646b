"""Convolution and pooling as shifted slices and one matrix product: drop-ins for ``jax.lax`` and Flax.

XLA's CPU backend computes the gradient of a convolution inside a compiled loop 15 to 60 times slower than outside of one
(`jax#12868 <https://github.com/jax-ml/jax/issues/12868>`_), and a federated round is a loop. A ``vmap`` over clients with their
own weights turns a convolution into a grouped one, which is slow on every backend. Here both are ordinary matrix products:

    out[b, p, o] = sum_{k, c} x[b, stride * p + dilation * k, c] * kernel[k, c, o]

is ``patches @ kernel``, where ``patches`` ``[B, *out, k * c]`` stacks one slice of ``x`` for every offset ``k`` of the kernel.
Given the mask of a batch, a CPU leaves out the rows that are not there (:mod:`jaxfed.models.image_loops`).

Example:
    >>> import flax.linen as nn
    >>> import jax, jax.numpy as jnp
    >>> layer = nn.Conv(8, (3, 3), conv_general_dilated=conv_general_dilated)
    >>> images = jnp.ones((2, 28, 28, 1))
    >>> layer.apply(layer.init(jax.random.key(0), images), images).shape
    (2, 28, 28, 8)
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax import lax

from jaxfed.models import image_loops
from jaxfed.models.windows import Window, channels_last

Padding = str | Sequence[tuple[int, int]]


def conv_general_dilated(  # the arguments are those of jax.lax, in its order
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: Padding,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    *,
    mask: jax.Array | None = None,
) -> jax.Array:
    """``jax.lax.conv_general_dilated`` without XLA's convolution: any number of spatial axes, any layout of axes.

    Channels-last layouts (``NHWC``, ``HWIO``), which Flax uses, are computed as they lie; others are transposed first.

    Args:
        lhs: The inputs, ``[B, *space, c]`` in Flax's layout.
        rhs: The kernel, ``[*window, c / groups, o]`` in Flax's layout.
        window_strides: Steps between windows, one for each spatial axis.
        padding: ``"SAME"``, ``"SAME_LOWER"``, ``"VALID"`` or a pair ``(low, high)`` for each spatial axis.
        lhs_dilation: Spacing of the inputs (transposed convolution).
        rhs_dilation: Spacing of the kernel's entries.
        dimension_numbers: The layouts as in ``jax.lax``, whose default is ``NCHW``.
        feature_group_count: Splits the channels into groups that do not see each other.
        batch_group_count: Only 1.
        precision: Of the matrix product.
        preferred_element_type: Dtype in which the product accumulates and which it returns.
        out_sharding: Only None.
        mask: ``[B]`` which rows are there, None for all. The others may be left out, which saves their time on a CPU: they give
            something finite that means nothing, and no gradient may come from them, as none comes from rows that a loss leaves
            out. For Flax: ``nn.Conv(..., conv_general_dilated=partial(conv_general_dilated, mask=mask))``. With a mask a CPU has
            no forward mode (``jax.jvp``).

    Returns:
        ``[B, *out, o]`` in Flax's layout.

    Raises:
        ValueError: If the arguments ask for what is not computed here, do not fit, or leave no output.

    Example:
        >>> x, kernel = jnp.arange(5.0).reshape(1, 5, 1), jnp.array([1.0, -1.0]).reshape(2, 1, 1)
        >>> conv_general_dilated(x, kernel, (2,), "VALID", dimension_numbers=("NHC", "HIO", "NHC")).ravel()
        Array([-1., -1.], dtype=float32)
    """
    # Flax passes out_sharding=None always; batch groups arise only in JAX's own gradients.
    if batch_group_count != 1 or out_sharding is not None:
        asked = "out_sharding" if batch_group_count == 1 else f"batch_group_count={batch_group_count}"
        raise ValueError(f"conv_general_dilated: {asked} is not computed as a matrix product. Use jax.lax.conv_general_dilated.")
    layout = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    x = lhs.transpose(_channels_last(layout.lhs_spec))
    kernel = rhs.transpose(*layout.rhs_spec[2:], layout.rhs_spec[1], layout.rhs_spec[0])
    _check_channels(x.shape[-1], kernel.shape, feature_group_count)
    _check_mask(mask, len(x))
    window = Window.of(kernel.shape[:-2], window_strides, rhs_dilation)
    x = _pad(x, window, padding, lhs_dilation, 0)
    options = {"precision": precision, "preferred_element_type": preferred_element_type}
    if feature_group_count == 1:
        out = _product(x, window, kernel, options, mask)
    else:
        out = (_depthwise if kernel.shape[-2] == 1 else _grouped)(x, window, kernel, options)
    order = _channels_last(layout.out_spec)
    return out.transpose([order.index(axis) for axis in range(out.ndim)])


def _channels_last(spec: Sequence[int]) -> list[int]:
    """The axes of a ``(batch, channels, *space)`` description in the order batch, space, channels."""
    return [spec[0], *spec[2:], spec[1]]


def _check_mask(mask: jax.Array | None, rows: int) -> None:
    if mask is not None and mask.shape != (rows,):
        raise ValueError(f"A convolution's mask has an entry for each row: expected shape {(rows,)}, got {mask.shape}.")


def _check_channels(channels: int, kernel: Sequence[int], groups: int) -> None:
    if kernel[-2] * groups != channels or kernel[-1] % groups:
        raise ValueError(
            f"A convolution of {channels} channels in {groups} groups needs a kernel [..., {channels}/{groups}, o] "
            f"with o a multiple of {groups}, got a kernel of shape {tuple(kernel)}."
        )


# Patches that fit a core's cache are written and read there: a training step of a small CNN takes 0.7 of the time that it takes
# with the patches of a whole batch. Fewer at a time than the lower bound do not repay the loop.
_CACHE = (2**16, 2**20)


def _product(x: jax.Array, window: Window, kernel: jax.Array, options: dict, mask: jax.Array | None) -> jax.Array:
    group = _images_at_a_time(x, window)
    if group is None:
        return _patches_product(window.shifts(x), kernel, options)
    plain = x.dtype == kernel.dtype == (options["preferred_element_type"] or x.dtype)
    if plain and _leaves_out(mask):
        loop = image_loops.Loop(window, x.shape[1:-1], group, options["precision"])
        return image_loops.convolve(loop, x, kernel, None, image_loops.present(mask))

    def some(images: jax.Array) -> jax.Array:
        patches = jnp.concatenate(window.shifts(images), axis=-1)
        weights = kernel.reshape(patches.shape[-1], -1)
        # As kernel^T patches^T, whose gradient by the kernel is the quicker of the two.
        out = lax.dot_general(weights, patches.reshape(-1, len(weights)), (((0,), (1,)), ((), ())), **options)
        return out.T.reshape(*patches.shape[:-1], -1)

    # The backward loop makes the patches anew: that is quicker than to read those of the batch from memory.
    out = lax.map(jax.checkpoint(some, prevent_cse=False), x.reshape(-1, group, *x.shape[1:]))
    return out.reshape(len(x), *out.shape[2:])


def _images_at_a_time(x: jax.Array, window: Window) -> int | None:
    """How many images' patches fit the cache; None where there is no reason for a loop."""
    one = jax.eval_shape(window.shifts, x[:1])
    size = sum(math.prod(shift.shape) for shift in one) * x.dtype.itemsize
    group = max((g for g in range(1, len(x) + 1) if len(x) % g == 0 and g * size <= _CACHE[1]), default=1)
    # Read at trace time: an accelerator wants one large product, and has no cache to keep.
    whole = jax.default_backend() != "cpu" or group == len(x) or group * size < _CACHE[0]
    return None if whole else group


def _leaves_out(mask: Any) -> TypeGuard[jax.Array]:
    """Whether rows may be missing. With a NumPy array of the whole batch the program is traced as without a mask."""
    return mask is not None and (isinstance(mask, jax.Array) or not mask.all())


def _patches_product(shifts: list[jax.Array], kernel: jax.Array, options: dict) -> jax.Array:
    patches = jnp.concatenate(shifts, axis=-1)
    weights = kernel.reshape(patches.shape[-1], -1)
    rows = math.prod(patches.shape[:-1])
    # The kernel's gradient is a sum over all rows, and XLA's CPU product runs a long sum on one core. Two products over half of
    # the rows each make a training step of a small CNN 1.15 times faster on two cores; with few rows for many weights they cost.
    parts = 2 if rows % 2 == 0 and rows >= 8 * len(weights) else 1
    halves = patches.reshape(parts, rows // parts, -1)
    out = jnp.matmul(halves, jnp.broadcast_to(weights, (parts, *weights.shape)), **options)
    return out.reshape(*patches.shape[:-1], -1)


def _grouped(x: jax.Array, window: Window, kernel: jax.Array, options: dict) -> jax.Array:
    inner, outer = kernel.shape[-2:]
    groups = x.shape[-1] // inner
    patches = jnp.stack([s.reshape(*s.shape[:-1], groups, inner) for s in window.shifts(x)], axis=-3)
    weights = kernel.reshape(-1, inner, groups, outer // groups)
    out = jnp.einsum("...kgc,kcgo->...go", patches, weights, **options)
    return out.reshape(*out.shape[:-2], outer)


def _depthwise(x: jax.Array, window: Window, kernel: jax.Array, options: dict) -> jax.Array:
    """Every channel alone: a sum over the window is 2.5 times faster than batched 1 x 1 products."""
    dtype, slices = options["preferred_element_type"], window.shifts(x)
    weights = kernel.reshape(len(slices), *(1,) * (x.ndim - 1), x.shape[-1], -1)
    out = sum(s[..., None].astype(dtype or s.dtype) * w.astype(dtype or w.dtype) for s, w in zip(slices, weights))
    return jnp.reshape(out, (*slices[0].shape[:-1], -1))


def conv_relu_max_pool(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    pool: Sequence[int],
    *,
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
    mask: jax.Array | None = None,
) -> jax.Array:
    """``max_pool(relu(convolution + bias), pool, pool)`` in one pass over the images.

    On a CPU with a mask all of it is done while an image is in a core's cache, so that a training step of a small CNN takes 0.9
    of the time of the three one after the other. Where several entries of a block are the largest, either the first of them gets
    the gradient or all share it.

    Args:
        x: The inputs, ``[B, *space, c]``.
        kernel: ``[*window, c, o]``.
        bias: ``[o]``.
        pool: The blocks, which lie side by side, one size for each spatial axis; a rest is cut off.
        strides: Steps between windows; 1 where not given.
        padding: As for :func:`conv_general_dilated`.
        mask: ``[B]`` which rows are there, as for :func:`conv_general_dilated`.

    Returns:
        ``[B, *out, o]``.

    Raises:
        ValueError: If the arguments do not fit, or leave no output.

    Example:
        >>> x, kernel = jnp.arange(6.0).reshape(1, 6, 1), jnp.array([1.0, -2.0]).reshape(2, 1, 1)
        >>> conv_relu_max_pool(x, kernel, jnp.array([3.5]), (2,)).ravel()
        Array([1.5, 0. ], dtype=float32)
    """
    rank = kernel.ndim - 2
    if x.ndim != rank + 2 or len(pool) != rank or bias.shape != kernel.shape[-1:]:
        expected = f"inputs of {rank + 2} axes, {rank} sizes of blocks and a bias of shape {kernel.shape[-1:]}"
        given = f"{x.ndim} axes, {tuple(pool)} and {bias.shape}"
        raise ValueError(f"conv_relu_max_pool: a kernel of shape {kernel.shape} needs {expected}, got {given}.")
    _check_channels(x.shape[-1], kernel.shape, 1)
    _check_mask(mask, len(x))
    window = Window.of(kernel.shape[:-2], strides)
    padded = _pad(x, window, padding, None, 0)
    group = _images_at_a_time(padded, window)
    one_pass = x.dtype == kernel.dtype == bias.dtype and math.prod(pool) < 127  # the number of an entry is a byte
    if group is None or not (one_pass and _leaves_out(mask)):
        out = conv_general_dilated(x, kernel, window.strides, padding, dimension_numbers=channels_last(rank), mask=mask)
        # The largest entry first: bias and ReLU keep the order, and then take a part of the time.
        return jax.nn.relu(max_pool(out, pool, pool) + jnp.expand_dims(bias, range(rank + 1)))
    loop = image_loops.Loop(window, padded.shape[1:-1], group, None, tuple(pool))
    return image_loops.convolve_relu_pool(loop, padded, kernel, bias, image_loops.present(mask))


def max_pool(
    inputs: jax.Array, window_shape: Sequence[int], strides: Sequence[int] | None = None, padding: Padding = "VALID"
) -> jax.Array:
    """The maximum over each window, as ``flax.linen.max_pool``.

    Where several entries of a window are the maximum, the gradient is shared among them: equally where windows lie side by side,
    pair by pair where they overlap. ``jax.lax`` gives all of it to the first. All are subgradients that sum to one.

    Args:
        inputs: ``[..., *space, c]``.
        window_shape: The window, one size for each spatial axis.
        strides: Steps between windows; 1 where not given.
        padding: ``"SAME"``, ``"VALID"`` or a pair ``(low, high)`` for each spatial axis; padded places never win.

    Returns:
        ``[..., *out, c]``.

    Raises:
        ValueError: If the arguments do not fit the inputs or leave no output.

    Example:
        >>> max_pool(jnp.array([[[1.0], [5.0], [2.0], [3.0]]]), (2,), (2,)).ravel()
        Array([5., 3.], dtype=float32)
    """
    dtype = inputs.dtype
    lowest = -jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min
    if tuple(window_shape) == tuple(strides or ()):
        blocks = _blocks(_pad(inputs, Window.of(window_shape, strides), padding, None, lowest), window_shape)
        return _block_max(tuple(range(blocks.ndim - 2 * len(window_shape), blocks.ndim - 1, 2)), blocks)
    # Maxima of strided slices and not a reduction: four times faster with JAX's own gradient on a CPU.
    return _pairwise(jnp.maximum, _windows(inputs, window_shape, strides, padding, lowest))


def _blocks(x: jax.Array, window: Sequence[int]) -> jax.Array:
    """Windows side by side as axes of their own, ``[out, window]`` for each spatial axis, ``c`` last; a rest is cut off."""
    rank = len(window)
    lead, space = x.shape[: -1 - rank], x.shape[-1 - rank : -1]
    if any(size < w for size, w in zip(space, window)):
        raise ValueError(f"A window that reaches over {tuple(window)} does not fit into inputs of {space} after padding.")
    counts = [size // w for size, w in zip(space, window)]
    whole = lax.slice(x, [0] * x.ndim, [*lead, *(n * w for n, w in zip(counts, window)), x.shape[-1]])
    return whole.reshape(lead + tuple(itertools.chain(*zip(counts, window))) + x.shape[-1:])


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _block_max(axes: tuple[int, ...], x: jax.Array) -> jax.Array:
    return x.max(axes)


@_block_max.defjvp
def _block_max_jvp(axes: tuple[int, ...], primals: tuple, tangents: tuple) -> tuple:
    (x,), (tangent,) = primals, tangents
    # A comparison and a choice, where JAX's own rule multiplies and divides arrays of the inputs' size.
    maxima = x.max(axes, keepdims=True)
    chosen = x == maxima
    share = 1 / chosen.sum(axes).astype(x.dtype)
    return maxima.reshape(share.shape), jnp.where(chosen, tangent, 0).sum(axes) * share


def avg_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
    count_include_pad: bool = True,
) -> jax.Array:
    """The mean over each window, as ``flax.linen.avg_pool``.

    Args:
        inputs: ``[..., *space, c]``.
        window_shape: The window, one size for each spatial axis.
        strides: Steps between windows; 1 where not given.
        padding: ``"SAME"``, ``"VALID"`` or a pair ``(low, high)`` for each spatial axis.
        count_include_pad: Whether padded places count as zeros or not at all.

    Returns:
        ``[..., *out, c]``.

    Raises:
        ValueError: If the arguments do not fit the inputs or leave no output.

    Example:
        >>> avg_pool(jnp.array([[[1.0], [5.0], [2.0], [4.0]]]), (2,), (2,)).ravel()
        Array([3., 3.], dtype=float32)
    """
    total = _pairwise(jnp.add, _windows(inputs, window_shape, strides, padding, 0))
    if count_include_pad:
        return total / math.prod(window_shape)
    ones = jnp.ones((*inputs.shape[:-1], 1), total.dtype)
    return total / _pairwise(jnp.add, _windows(ones, window_shape, strides, padding, 0))


def _windows(inputs: jax.Array, shape: Sequence[int], strides: Sequence[int] | None, padding: Padding, fill: Any) -> list:
    window = Window.of(shape, strides)
    return window.shifts(_pad(inputs, window, padding, None, fill))


def _pairwise(combine: Callable, values: list[jax.Array]) -> jax.Array:
    """Folds by halves, so that equal entries are treated alike."""
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return combine(_pairwise(combine, values[:half]), _pairwise(combine, values[half:]))


def _pad(x: jax.Array, window: Window, padding: Padding, dilation: Sequence[int] | None, fill: Any) -> jax.Array:
    """Pads (or crops) and dilates the spatial axes, which are the last but one and those before it."""
    rank = len(window.shape)
    stretch = dilation or (1,) * rank
    if not rank == len(window.strides) == len(stretch) == len(window.dilation) or x.ndim <= rank:
        raise ValueError(
            f"A window of shape {window.shape} needs {rank} spatial axes with one stride and dilation each, "
            f"got inputs {x.shape}, strides {window.strides}, dilations {tuple(stretch)} and {window.dilation}."
        )
    if isinstance(padding, str):
        if any(d != 1 for d in stretch):
            raise ValueError(f"padding={padding!r} has no meaning with an input dilation; give (low, high) pairs.")
        padding = lax.padtype_to_pads(x.shape[-1 - rank : -1], window.reach, window.strides, padding)
    # lax.pad takes negative widths, which crop as they do in XLA's convolution, and spreads the entries for an input dilation.
    space = [(low, high, d - 1) for (low, high), d in zip(padding, stretch, strict=True)]
    return lax.pad(x, jnp.asarray(fill, x.dtype), [(0, 0, 0)] * (x.ndim - rank - 1) + space + [(0, 0, 0)])
