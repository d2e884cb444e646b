"""The fold over a cohort and the rows that clients keep: what the engine adds to the clients' own work."""

import jax
import jax.numpy as jnp
import pytest

from jaxfed.base import Cohort
from jaxfed.engine.lanes import Outcome, Tables, fold_clients

WIDTH = 610


def fold(lanes, population, table):
    """A cohort of 100 whose clients only add up what they keep."""

    def client(id, valid, work, kept, seen):
        new = jax.tree.map(lambda x: x + 1, kept)
        return Outcome(jnp.ones(WIDTH), new, work, valid)

    kept = table[:, :WIDTH] if table is not None else ()
    tables = Tables(kept, jnp.zeros(population, bool))
    ids = jnp.arange(100) * (population // 100)
    cohort = Cohort(ids, jnp.ones(100, bool), jnp.ones(100))
    return fold_clients(client, cohort, jnp.arange(100), tables, lanes)


@pytest.mark.parametrize("lanes", [1, 10, 100])
def test_fold(timed, lanes):
    total = timed(lambda: fold(lanes, 1000, None))[0]
    assert total[0] == 100


@pytest.mark.parametrize("population", [1_000, 100_000])
def test_kept_rows(benchmark, population):
    """Gather and scatter in a donated table: the population's size must not show."""
    step = jax.jit(lambda table: fold(10, population, table)[1].kept, donate_argnums=0)
    tables = [step(jnp.zeros((population, WIDTH)))]

    def run():
        tables[0] = jax.block_until_ready(step(tables[0]))

    benchmark(run)
