"""Noise on gradients, from a key of its own for every client, round, step and leaf."""

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxfed import part, trees
from jaxfed.base import OptiModule
from jaxfed.messages import Params, RoundStart


class NoiseState(NamedTuple):
    """The key of the round and the number of steps done."""

    key: jax.Array
    steps: jax.Array


class Noise(OptiModule):
    """What the kinds of noise share: where the keys come from. A subclass has a field ``seed`` and says how to draw."""

    @property
    def carries_on(self) -> bool:
        """False: every round has a key of its own."""
        return False

    def check(self) -> None:
        """A seed fits into 32 bits."""
        if self._seed is not None and self._seed >= 2**32:
            raise ValueError(f"{type(self).__name__}.seed: expected an integer below 2**32, got {self._seed}.")

    @property
    def _seed(self) -> int | None:
        return getattr(self, "seed")  # noqa: B009  (declared by the subclasses, after their scale)

    def init(self, params: Params) -> NoiseState:
        """The state from the seed alone, for plain optax use.

        Raises:
            ValueError: Without a seed: noise from nowhere would be the same at every client and in every round.
        """
        if self._seed is None:
            raise ValueError(
                f"{type(self).__name__} has no key. Give it a seed to use it on its own; in an Optimizer each client's round "
                "brings a key along (start_round)."
            )
        return NoiseState(jax.random.key(self._seed), jnp.zeros((), jnp.int32))

    def start_round(self, kept: tuple, start: RoundStart) -> NoiseState:
        """The state from the round's key; a seed is folded into it."""
        if start.key is None:
            return self.init(start.params)
        key = start.key if self._seed is None else jax.random.fold_in(start.key, self._seed)
        return NoiseState(key, jnp.zeros((), jnp.int32))

    def update(self, updates: Params, state: NoiseState, params: Params | None = None) -> tuple[Params, NoiseState]:
        """Adds noise, drawn in float32 or wider, and keeps the dtype."""
        leaves, tree = jax.tree.flatten(trees.widen(updates))
        key = jax.random.fold_in(state.key, state.steps)
        noisy = [g + self.draw(jax.random.fold_in(key, i), g) for i, g in enumerate(leaves)]
        return trees.cast_like(jax.tree.unflatten(tree, noisy), updates), NoiseState(state.key, state.steps + 1)

    def draw(self, key: jax.Array, leaf: jax.Array) -> jax.Array:
        """Noise of a leaf's shape and dtype."""
        raise NotImplementedError(f"{type(self).__name__} defines no draw(key, leaf).")


class GaussianNoise(Noise):
    r"""Adds independent Gaussian noise.

    .. math:: g \leftarrow g + \mathcal{N}(0, \sigma^2)

    Args:
        std: The standard deviation, not the variance that ``optax.add_noise`` takes.
        seed: Needed outside of an Optimizer's round; within one it is folded into the round's key.
        safe_mode: Accepted for declearn's configs and without effect: all noise comes from JAX's counter-based generator.

    Example:
        >>> module = GaussianNoise(std=0.1, seed=0)
        >>> noisy, state = module.update(jnp.zeros(10_000), module.init(jnp.zeros(10_000)))
        >>> print(f"{noisy.std():.2f}")
        0.10
    """

    name = "gaussian-noise"
    std: float = part.number(default=1.0, at_least=0)
    seed: int | None = part.size(default=None, at_least=0, optional=True)
    safe_mode: bool | None = part.static(default=None, choices=(None, False, True))

    def check(self) -> None:
        """Warns of a ``safe_mode``."""
        super().check()
        if self.safe_mode is not None:
            warnings.warn("GaussianNoise: safe_mode has no effect here; leave it out.", stacklevel=4)

    def draw(self, key: jax.Array, leaf: jax.Array) -> jax.Array:
        """``N(0, std**2)``."""
        return trees.cast(self.std, leaf) * jax.random.normal(key, leaf.shape, leaf.dtype)


class LaplaceNoise(Noise):
    r"""Adds independent Laplace noise.

    .. math:: g \leftarrow g + \operatorname{Laplace}(0, b)

    Args:
        scale: The :math:`b` of the density :math:`e^{-|x| / b} / 2b`; the standard deviation is :math:`b \sqrt 2`.
        seed: Needed outside of an Optimizer's round; within one it is folded into the round's key.

    Example:
        >>> module = LaplaceNoise(scale=0.1, seed=0)
        >>> noisy, state = module.update(jnp.zeros(10_000), module.init(jnp.zeros(10_000)))
        >>> print(f"{abs(noisy).mean():.2f}")
        0.10
    """

    name = "laplace-noise"
    scale: float = part.number(default=1.0, at_least=0)
    seed: int | None = part.size(default=None, at_least=0, optional=True)

    def draw(self, key: jax.Array, leaf: jax.Array) -> jax.Array:
        """``Laplace(0, scale)``."""
        return trees.cast(self.scale, leaf) * jax.random.laplace(key, leaf.shape, leaf.dtype)
