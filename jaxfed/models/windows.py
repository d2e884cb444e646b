"""The windows of a convolution or a pooling, as slices of the inputs (pure JAX)."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax import lax


def channels_last(rank: int) -> lax.ConvDimensionNumbers:
    """Flax's layout of a convolution over ``rank`` spatial axes: ``[B, *space, c]`` and ``[*window, c, o]``.

    >>> channels_last(2) == lax.conv_dimension_numbers((1,) * 4, (1,) * 4, ("NHWC", "HWIO", "NHWC"))
    True
    """
    last = (0, rank + 1, *range(1, rank + 1))
    return lax.ConvDimensionNumbers(last, (rank + 1, rank, *range(rank)), last)


class Window(NamedTuple):
    """What slides over the spatial axes, with one number of each for every axis.

    Attributes:
        shape: How many entries it has.
        strides: Steps between its places.
        dilation: Spacing of its entries.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int], strides: Sequence[int] | None = None, dilation: Sequence[int] | None = None) -> "Window":
        """A window; steps and spacing are 1 where they are not given.

        >>> Window.of((3, 3), (2, 2)).dilation
        (1, 1)
        """
        ones = (1,) * len(shape)
        return cls(tuple(shape), tuple(strides or ones), tuple(dilation or ones))

    @property
    def reach(self) -> tuple[int, ...]:
        """Over how many places it goes.

        >>> Window.of((3, 2), dilation=(1, 4)).reach
        (3, 5)
        """
        return tuple((size - 1) * d + 1 for size, d in zip(self.shape, self.dilation))

    def shifts(self, x: jax.Array) -> list[jax.Array]:
        """For each of its entries the slice ``[..., *out, c]`` of ``x`` ``[..., *space, c]`` that the entry meets, row-major.

        Raises:
            ValueError: If it does not fit into the space.
        """
        rank = len(self.shape)
        lead, space = x.shape[: -1 - rank], x.shape[-1 - rank : -1]
        if any(r > size for r, size in zip(self.reach, space)):
            raise ValueError(f"A window that reaches over {self.reach} does not fit into inputs of {space} after padding.")
        spans = [(size - r) // stride * stride + 1 for size, r, stride in zip(space, self.reach, self.strides)]

        def shifted(*offset: int) -> jax.Array:
            start = [o * d for o, d in zip(offset, self.dilation)]
            stop = [s + span for s, span in zip(start, spans)]
            ones = (1,) * len(lead)
            return lax.slice(x, [*(0 for _ in lead), *start, 0], [*lead, *stop, x.shape[-1]], [*ones, *self.strides, 1])

        return list(itertools.starmap(shifted, itertools.product(*map(range, self.shape))))
