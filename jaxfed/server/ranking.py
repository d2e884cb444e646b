"""Selections by what is known of clients: weights, what they reported, several rules one after another."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfed import checks, part
from jaxfed.base import Selector
from jaxfed.messages import Cohort
from jaxfed.server.selection import Ranked, highest

# What travels with every upload.
ALWAYS = ("examples", "steps", "loss")


class Weighted(Ranked):
    r"""``size`` clients drawn one after another, each in proportion to its weight among those that remain.

    .. math:: \mathrm{score}_i = \log p_i + G_i, \qquad G_i \sim \mathrm{Gumbel}(0, 1)

    whose ``size`` highest are such draws. A client of weight 0 never takes part.

    Args:
        size: ``C``, clients per round.
        weights: ``[N]``, at least 0; their sum does not matter.

    Example:
        >>> cohort = Weighted(2, [1.0, 0.0, 5.0]).select((), jax.random.key(0), jnp.array(0), 3)
        >>> print(jnp.sort(cohort.ids))
        [0 2]

    References:
        Kool et al., `Stochastic Beams and Where to Find Them <https://arxiv.org/abs/1903.06059>`_, 2019
    """

    name = "weighted"
    weights: Any = part.by_client(at_least=0)

    def cohort_size(self, population: int) -> int:
        """``C``.

        Raises:
            ValueError: If there is not a weight for each client, or fewer than C are above 0.
        """
        checks.a_row_for_each("Weighted.weights", self.weights, population)
        if (some := int((self.weights > 0).sum())) < self.size:
            raise ValueError(f"Weighted.weights: expected at least size={self.size} clients of a weight above 0, got {some}.")
        return super().cohort_size(population)

    def scores(self, state: Any, key: jax.Array, round: jax.Array, population: int) -> jax.Array:
        """``[N]``."""
        return jnp.log(self.weights) + jax.random.gumbel(key, (population,))


class Reported(NamedTuple):
    """What each client reported so far: ``value [N]`` as the rule holds it, and how often, ``count [N]``."""

    value: jax.Array
    count: jax.Array


class Criterion(Ranked):
    """The clients that reported the highest value of a metric, or the lowest.

    What is not finite does not count as reported.

    Args:
        size: ``C``, clients per round.
        metric: What is compared: ``"loss"``, ``"steps"``, ``"examples"``, or a measure of the client such as ``"update_norm"``.
        lowest: Whether less is better.
        over: Of a client's reports, ``"last"``, ``"mean"`` or ``"sum"``.
        missing: Who has not reported has ``"priority"``, or ``"equal"``: the value 1 / N, as declearn has it.

    Example:
        >>> rule = Criterion(1, lowest=True, missing="equal")
        >>> cohort = Cohort(jnp.arange(2), jnp.ones(2, bool), jnp.ones(2))
        >>> state = rule.observe(rule.init(3), cohort, {"loss": jnp.array([0.5, 0.1])})
        >>> print(rule.select(state, jax.random.key(0), jnp.array(1), 3).ids)
        [1]
    """

    name = "criterion"
    metric: str = part.static(default="loss")
    lowest: bool = part.static(default=False)
    over: str = part.static(default="last", choices=("last", "mean", "sum"))
    missing: str = part.static(default="priority", choices=("priority", "equal"))

    @property
    def reads(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The metric, unless it always travels."""
        return () if self.metric in ALWAYS else (self.metric,)

    def init(self, population: int) -> Reported:
        """Nothing."""
        return Reported(jnp.zeros(population), jnp.zeros(population))

    def scores(self, state: Reported, key: jax.Array, round: jax.Array, population: int) -> jax.Array:
        """``[N]``."""
        value = jnp.where(state.count > 0, state.value, 1 / population)
        score = -value if self.lowest else value
        return jnp.where((state.count == 0) & (self.missing == "priority"), jnp.inf, score)

    def observe(self, state: Reported, cohort: Cohort, metrics: dict[str, jax.Array]) -> Reported:
        """With the cohort's reports."""
        new = metrics[self.metric]
        ids = jnp.where(cohort.valid & jnp.isfinite(new), cohort.ids, state.count.size)
        count = state.count.at[ids].add(1, mode="drop")
        if self.over == "last":
            return Reported(state.value.at[ids].set(new, mode="drop"), count)
        if self.over == "sum":
            return Reported(state.value.at[ids].add(new, mode="drop"), count)
        old = state.value.at[ids].get(mode="clip")
        step = (new - old) / count.at[ids].get(mode="clip")
        return Reported(state.value.at[ids].add(step, mode="drop"), count)


class Composition(Selector):
    """Several rules one after another, each on the clients that those before it left.

    Args:
        selectors: Rules that rank clients, each with its own ``size``.

    Example:
        >>> rule = Composition([Weighted(1, [0.0, 1.0, 0.0]), ("uniform", {"size": 2})])
        >>> print(rule.select(rule.init(3), jax.random.key(0), jnp.array(0), 3).ids[0], rule.cohort_size(3))
        1 3
    """

    name = "composition"
    selectors: tuple[Ranked, ...] = part.parts("selector", default=dataclasses.MISSING)

    def check(self) -> None:
        """Only what ranks clients can be told who is left.

        Raises:
            ValueError: If there is no rule.
            TypeError: If one does not rank.
        """
        if not self.selectors:
            raise ValueError("Composition.selectors: expected at least one, got none.")
        for place, selector in enumerate(self.selectors):
            ranks(f"Composition.selectors[{place}]", selector)

    @property
    def reads(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the rules read."""
        return tuple(dict.fromkeys(name for selector in self.selectors for name in selector.reads))

    def init(self, population: int) -> tuple:
        """Those of the rules."""
        return tuple(selector.init(population) for selector in self.selectors)

    def cohort_size(self, population: int) -> int:
        """The sum of the rules' sizes.

        Raises:
            ValueError: If the population is smaller, or a rule does not fit it.
        """
        size = sum(selector.cohort_size(population) for selector in self.selectors)
        if size > population:
            raise ValueError(f"Composition.selectors: expected sizes of at most {population} clients together, got {size}.")
        return size

    def select(self, state: tuple, key: jax.Array, round: jax.Array, population: int) -> Cohort:
        """The union of what the rules choose."""
        cohorts, taken = [], jnp.zeros(population, bool)
        for place, (selector, own) in enumerate(zip(self.selectors, state)):
            score_key, tie_key = jax.random.split(jax.random.fold_in(key, place))
            scores = jnp.where(taken, -jnp.inf, selector.scores(own, score_key, round, population))
            cohorts.append(highest(scores, selector.size, tie_key))
            taken = taken.at[cohorts[-1].ids].max(cohorts[-1].valid)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *cohorts)

    def observe(self, state: tuple, cohort: Cohort, metrics: dict[str, jax.Array]) -> tuple:
        """What the rules learn, each from the whole cohort."""
        return tuple(selector.observe(own, cohort, metrics) for selector, own in zip(self.selectors, state))


def ranks(where: str, selector: Selector) -> None:
    """Raises TypeError unless a selector ranks clients."""
    if not isinstance(selector, Ranked):
        what = f"{where}: expected a selector that ranks clients, got {type(selector).__name__}"
        raise TypeError(f"{what}. Uniform, Weighted, Criterion and Oort do.")
