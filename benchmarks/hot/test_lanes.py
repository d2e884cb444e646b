"""The fold over a cohort and the rows that clients keep: what the engine adds to the clients' own work."""

import jax
import jax.numpy as jnp
import pytest

from jaxfed.engine.lanes import Lane, Outcome, fold_waves

WIDTH = 610


def fold(lanes, population, table):
    """A cohort of 100 whose clients only add up what they keep."""

    def visit(lane, kept):
        return Outcome(jnp.ones(WIDTH), jax.tree.map(lambda x: x + 1, kept), lane.work, (), lane.work > 0)

    shape = (100 // lanes, lanes)
    ids = (jnp.arange(100) * (population // 100)).reshape(shape)
    keys = jax.random.split(jax.random.key(0), shape)
    everyone = Lane(keys, ids, ids, jnp.zeros(shape, bool), jnp.ones(shape))
    return fold_waves(visit, everyone, jnp.asarray(shape[0]), () if table is None else table)


@pytest.mark.parametrize("lanes", [1, 10, 100])
def test_fold(timed, lanes):
    total = timed(lambda: fold(lanes, 1000, None))[0]
    assert total[0] == 100


@pytest.mark.parametrize("population", [1_000, 100_000])
def test_kept_rows(benchmark, population):
    """Gather and scatter in a donated table: the population's size must not show."""
    step = jax.jit(lambda table: fold(10, population, table)[1], donate_argnums=0)
    tables = [step(jnp.zeros((population, WIDTH)))]

    def run():
        tables[0] = jax.block_until_ready(step(tables[0]))

    benchmark(run)
