"""Running means and sums of gradients.

Their state is held in float32 or wider whatever the weights' dtype (in bfloat16 a running mean with beta = 0.999 would only ever
grow, because 0.999 is 1 there), and updates leave in the dtype in which they came.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxfed import part, trees
from jaxfed.base import OptiModule
from jaxfed.messages import Params


class Resettable(OptiModule):
    """A module with a ``round_reset`` field: True begins every round afresh even where ``keep_state=True`` would carry on."""

    @property
    def carries_on(self) -> bool:
        """Whether a kept state is used: not with ``round_reset``."""
        return not self.round_reset  # pyright: ignore[reportAttributeAccessIssue]


def wide_zeros(params: Params) -> Params:
    """Zeros like ``params`` in float32 or wider."""
    return trees.zeros_like(trees.widen(params))


class Momentum(Resettable):
    r"""Heavy-ball momentum as in PyTorch: no dampening, the learning rate stays outside. Equals ``optax.trace``.

    .. math:: v \leftarrow \beta v + g, \qquad g \leftarrow v \;\text{ or, with Nesterov's, }\; \beta v + g

    Args:
        beta: How much of the past is kept, in [0, 1).
        nesterov: Whether to look one step ahead.
        round_reset: Whether every round begins at zero even where state is kept.

    Example:
        >>> module = Momentum(beta=0.5)
        >>> state = module.init(jnp.zeros(1))
        >>> for gradient in (1.0, 1.0, 0.0):
        ...     update, state = module.update(jnp.array([gradient]), state)
        ...     print(update)
        [1.]
        [1.5]
        [0.75]

    References:
        Polyak, Some methods of speeding up the convergence of iteration methods, 1964
    """

    name = "momentum"
    beta: float = part.number(default=0.9, at_least=0, below=1)
    nesterov: bool = part.static(default=False)
    round_reset: bool = part.static(default=False)

    def init(self, params: Params) -> Params:
        """No velocity."""
        return wide_zeros(params)

    def update(self, updates: Params, state: Params, params: Params | None = None) -> tuple[Params, Params]:
        """The new velocity, or with ``nesterov`` the one after it."""
        gradients = trees.widen(updates)
        velocity = trees.add_scaled(gradients, self.beta, state)
        ahead = trees.add_scaled(gradients, self.beta, velocity) if self.nesterov else velocity
        return trees.cast_like(ahead, updates), velocity


class EWMA(Resettable):
    r"""Exponentially weighted mean, without bias correction. Equals ``optax.ema(debias=False)``.

    .. math:: s \leftarrow \beta s + (1 - \beta) g, \qquad g \leftarrow s

    Args:
        beta: How much of the past is kept, in [0, 1).
        round_reset: Whether every round begins at zero even where state is kept.

    Example:
        >>> module = EWMA(beta=0.5)
        >>> update, state = module.update(jnp.ones(1), module.init(jnp.zeros(1)))
        >>> print(update, module.update(jnp.ones(1), state)[0])
        [0.5] [0.75]
    """

    name = "ewma"
    beta: float = part.number(default=0.9, at_least=0, below=1)
    round_reset: bool = part.static(default=False)

    def init(self, params: Params) -> Params:
        """A mean of zero."""
        return wide_zeros(params)

    def update(self, updates: Params, state: Params, params: Params | None = None) -> tuple[Params, Params]:
        """The new mean."""
        mean = trees.average(self.beta, state, trees.widen(updates))
        return trees.cast_like(mean, updates), mean


class YogiMomentum(Resettable):
    r"""Yogi's mean, which moves by a share of the new value's size alone. It is meant for squares, as :class:`Yogi` uses it.

    .. math:: s \leftarrow s - (1 - \beta) \operatorname{sign}(s - g) \, g, \qquad g \leftarrow s

    Args:
        beta: One minus the share, in [0, 1).
        round_reset: Whether every round begins at zero even where state is kept.

    Example:
        >>> module = YogiMomentum(beta=0.5)
        >>> update, state = module.update(jnp.full(1, 4.0), module.init(jnp.zeros(1)))
        >>> print(update, module.update(jnp.full(1, 1.0), state)[0])
        [2.] [1.5]

    References:
        Zaheer et al., Adaptive Methods for Nonconvex Optimization, 2018
    """

    name = "yogi-momentum"
    beta: float = part.number(default=0.9, at_least=0, below=1)
    round_reset: bool = part.static(default=False)

    def init(self, params: Params) -> Params:
        """A mean of zero."""
        return wide_zeros(params)

    def update(self, updates: Params, state: Params, params: Params | None = None) -> tuple[Params, Params]:
        """The new mean."""
        mean = move_by_sign(self.beta, state, trees.widen(updates))
        return trees.cast_like(mean, updates), mean


def move_by_sign(decay: Any, old: Params, new: Params) -> Params:
    """``old - (1 - decay) * sign(old - new) * new``."""

    def move(x: jax.Array, y: jax.Array) -> jax.Array:
        return x - trees.cast(1 - decay, x) * jnp.sign(x - y) * y

    return jax.tree.map(move, old, new)
