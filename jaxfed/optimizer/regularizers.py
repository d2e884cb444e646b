"""Penalties on the weights, as additions to the gradient. They run before the modules."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxfed import part, trees
from jaxfed.base import Regularizer
from jaxfed.messages import Params


def _add(penalty: Callable[..., jax.Array], rate: Any, updates: Params, params: Params | None, *rest: Params) -> Params:
    """``updates + rate * penalty(params, ...)`` in the dtypes of ``updates``."""
    if params is None:
        raise ValueError("A regularizer needs the weights: call update(updates, state, params) with params.")
    return jax.tree.map(lambda g, *w: g + trees.cast(rate, g) * trees.cast(penalty(*w), g), updates, params, *rest)


class FedProx(Regularizer):
    r"""Pulls local weights towards those the round began with.

    .. math:: g \leftarrow g + \alpha (w - w_0), \quad \text{the gradient of } \tfrac{\alpha}{2} \lVert w - w_0 \rVert^2

    Args:
        alpha: Strength of the pull, the paper's mu (accepted as a name, too). Values of 0.001 to 1 are usual.

    Example:
        >>> prox = FedProx(alpha=0.5)
        >>> anchor = prox.init(jnp.array([1.0, 2.0]))
        >>> gradient, _ = prox.update(jnp.zeros(2), anchor, jnp.array([3.0, 2.0]))
        >>> print(gradient)
        [1. 0.]

    References:
        Li et al., `Federated Optimization in Heterogeneous Networks <https://arxiv.org/abs/1812.06127>`_, 2020
    """

    name = "fedprox"
    aliases: ClassVar = {"mu": "alpha"}
    alpha: float = part.number(default=0.01, at_least=0)

    def init(self, params: Params) -> Params:
        """The anchor, in buffers of its own."""
        return trees.copy(params)

    def update(self, updates: Params, state: Params, params: Params | None = None) -> tuple[Params, Params]:
        """Adds ``alpha * (params - anchor)``.

        Raises:
            ValueError: If ``params`` is missing.
        """
        return _add(jnp.subtract, self.alpha, updates, params, state), state


class Lasso(Regularizer):
    r"""Pulls every weight towards zero with the same strength.

    .. math:: g \leftarrow g + \alpha \operatorname{sign}(w), \quad \text{the gradient of } \alpha \lVert w \rVert_1

    Args:
        alpha: Strength of the pull.

    Example:
        >>> gradient, _ = Lasso(0.5).update(jnp.zeros(3), (), jnp.array([3.0, 0.0, -2.0]))
        >>> print(gradient)
        [ 0.5  0.  -0.5]
    """

    name = "lasso"
    alpha: float = part.number(default=0.01, at_least=0)

    def update(self, updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        """Adds ``alpha * sign(params)``.

        Raises:
            ValueError: If ``params`` is missing.
        """
        return _add(jnp.sign, self.alpha, updates, params), state


class Ridge(Regularizer):
    r"""Pulls every weight towards zero in proportion to its size.

    .. math:: g \leftarrow g + 2 \alpha w, \quad \text{the gradient of } \alpha \lVert w \rVert^2

    Note the 2: the ``weight_decay`` of PyTorch and ``optax.add_decayed_weights(x)`` are ``Ridge(x / 2)``.

    Args:
        alpha: Strength of the pull.

    Example:
        >>> gradient, _ = Ridge(0.5).update(jnp.zeros(2), (), jnp.array([3.0, -2.0]))
        >>> print(gradient)
        [ 3. -2.]
    """

    name = "ridge"
    alpha: float = part.number(default=0.01, at_least=0)

    def update(self, updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        """Adds ``2 * alpha * params``.

        Raises:
            ValueError: If ``params`` is missing.
        """
        return _add(lambda w: 2 * w, self.alpha, updates, params), state
