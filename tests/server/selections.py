"""What tests of selections share: many draws, whether they fit, and a small run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import jaxfed
from jaxfed import Ranked

DRAWS = 4000


def draw(selector, population, draws=DRAWS, state=None, round=0):
    """``[draws, C]`` ids of as many cohorts."""
    state = selector.init(population) if state is None else state
    keys = jax.random.split(jax.random.key(11), draws)
    found = jax.jit(jax.vmap(lambda key: selector.select(state, key, jnp.array(round), population)))(keys)
    return jax.tree.map(np.asarray, found)


def fits(counts, shares):
    """Whether counts come from these shares: neither too far from them nor too near."""
    counts, expected = np.asarray(counts), np.asarray(shares) * np.sum(counts)
    statistic = ((counts - expected) ** 2 / expected).sum()
    return 1e-4 < stats.chi2.cdf(statistic, len(counts) - 1) < 1 - 1e-4


class Fixed(Ranked, register=False):
    """Given scores."""

    score: Any = jaxfed.part.by_client()

    def scores(self, state, key, round, population):
        return jnp.where(self.score == -1, -jnp.inf, jnp.where(self.score == -2, jnp.nan, self.score))


def loss(params, batch, key):
    return batch["x"] * params["w"]


def simulation(selector, measures=(), rows=(1, 2, 3, 4, 5), **options):
    owners = np.repeat(np.arange(len(rows)), rows)
    data = jaxfed.FederatedData.from_arrays({"x": (1.0 + owners).astype(np.float32)}, owners)
    algorithm = jaxfed.fedavg(loss, lrate=0.1, batch_size=None, epochs=1, measures=measures)
    return jaxfed.Simulation(algorithm, data, selector=selector, **options)


def run(selector, measures=(), rounds=3, **options):
    sim = simulation(selector, measures, **options)
    return sim.run(sim.init({"w": np.float32(2.0)}, key=jax.random.key(0)), rounds=rounds)
