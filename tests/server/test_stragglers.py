"""Stragglers: how many are late, who, and how much they do; two-sided, so that a wrong scale fails."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfed
from jaxfed import Everyone, Selector, Stragglers, Uniform
from jaxfed.messages import Cohort
from jaxfed.testing import check_config, check_pytree

COHORT, POPULATION, DRAWS = 10, 30, 2000


class Some(Selector, register=False):
    """Everyone, of whom only clients 2 and 3 are valid; counts the rounds that it observes."""

    def init(self, population):
        return jnp.zeros((), jnp.int32)

    def cohort_size(self, population):
        return population

    def select(self, state, key, round, population):
        ids = jnp.arange(population)
        return Cohort(ids, (ids == 2) | (ids == 3), jnp.full(population, 0.5))

    def observe(self, state, cohort, metrics):
        return state + 1


@partial(jax.jit, static_argnames=("population",))
def select(selector, keys, population):
    return jax.vmap(lambda key: selector.select((), key, jnp.array(0), population))(keys)


def draw(selector, draws=DRAWS, population=COHORT):
    """Cohorts ``[draws, C]``."""
    return jax.tree.map(np.asarray, select(selector, jax.random.split(jax.random.key(5), draws), population))


@pytest.mark.parametrize(("share", "late"), [(0.0, 0), (0.04, 0), (0.5, 5), (0.9, 9), (1.0, 10)])
def test_exactly_a_share_is_late(share, late):
    slow, dropped = (draw(Stragglers(Everyone(), share, how), 50) for how in ("partial", "drop"))
    assert ((slow.work < 1).sum(1) == late).all()
    assert ((~dropped.valid).sum(1) == late).all()
    assert slow.valid.all()
    assert (dropped.work == 1).all()


def test_cohorts_are_those_of_the_selector_and_the_same_are_late():
    alone = draw(Uniform(COHORT), 50, POPULATION)
    slow, dropped = (draw(Stragglers(Uniform(COHORT), 0.5, how), 50, POPULATION) for how in ("partial", "drop"))
    np.testing.assert_array_equal(slow.ids, alone.ids)
    np.testing.assert_array_equal(dropped.ids, alone.ids)
    np.testing.assert_array_equal(slow.work < 1, ~dropped.valid)


def test_everyone_is_late_alike():
    """Each of ten places is late 600 of 2000 times, give or take: within five deviations, and not closer than chance allows."""
    counts = (draw(Stragglers(Everyone(), 0.3)).work < 1).sum(0)
    deviation = np.sqrt(DRAWS * 0.3 * 0.7)
    assert np.abs(counts - 600).max() < 5 * deviation
    assert counts.std() > deviation / 4


def test_work_is_uniform_from_one_to_all_but_one():
    """FedProx: Uniform{1, ..., E - 1} epochs of E. The chi-square of four values lies in its central 99.998%."""
    work = draw(Stragglers(Everyone(), 0.5, epochs=5)).work
    values, counts = np.unique(np.round(work[work < 1] * 5, 6), return_counts=True)
    np.testing.assert_array_equal(values, [1, 2, 3, 4])
    expected = DRAWS * 5 / 4
    assert 0.01 < ((counts - expected) ** 2 / expected).sum() < 25


def test_work_and_lateness_are_independent_between_rounds():
    late = draw(Stragglers(Everyone(), 0.5)).work < 1
    agreement = (late[1:] == late[:-1]).mean()
    assert abs(agreement - 0.5) < 5 * 0.5 / np.sqrt((DRAWS - 1) * COHORT)


def test_only_valid_clients_are_late():
    selector = Stragglers(Some(), 0.5, epochs=2)
    cohort = selector.select(selector.init(6), jax.random.key(0), jnp.array(0), 6)
    assert sorted(np.asarray(cohort.work)[2:4].tolist()) == [0.25, 0.5]  # half of the work that was asked for
    assert (np.asarray(cohort.work)[[0, 1, 4, 5]] == 0.5).all()
    assert selector.observe(selector.init(6), cohort, {}) == 1


def slope(params, batch, key):
    return params * batch["x"]


def counted(late):
    """Steps ``[R, C]`` of the clients that counted, with 20 epochs of one row each; 8 rounds of 6 of 9 clients."""
    data = jaxfed.FederatedData.from_arrays({"x": np.ones(9, np.float32)}, np.arange(9))
    algorithm = jaxfed.fedavg(slope, lrate=0.1, batch_size=1, epochs=20)
    simulation = jaxfed.Simulation(algorithm, data, selector=Stragglers(Uniform(6), 0.5, late, epochs=20), lanes=4)
    _, history = simulation.run(simulation.init(jnp.zeros(()), key=jax.random.key(0)), rounds=8)
    return [np.sort(report.metrics["steps"][report.counted]) for report in history]


def test_late_clients_do_whole_epochs():
    steps = np.array(counted("partial"))
    assert (steps[:, 3:] == 20).all()
    assert steps[:, :3].min() >= 1
    assert steps[:, :3].max() <= 19
    assert len(np.unique(steps[:, :3])) > 8


def test_dropped_clients_do_not_count():
    np.testing.assert_array_equal(counted("drop"), np.full((8, 3), 20))


def test_config_and_pytree():
    selector = Stragglers(("uniform", {"size": 7}), 0.3, "drop", epochs=4)
    check_config(selector)
    check_pytree(selector)
    assert selector.cohort_size(8) == 7
    with pytest.raises(ValueError, match="at most the population of 6"):
        selector.cohort_size(6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"share": 1.5}, "share: expected a finite number at least 0 and at most 1, got 1.5"),
        ({"late": "never"}, "late: expected one of 'partial', 'drop', got 'never'"),
        ({"epochs": 1}, "epochs: expected an integer at least 2, got 1"),
        ({"selector": "unifrom"}, "No selector is called 'unifrom'. Did you mean 'uniform'"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(ValueError, match=words):
        Stragglers(**({"selector": Everyone()} | arguments))
