"""Clipping of gradients to a maximum L2 norm. A zero gradient stays zero, NaN stays NaN."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxfed import part, trees
from jaxfed.base import OptiModule
from jaxfed.messages import Params


def clip(updates: Params, max_norm: Any) -> Params:
    """``updates * min(max_norm / norm, 1)``, with one norm over all leaves, computed in float32 or wider."""
    wide = trees.widen(updates)
    factor = max_norm / jnp.maximum(trees.norm(wide), max_norm)
    return trees.cast_like(trees.scale(factor, wide), updates)


class L2Clipping(OptiModule):
    r"""Clips each leaf by itself.

    .. math:: g_k \leftarrow g_k \min(c / \lVert g_k \rVert_2, 1)

    A tree of ``n`` leaves can thus have a norm of up to :math:`c \sqrt{n}`: privacy needs :class:`L2GlobalClipping`.

    Args:
        max_norm: The greatest norm of a leaf.

    Example:
        >>> clipped, _ = L2Clipping(max_norm=1.0).update({"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}, ())
        >>> print(clipped["a"], clipped["b"])
        [0.6 0.8] [0.5]
    """

    name = "l2-clipping"
    max_norm: float = part.number(default=1.0, above=0)

    def update(self, updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        """The clipped leaves."""
        return jax.tree.map(lambda g: clip(g, self.max_norm), updates), state


class L2GlobalClipping(OptiModule):
    r"""Clips all leaves together, which keeps the direction.

    .. math:: g \leftarrow g \min(c / \lVert g \rVert_2, 1)

    Args:
        max_norm: The greatest norm over all leaves.

    Example:
        >>> clipped, _ = L2GlobalClipping(max_norm=1.0).update({"a": jnp.array([3.0]), "b": jnp.array([4.0])}, ())
        >>> print(clipped["a"], clipped["b"])
        [0.6] [0.8]
    """

    name = "l2-global-clipping"
    max_norm: float = part.number(default=1.0, above=0)

    def update(self, updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        """The clipped tree."""
        return clip(updates, self.max_norm), state
