"""Steps divided by a running size of the gradient: Adagrad, RMSProp, Adam, Yogi.

The systems that offer these disagree about starting values, about where ``eps`` is added, and about the correction for starting
at zero. Here each of those is a field whose default is declearn's, and each system's choice is a preset:
``Adam.paper(tau=1e-3)``, in configs ``"adam:paper"``. State is held in float32 or wider, updates keep their dtype.
"""

from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp

from jaxfed import checks, part, trees
from jaxfed.messages import Params
from jaxfed.optimizer.momentum import Resettable, move_by_sign, wide_zeros


def _divide(gradients: Params, roots: Params) -> Params:
    """``gradients / roots``, where 0 / 0 is 0: with ``eps = 0`` a weight that never had a gradient stays where it is."""
    return jax.tree.map(lambda g, root: jnp.where(root == 0, 0, g / root), gradients, roots)


def _roots(squares: Params, eps: Any, eps_root: Any) -> Params:
    return jax.tree.map(lambda v: jnp.sqrt(v + trees.cast(eps_root, v)) + trees.cast(eps, v), squares)


def correction(decay: Any, steps: Any, leaf: jax.Array) -> jax.Array:
    """``1 - decay ** steps`` in a leaf's dtype.

    The plain power loses digits: in float32 it is off by 1.3e-5 for a decay of 0.999 and one step, this form by 1e-7.

    >>> print(correction(0.5, 2, jnp.ones(())), correction(0.0, 1, jnp.ones(())))
    0.75 1.0
    """
    log_decay = jnp.log1p(-trees.cast(1 - decay, leaf))
    return -jnp.expm1(trees.cast(steps, leaf) * log_decay)


def _correct(decay: Any, steps: Any, tree: Params) -> Params:
    return jax.tree.map(lambda x: x / correction(decay, steps, x), tree)


class Adagrad(Resettable):
    r"""Divides by the root of the sum of all squares so far.

    .. math:: v \leftarrow v + g^2, \qquad g \leftarrow \frac{g}{\sqrt{v + \epsilon_\text{root}} + \epsilon}

    Args:
        eps: Added to the root.
        round_reset: Whether every round begins afresh even where state is kept.
        eps_root: Added inside the root.
        init_v: The sum's starting value.

    Example:
        >>> module = Adagrad(eps=0.0)
        >>> update, _ = module.update(jnp.array([3.0, -4.0]), module.init(jnp.zeros(2)))
        >>> print(update)
        [ 1. -1.]

    References:
        Duchi et al., `Adaptive Subgradient Methods <https://jmlr.org/papers/v12/duchi11a.html>`_, 2011
    """

    name = "adagrad"
    presets: ClassVar = ("declearn", "paper", "optax", "flower")
    eps: float = part.number(default=1e-7, at_least=0)
    round_reset: bool = part.static(default=False)
    eps_root: float = part.number(default=0.0, at_least=0)
    init_v: float = part.number(default=0.0, at_least=0)

    @classmethod
    def declearn(cls, eps: float = 1e-7) -> Self:
        """A sum that starts at 0, ``eps`` outside the root: the defaults."""
        return cls(eps=eps)

    @classmethod
    def paper(cls, tau: float = 1e-3) -> Self:
        """FedAdagrad of `Reddi et al. <https://arxiv.org/abs/2003.00295>`_: a sum that starts at ``tau ** 2``, ``eps = tau``."""
        tau = _positive_tau(tau)
        return cls(eps=tau, init_v=tau**2)

    @classmethod
    def optax(cls, eps: float = 1e-7, init_v: float = 0.1) -> Self:
        """``optax.scale_by_rss``: a sum that starts at 0.1, ``eps`` inside the root."""
        return cls(eps=0.0, eps_root=eps, init_v=init_v)

    @classmethod
    def flower(cls, tau: float = 1e-3) -> Self:
        """Flower's FedAdagrad: a sum that starts at 0, ``eps = tau``."""
        return cls(eps=tau)

    def init(self, params: Params) -> Params:
        """A sum of ``init_v``."""
        return trees.full_like(wide_zeros(params), self.init_v)

    def update(self, updates: Params, state: Params, params: Params | None = None) -> tuple[Params, Params]:
        """Adds the squares, then divides."""
        gradients = trees.widen(updates)
        total = trees.add_scaled(state, 1.0, trees.square(gradients))
        scaled = _divide(gradients, _roots(total, self.eps, self.eps_root))
        return trees.cast_like(scaled, updates), total


class RMSProp(Resettable):
    r"""Divides by the root of a running mean of squares, without bias correction.

    .. math:: v \leftarrow \beta v + (1 - \beta) g^2, \qquad g \leftarrow \frac{g}{\sqrt{v + \epsilon_\text{root}} + \epsilon}

    Args:
        beta: How much of the past is kept, in [0, 1).
        eps: Added to the root.
        round_reset: Whether every round begins afresh even where state is kept.
        eps_root: Added inside the root.
        init_v: The mean's starting value.

    Example:
        >>> module = RMSProp(beta=0.75, eps=0.0)
        >>> update, _ = module.update(jnp.array([3.0, -4.0]), module.init(jnp.zeros(2)))
        >>> print(update)
        [ 2. -2.]

    References:
        Tieleman and Hinton, Lecture 6.5 of Neural Networks for Machine Learning, 2012
    """

    name = "rmsprop"
    presets: ClassVar = ("declearn", "optax")
    beta: float = part.number(default=0.9, at_least=0, below=1)
    eps: float = part.number(default=1e-7, at_least=0)
    round_reset: bool = part.static(default=False)
    eps_root: float = part.number(default=0.0, at_least=0)
    init_v: float = part.number(default=0.0, at_least=0)

    @classmethod
    def declearn(cls, beta: float = 0.9, eps: float = 1e-7) -> Self:
        """``eps`` outside the root: the defaults."""
        return cls(beta=beta, eps=eps)

    @classmethod
    def optax(cls, beta: float = 0.9, eps: float = 1e-8) -> Self:
        """``optax.scale_by_rms``: ``eps`` inside the root."""
        return cls(beta=beta, eps=0.0, eps_root=eps)

    def init(self, params: Params) -> Params:
        """A mean of ``init_v``."""
        return trees.full_like(wide_zeros(params), self.init_v)

    def update(self, updates: Params, state: Params, params: Params | None = None) -> tuple[Params, Params]:
        """Averages the squares, then divides."""
        gradients = trees.widen(updates)
        mean = trees.average(self.beta, state, trees.square(gradients))
        scaled = _divide(gradients, _roots(mean, self.eps, self.eps_root))
        return trees.cast_like(scaled, updates), mean


class MomentsState(NamedTuple):
    """The state of :class:`Adam` and :class:`Yogi`.

    Attributes:
        steps: Steps done.
        m: Running mean of gradients, like the weights.
        v: Running mean of their squares, like the weights.
        v_max: The greatest ``v`` so far with ``amsgrad``, else ``()``.
    """

    steps: jax.Array
    m: Params
    v: Params
    v_max: Params


class Moments(Resettable):
    """What Adam and Yogi share: everything but how the second moment moves."""

    aliases: ClassVar = {"beta1": "beta_1", "beta2": "beta_2", "b1": "beta_1", "b2": "beta_2"}
    beta_1: float = part.number(default=0.9, at_least=0, below=1)
    beta_2: float = part.number(default=0.99, at_least=0, below=1)
    amsgrad: bool = part.static(default=False)
    eps: float = part.number(default=1e-7, at_least=0)
    round_reset: bool = part.static(default=False)
    eps_root: float = part.number(default=0.0, at_least=0)
    init_m: float = part.number(default=0.0)
    init_v: float = part.number(default=0.0, at_least=0)
    step_offset: int = part.count(default=0)
    bias_correction: str = part.static(default="before-max", choices=("before-max", "after-max", "after-eps", "none"))

    @classmethod
    def declearn(cls, beta_1: float = 0.9, beta_2: float = 0.99, eps: float = 1e-7, amsgrad: bool = False) -> Self:
        """Moments that start at 0, bias correction, ``eps`` outside the root: the defaults."""
        return cls(beta_1=beta_1, beta_2=beta_2, eps=eps, amsgrad=amsgrad)

    @classmethod
    def paper(cls, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3) -> Self:
        """FedAdam and FedYogi of Reddi et al.: ``v`` starts at ``tau ** 2``, ``eps = tau``, no bias correction."""
        tau = _positive_tau(tau)
        return cls(beta_1=beta_1, beta_2=beta_2, eps=tau, init_v=tau**2, bias_correction="none")

    def init(self, params: Params) -> MomentsState:
        """Moments of ``init_m`` and ``init_v``."""
        zeros = wide_zeros(params)
        m, v = trees.full_like(zeros, self.init_m), trees.full_like(zeros, self.init_v)
        return MomentsState(jnp.zeros((), jnp.int32), m, v, zeros if self.amsgrad else ())

    def update(self, updates: Params, state: MomentsState, params: Params | None = None) -> tuple[Params, MomentsState]:
        """Moves both moments, then divides the first by the root of the second."""
        gradients = trees.widen(updates)
        steps = state.steps + 1
        m = trees.average(self.beta_1, state.m, gradients)
        v = self.move(state.v, trees.square(gradients))
        roots, v_max = self._denominator(v, state.v_max, steps + self.step_offset)
        mean = m if self.bias_correction == "none" else _correct(self.beta_1, steps + self.step_offset, m)
        return trees.cast_like(_divide(mean, roots), updates), MomentsState(steps, m, v, v_max)

    def move(self, v: Params, squares: Params) -> Params:
        """The second moment after one more gradient."""
        raise NotImplementedError(f"{type(self).__name__} defines no move(v, squares).")

    def _denominator(self, v: Params, v_max: Params, steps: Any) -> tuple[Params, Params]:
        """The root of the second moment, and its greatest value so far."""
        when = self.bias_correction
        if when == "before-max":
            v = _correct(self.beta_2, steps, v)
        if self.amsgrad:
            v = v_max = jax.tree.map(jnp.maximum, v, v_max)
        if when == "after-max":
            v = _correct(self.beta_2, steps, v)
        roots = _roots(v, self.eps, self.eps_root)
        if when == "after-eps":
            roots = jax.tree.map(lambda r: r / jnp.sqrt(correction(self.beta_2, steps, r)), roots)
        return roots, v_max


class Adam(Moments):
    r"""Adam: a running mean of gradients over the root of a running mean of squares.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
        g \leftarrow \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t) + \epsilon_\text{root}} + \epsilon}

    with :math:`t` from 1. Presets: ``declearn`` (the defaults), ``paper`` (FedAdam), ``optax``, ``flower``, ``torch``.

    Args:
        beta_1: How much of the past gradients is kept, in [0, 1).
        beta_2: How much of the past squares is kept, in [0, 1).
        amsgrad: Whether to divide by the greatest second moment so far.
        eps: Added to the root.
        round_reset: Whether every round begins afresh even where state is kept.
        eps_root: Added inside the root.
        init_m: Starting value of the first moment.
        init_v: Starting value of the second moment.
        step_offset: Added to the count of steps in the bias correction.
        bias_correction: When the second moment is corrected: ``"before-max"`` (of AMSGrad), ``"after-max"``, ``"after-eps"`` was
            added (so ``eps`` is scaled along), or ``"none"`` for neither moment.

    Example:
        >>> module = Adam(eps=0.0)
        >>> update, _ = module.update(jnp.array([3.0, -4.0]), module.init(jnp.zeros(2)))
        >>> print(update.round(3))
        [ 1. -1.]

    References:
        Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2015;
        Reddi et al., `On the Convergence of Adam and Beyond <https://arxiv.org/abs/1904.09237>`_ (AMSGrad), 2018;
        Reddi et al., `Adaptive Federated Optimization <https://arxiv.org/abs/2003.00295>`_ (FedAdam), 2021
    """

    name = "adam"
    presets: ClassVar = ("declearn", "paper", "optax", "flower", "torch")

    def move(self, v: Params, squares: Params) -> Params:
        """The running mean of squares."""
        return trees.average(self.beta_2, v, squares)

    @classmethod
    def optax(cls, beta_1: float = 0.9, beta_2: float = 0.999, eps: float = 1e-8, amsgrad: bool = False) -> Self:
        """``optax.scale_by_adam`` and, with ``amsgrad``, ``optax.scale_by_amsgrad``."""
        return cls(beta_1=beta_1, beta_2=beta_2, eps=eps, amsgrad=amsgrad)

    @classmethod
    def flower(cls, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3) -> Self:
        """Flower's FedAdam: the correction counts one step too many, and scales ``tau`` along."""
        return cls(beta_1=beta_1, beta_2=beta_2, eps=tau, step_offset=1, bias_correction="after-eps")

    @classmethod
    def torch(cls, beta_1: float = 0.9, beta_2: float = 0.999, eps: float = 1e-8, amsgrad: bool = False) -> Self:
        """``torch.optim.Adam``: AMSGrad's maximum is taken before the bias correction."""
        return cls(beta_1=beta_1, beta_2=beta_2, eps=eps, amsgrad=amsgrad, bias_correction="after-max")


class Yogi(Moments):
    r"""Yogi: :class:`Adam` whose second moment moves by a share of the new square alone, up or down.

    .. math:: v \leftarrow v - (1 - \beta_2) \operatorname{sign}(v - g^2) \, g^2

    Its arguments are Adam's. Presets: ``declearn`` (the defaults), ``paper`` (FedYogi), ``optax``, ``flower``, ``fedscale``.

    Example:
        >>> module = Yogi(eps=0.0)
        >>> update, _ = module.update(jnp.array([3.0, -4.0]), module.init(jnp.zeros(2)))
        >>> print(update.round(3))
        [ 1. -1.]

    References:
        Zaheer et al., Adaptive Methods for Nonconvex Optimization, 2018;
        Reddi et al., `Adaptive Federated Optimization <https://arxiv.org/abs/2003.00295>`_ (FedYogi), 2021
    """

    name = "yogi"
    presets: ClassVar = ("declearn", "paper", "optax", "flower", "fedscale")

    def move(self, v: Params, squares: Params) -> Params:
        """Moves by a share of the squares towards them."""
        return move_by_sign(self.beta_2, v, squares)

    @classmethod
    def optax(cls, beta_1: float = 0.9, beta_2: float = 0.999, eps: float = 1e-3, init: float = 1e-6) -> Self:
        """``optax.scale_by_yogi``: both moments start at 1e-6."""
        return cls(beta_1=beta_1, beta_2=beta_2, eps=eps, init_m=init, init_v=init)

    @classmethod
    def flower(cls, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-3) -> Self:
        """Flower's FedYogi: moments that start at 0, ``eps = tau``, no bias correction."""
        return cls(beta_1=beta_1, beta_2=beta_2, eps=tau, bias_correction="none")

    @classmethod
    def fedscale(cls, beta_1: float = 0.9, beta_2: float = 0.99, tau: float = 1e-8) -> Self:
        """FedScale's yogi: ``v`` starts at ``tau``, not at its square; no bias correction."""
        return cls(beta_1=beta_1, beta_2=beta_2, eps=tau, init_v=tau, bias_correction="none")


def _positive_tau(tau: Any) -> Any:
    return checks.number("tau", tau, checks.Bounds(above=0))
