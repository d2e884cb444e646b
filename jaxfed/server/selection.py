"""Which clients take part in a round."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxfed import part
from jaxfed.base import Selector
from jaxfed.messages import Cohort
from jaxfed.permutation import permute

# The stream of a selection's key that tells who is late; the key itself draws the cohort.
_STRAGGLERS = 1


class Everyone(Selector):
    """All clients, every round."""

    name = "everyone"

    def cohort_size(self, population: int) -> int:
        """``C = N``."""
        return population

    def select(self, state: Any, key: jax.Array, round: jax.Array, population: int) -> Cohort:
        """Clients 0 to N - 1."""
        return Cohort(jnp.arange(population, dtype=jnp.int32), jnp.ones(population, bool), jnp.ones(population))


class Ranked(Selector):
    """The ``size`` clients of the highest score; of equal ones, some at random. A subclass defines :meth:`scores`.

    Args:
        size: ``C``, clients per round.

    Example:
        >>> class Last(Ranked, register=False):
        ...     def scores(self, state, key, round, population):
        ...         return jnp.arange(population)
        >>> print(Last(2).select((), jax.random.key(0), jnp.array(0), 9).ids)
        [8 7]
    """

    size: int = part.size()

    def cohort_size(self, population: int) -> int:
        """``C``.

        Raises:
            ValueError: If the population is smaller.
        """
        if self.size > population:
            raise ValueError(f"cohort_size: expected at most the population of {population} clients, got {self.size}.")
        return self.size

    def scores(self, state: Any, key: jax.Array, round: jax.Array, population: int) -> jax.Array:
        """``[N]``; minus infinity for a client that must not take part."""
        raise NotImplementedError(f"{type(self).__name__} defines no scores(state, key, round, population).")

    def select(self, state: Any, key: jax.Array, round: jax.Array, population: int) -> Cohort:
        """The C highest."""
        score_key, tie_key = jax.random.split(key)
        return highest(self.scores(state, score_key, round, population), self.size, tie_key)


def highest(scores: jax.Array, size: int, key: jax.Array) -> Cohort:
    """The clients of the highest scores ``[N]``, all of their work; of equal ones, some at random.

    One whose score is minus infinity or NaN is not valid.
    """
    # The first of equal scores come first, so the order of the clients decides.
    order = permute(key, jnp.arange(scores.size), scores.size)
    best, where = jax.lax.top_k(jnp.where(jnp.isnan(scores), -jnp.inf, scores)[order], size)
    return Cohort(order[where], best > -jnp.inf, jnp.ones(size))


def places(values: jax.Array) -> jax.Array:
    """The place of each value ``[N]`` among them, from the lowest, 0, up; of equal ones the first is lower.

    >>> print(places(jnp.array([3.0, 1.0, 3.0, 2.0])))
    [2 0 3 1]
    """
    return jnp.zeros(values.size, int).at[jnp.argsort(values)].set(jnp.arange(values.size))


class Uniform(Ranked):
    """A uniformly random set of ``size`` clients, without replacement within a round.

    A keyed permutation evaluated at C points: the cost does not depend on the population.

    Args:
        size: ``C``, clients per round.
    """

    name = "uniform"

    def scores(self, state: Any, key: jax.Array, round: jax.Array, population: int) -> jax.Array:
        """At random, where another rule decides who remains."""
        return jax.random.uniform(key, (population,))

    def select(self, state: Any, key: jax.Array, round: jax.Array, population: int) -> Cohort:
        """C distinct clients."""
        ids = permute(key, jnp.arange(self.size), population)
        return Cohort(ids, jnp.ones(self.size, bool), jnp.ones(self.size))


class PoissonSampling(Selector):
    """Each client with the same probability, independently: what privacy accounting assumes.

    How many take part is drawn from Binomial(N, rate) and cut at ``size``; who, by a keyed permutation. What is cut is not
    covered by an accountant: let ``size`` be so large that it hardly ever happens.

    Args:
        size: ``C``, the most clients of a round.
        rate: The probability to take part, above 0 and at most 1.

    Example:
        >>> cohort = PoissonSampling(9, rate=0.5).select((), jax.random.key(0), jnp.array(0), 10)
        >>> print(cohort.valid.sum())
        6
    """

    name = "poisson"
    size: int = part.size()
    rate: float = part.number(above=0, at_most=1)

    def cohort_size(self, population: int) -> int:
        """``C``.

        Raises:
            ValueError: If the population is smaller.
        """
        return Uniform(self.size).cohort_size(population)

    def select(self, state: Any, key: jax.Array, round: jax.Array, population: int) -> Cohort:
        """A uniformly random set whose size is binomial."""
        order_key, count_key = jax.random.split(key)
        drawn = jax.random.binomial(count_key, jnp.float32(population), self.rate)
        numbers = jnp.arange(self.size)
        return Cohort(permute(order_key, numbers, population), numbers < drawn, jnp.ones(self.size))


class Stragglers(Selector):
    r"""A share of each cohort is late: it does only some of its local work, or drops out.

    The late ones are drawn anew each round, exactly :math:`C - \mathrm{round}(C (1 - \text{share}))` of C valid ones. The cohorts
    are those that ``selector`` alone would draw.

    ==============  ==========================================================================
    ``"partial"``   :math:`\text{work} = \mathrm{Uniform}\{1, \ldots, E - 1\} / E`, FedProx's stragglers
    ``"drop"``      ``valid`` is False, as FedAvg treats them
    ==============  ==========================================================================

    Args:
        selector: Who takes part.
        share: The share of late clients, 0 to 1.
        late: ``"partial"`` or ``"drop"``.
        epochs: ``E``, in how many pieces the work of a round comes: the epochs (or steps) of the client's policy, at least 2.

    Example:
        >>> cohort = Stragglers(Everyone(), 0.5, epochs=4).select((), jax.random.key(0), jnp.array(0), 6)
        >>> print((cohort.work < 1).sum(), cohort.valid.sum())
        3 6

    References:
        Li et al., `Federated Optimization in Heterogeneous Networks <https://arxiv.org/abs/1812.06127>`_, 2020
    """

    name = "stragglers"
    selector: Selector = part.part("selector")
    share: float = part.number(default=0.5, at_least=0, at_most=1)
    late: str = part.static(default="partial", choices=("partial", "drop"))
    epochs: int = part.count(default=20, at_least=2)

    @property
    def reads(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What ``selector`` reads."""
        return self.selector.reads

    @property
    def versions(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those of ``selector``."""
        return self.selector.versions

    def init(self, population: int) -> Any:
        """The state of ``selector``."""
        return self.selector.init(population)

    def cohort_size(self, population: int) -> int:
        """That of ``selector``."""
        return self.selector.cohort_size(population)

    def select(self, state: Any, key: jax.Array, round: jax.Array, population: int) -> Cohort:
        """The cohort of ``selector``, some of it late."""
        who_key, work_key = jax.random.split(jax.random.fold_in(key, _STRAGGLERS))
        cohort = self.selector.select(state, key, round, population)
        late = self._late(who_key, cohort.valid)
        if self.late == "drop":
            return cohort._replace(valid=cohort.valid & ~late)
        work = jax.random.randint(work_key, late.shape, 1, self.epochs) / self.epochs
        return cohort._replace(work=jnp.where(late, cohort.work * work, cohort.work))

    def observe(self, state: Any, cohort: Cohort, metrics: dict[str, jax.Array]) -> Any:
        """What ``selector`` learns."""
        return self.selector.observe(state, cohort, metrics)

    def report(self, state: Any) -> dict[str, jax.Array]:
        """What ``selector`` says."""
        return self.selector.report(state)

    def _late(self, key: jax.Array, valid: jax.Array) -> jax.Array:
        """``[C]`` which are late: the first few in a random order that begins with the valid ones."""
        draws = jnp.where(valid, jax.random.uniform(key, valid.shape), 2.0)
        return valid & (places(draws) < valid.sum() - jnp.round(valid.sum() * (1 - self.share)))


def as_selector(cohort_size: int | None, selector: Any) -> Selector:
    """The selector as given, or who takes part where only their number is; everyone where not even that.

    Raises:
        ValueError: If both are given.
    """
    if cohort_size is not None and selector is not None:
        raise ValueError("Expected cohort_size or selector, got both. Give the selector its size.")
    if selector is not None:
        return part.build("selector", selector, "selector")
    return Everyone() if cohort_size is None else Uniform(cohort_size)
