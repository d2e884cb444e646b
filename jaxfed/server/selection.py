"""Which clients take part in a round."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxfed import part
from jaxfed.base import Cohort, Selector
from jaxfed.permutation import permute


class Everyone(Selector):
    """All clients, every round."""

    name = "everyone"

    def cohort_size(self, population: int) -> int:
        """``C = N``."""
        return population

    def select(self, state: Any, key: jax.Array, round: jax.Array, population: int) -> Cohort:
        """Clients 0 to N - 1."""
        return Cohort(jnp.arange(population, dtype=jnp.int32), jnp.ones(population, bool), jnp.ones(population))


class Uniform(Selector):
    """A uniformly random set of ``size`` clients, without replacement within a round.

    A keyed permutation evaluated at C points: the cost does not depend on the population.

    Args:
        size: ``C``, clients per round.
    """

    name = "uniform"
    size: int = part.size()

    def cohort_size(self, population: int) -> int:
        """``C``.

        Raises:
            ValueError: If the population is smaller.
        """
        if self.size > population:
            raise ValueError(f"cohort_size: expected at most the population of {population} clients, got {self.size}.")
        return self.size

    def select(self, state: Any, key: jax.Array, round: jax.Array, population: int) -> Cohort:
        """C distinct clients."""
        ids = permute(key, jnp.arange(self.size), population)
        return Cohort(ids, jnp.ones(self.size, bool), jnp.ones(self.size))
