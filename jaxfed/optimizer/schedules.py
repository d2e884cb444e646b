"""The eleven rate schedules of declearn, by its names, as functions of (step, round).

They keep no state: whoever uses one says at which step and in which round it stands, both from 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxfed import part
from jaxfed.optimizer.rates import Schedule, at, rate


class ExponentialDecay(Schedule):
    """``base * rate ** u``, where ``u`` is the step or the round.

    >>> print(ExponentialDecay(1.0, 0.5)(3))
    0.125
    """

    name = "exponential-decay"
    base: float = part.number(at_least=0)
    rate: float = part.number(at_least=0)
    step_level: bool = part.static(default=True)

    def __call__(self, step: ArrayLike, round: ArrayLike = 0) -> jax.Array:
        """``base * rate ** u``."""
        return self.base * jnp.power(self.rate, step if self.step_level else round)


class InverseScaling(Schedule):
    """``base / (u + 1) ** rate``, where ``u`` is the step or the round.

    >>> print(InverseScaling(1.0, 0.5)(3))
    0.5
    """

    name = "inverse-scaling"
    base: float = part.number(at_least=0)
    rate: float = part.number(at_least=0)
    step_level: bool = part.static(default=True)

    def __call__(self, step: ArrayLike, round: ArrayLike = 0) -> jax.Array:
        """``base / (u + 1) ** rate``."""
        return self.base / jnp.power(jnp.add(step if self.step_level else round, 1), self.rate)


class LinearDecay(Schedule):
    """``base * max(1 - rate * u, 0)``, where ``u`` is the step or the round.

    >>> print(LinearDecay(1.0, 0.25)(1), LinearDecay(1.0, 0.25)(9))
    0.75 0.0
    """

    name = "linear-decay"
    base: float = part.number(at_least=0)
    rate: float = part.number(at_least=0)
    step_level: bool = part.static(default=True)

    def __call__(self, step: ArrayLike, round: ArrayLike = 0) -> jax.Array:
        """``base * max(1 - rate * u, 0)``."""
        return self.base * jnp.maximum(1.0 - jnp.multiply(self.rate, step if self.step_level else round), 0.0)


class PolynomialDecay(Schedule):
    """``base * (1 - min(u / limit, 1)) ** power``, where ``u`` is the step or the round.

    >>> print(PolynomialDecay(1.0, power=2, limit=4)(2))
    0.25
    """

    name = "polynomial-decay"
    base: float = part.number(at_least=0)
    power: float = part.number(at_least=0)
    limit: int = part.count(at_least=1)
    step_level: bool = part.static(default=True)

    def __call__(self, step: ArrayLike, round: ArrayLike = 0) -> jax.Array:
        """``base * (1 - min(u / limit, 1)) ** power``."""
        left = jnp.maximum(jnp.subtract(self.limit, step if self.step_level else round), 0)
        return self.base * jnp.power(_divide(left, self.limit), self.power)


class PiecewiseDecay(Schedule):
    """``base * rate ** (u // step_size)``, where ``u`` is the step or the round.

    >>> print(PiecewiseDecay(1.0, 0.5, step_size=10)(19))
    0.5
    """

    name = "piecewise-decay"
    base: float = part.number(at_least=0)
    rate: float = part.number(at_least=0)
    step_size: int = part.count(at_least=1)
    step_level: bool = part.static(default=True)

    def __call__(self, step: ArrayLike, round: ArrayLike = 0) -> jax.Array:
        """``base * rate ** (u // step_size)``."""
        return self.base * jnp.power(self.rate, jnp.floor_divide(step if self.step_level else round, self.step_size))


class CosineAnnealing(Schedule):
    """From ``max_lr`` down to ``base`` along half a cosine over ``duration`` steps or rounds, then ``base``.

    >>> print(CosineAnnealing(0.0, 1.0, duration=10)(10))
    0.0
    """

    name = "cosine-annealing"
    base: float = part.number(at_least=0)
    max_lr: float = part.number(at_least=0)
    duration: int = part.count(at_least=1)
    step_level: bool = part.static(default=True)

    def __call__(self, step: ArrayLike, round: ArrayLike = 0) -> jax.Array:
        """``base + (max_lr - base) (1 + cos(pi u / duration)) / 2``."""
        past = jnp.minimum(_divide(step if self.step_level else round, self.duration), 1.0)
        return _cosine(self.base, self.max_lr, past)


class CosineAnnealingWarmRestarts(Schedule):
    """Half cosines from ``max_lr * t_mult ** cycle`` down to ``base``, one every ``period`` steps or rounds.

    ``t_mult`` scales the maximum, not the period.

    >>> schedule = CosineAnnealingWarmRestarts(0.0, 1.0, period=10, t_mult=0.5, step_level=False)
    >>> print(schedule(step=0, round=0), schedule(step=0, round=10))
    1.0 0.5

    References:
        Loshchilov and Hutter, `SGDR <https://arxiv.org/abs/1608.03983>`_, 2017 (whose multiplier is the period's)
    """

    name = "cosine-annealing-warm-restarts"
    base: float = part.number(at_least=0)
    max_lr: float = part.number(at_least=0)
    period: int = part.count(at_least=1)
    t_mult: float = part.number(default=1.0, at_least=0)
    step_level: bool = part.static(default=True)

    def __call__(self, step: ArrayLike, round: ArrayLike = 0) -> jax.Array:
        """A :class:`CosineAnnealing` over the cycle that ``u`` lies in."""
        cycle, now = jnp.divmod(step if self.step_level else round, self.period)
        return _cosine(self.base, self.max_lr * jnp.power(self.t_mult, cycle), _divide(now, self.period))


class CyclicTriangular(Schedule):
    """From ``base`` up to ``max_lr`` in ``stepsize`` steps and down again; with ``decay`` each cycle is half as high.

    >>> print(CyclicTriangular(0.0, 1.0, stepsize=4, decay=True)(12))
    0.5

    References:
        Smith, `Cyclical Learning Rates <https://arxiv.org/abs/1506.01186>`_, 2017
    """

    name = "cyclic-triangular"
    base: float = part.number(at_least=0)
    max_lr: float = part.number(at_least=0)
    stepsize: int = part.count(at_least=1)
    decay: bool = part.static(default=False)

    def __call__(self, step: ArrayLike, round: ArrayLike = 0) -> jax.Array:
        """``base + s (max_lr - base)`` with a triangle ``s`` in [0, 1]."""
        cycle, height = _triangle(step, self.stepsize)
        height = height * jnp.power(0.5, cycle) if self.decay else height
        return self.base + height * (self.max_lr - self.base)


class CyclicExpRange(Schedule):
    """A :class:`CyclicTriangular` whose two bounds shrink by ``decay`` with every step.

    >>> print(CyclicExpRange(0.0, 1.0, stepsize=2, decay=0.5)(2))
    0.25
    """

    name = "cyclic-exp-range"
    base: float = part.number(at_least=0)
    max_lr: float = part.number(at_least=0)
    stepsize: int = part.count(at_least=1)
    decay: float = part.number(at_least=0)

    def __call__(self, step: ArrayLike, round: ArrayLike = 0) -> jax.Array:
        """``decay ** step * (base + s (max_lr - base))``."""
        _, height = _triangle(step, self.stepsize)
        return jnp.power(self.decay, step) * (self.base + height * (self.max_lr - self.base))


class Warmup(Schedule):
    """A linear rise over ``warmup`` steps, then ``base`` from its own beginning.

    The rise goes up to the ``base`` of a wrapped schedule (to its first value where it has none). Afterwards the schedule sees
    ``step - warmup`` and ``round - rounds``. How many rounds the rise takes follows from the steps per round, which a function of
    (step, round) cannot know: give ``rounds`` if the wrapped schedule counts rounds.

    Args:
        base: A number or a schedule.
        warmup: Steps of the rise.
        rounds: Rounds of the rise, for a ``base`` that counts rounds.

    Example:
        >>> schedule = Warmup(ExponentialDecay(1.0, 0.5), warmup=4)
        >>> print(schedule(0), schedule(3), schedule(5))
        0.25 1.0 0.5
    """

    name = "warmup"
    base: Any = rate(by_label=False)
    warmup: int = part.count()
    rounds: int = part.count(default=0)

    def __call__(self, step: ArrayLike, round: ArrayLike = 0) -> jax.Array:
        """``base * (step + 1) / warmup``, later ``base``."""
        later = at(self.base, _since(step, self.warmup), _since(round, self.rounds))
        return _rise(self.base, step, self.warmup, later)


class WarmupRounds(Schedule):
    """A rise over ``warmup`` rounds, constant within each, then ``base`` from its own beginning.

    A wrapped schedule then sees ``round - warmup`` and ``step - steps``. Where steps count from 0 in every round, ``steps=0`` is
    right; where they go on over rounds, ``steps`` is how many the rise takes.

    Args:
        base: A number or a schedule.
        warmup: Rounds of the rise.
        steps: Steps of the rise, for a ``base`` that counts steps over the whole run.

    Example:
        >>> schedule = WarmupRounds(1.0, warmup=4)
        >>> print(schedule(step=0, round=0), schedule(step=99, round=1), schedule(step=0, round=7))
        0.25 0.5 1.0
    """

    name = "warmup-rounds"
    base: Any = rate(by_label=False)
    warmup: int = part.count()
    steps: int = part.count(default=0)

    def __call__(self, step: ArrayLike, round: ArrayLike = 0) -> jax.Array:
        """``base * (round + 1) / warmup``, later ``base``."""
        later = at(self.base, _since(step, self.steps), _since(round, self.warmup))
        return _rise(self.base, round, self.warmup, later)


def _divide(count: ArrayLike, by: ArrayLike) -> jax.Array:
    """A quotient in the default float dtype; int32 over int32 would be float32 even where float64 is enabled."""
    return jnp.asarray(count, float) / by


def _cosine(low: Any, high: Any, past: jax.Array) -> jax.Array:
    return low + 0.5 * (high - low) * (1.0 + jnp.cos(jnp.pi * past))


def _triangle(step: ArrayLike, stepsize: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """The number of the cycle, and a height that rises from 0 to 1 and falls again."""
    cycle, now = jnp.divmod(step, jnp.multiply(2, stepsize))
    return cycle, 1.0 - jnp.abs(_divide(now, stepsize) - 1.0)


def _since(count: ArrayLike, start: ArrayLike) -> jax.Array:
    return jnp.maximum(jnp.subtract(count, start), 0)


def _rise(base: Any, count: ArrayLike, warmup: ArrayLike, later: Any) -> jax.Array:
    return jnp.where(jnp.less(count, warmup), _top(base) * _divide(jnp.add(count, 1), jnp.maximum(warmup, 1)), later)


def _top(base: Any) -> Any:
    """Where a rise ends: the innermost ``base``."""
    if not isinstance(base, Schedule):
        return base
    return _top(getattr(base, "base")) if hasattr(base, "base") else base(0, 0)  # noqa: B009
