"""Cohorts: distinct, uniform (two-sided), the same for the same key, and never larger than the population."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxfed
from jaxfed import Everyone, Simulation, Uniform

POPULATION, SIZE, DRAWS = 12, 5, 6000


def draw(selector, population, keys):
    return jax.jit(jax.vmap(lambda key: selector.select((), key, 0, population)))(keys)


@pytest.fixture(scope="module")
def cohorts():
    found = draw(Uniform(SIZE), POPULATION, jax.random.split(jax.random.key(3), DRAWS))
    assert found.valid.all()
    assert (found.work == 1).all()
    return np.asarray(found.ids)


def two_sided(statistic, freedom):
    return 1e-4 < stats.chi2.cdf(statistic, freedom) < 1 - 1e-4


def inclusions_fair(cohorts):
    """Each client is in a share SIZE / N of cohorts; sums are fixed, which makes N - 1 degrees of freedom."""
    rate = SIZE / POPULATION
    counts = np.bincount(cohorts.ravel(), minlength=POPULATION)
    scale = len(cohorts) * rate * (1 - rate) * POPULATION / (POPULATION - 1)
    return two_sided(((counts - len(cohorts) * rate) ** 2 / scale).sum(), POPULATION - 1)


def pairs_fair(cohorts):
    """Each ordered pair of clients stands in the first two places equally often."""
    codes = np.bincount(cohorts[:, 0] * POPULATION + cohorts[:, 1], minlength=POPULATION**2)
    off_diagonal = ~np.eye(POPULATION, dtype=bool).ravel()
    expected = len(cohorts) / off_diagonal.sum()
    return two_sided(((codes[off_diagonal] - expected) ** 2 / expected).sum(), off_diagonal.sum() - 1)


def test_cohorts_are_distinct_and_inside(cohorts):
    assert ((cohorts >= 0) & (cohorts < POPULATION)).all()
    assert all(len(set(cohort)) == SIZE for cohort in cohorts.tolist())


def test_selection_is_uniform(cohorts):
    assert inclusions_fair(cohorts)
    assert pairs_fair(cohorts)


def test_the_test_of_uniformity_refuses_turns_and_favourites():
    turns = (np.arange(DRAWS * SIZE) % POPULATION).reshape(DRAWS, SIZE)
    assert not inclusions_fair(turns)
    rng = np.random.default_rng(0)
    favour = np.array([1.1] + [1.0] * (POPULATION - 1)) / (POPULATION + 0.1)
    favourites = np.array([rng.choice(POPULATION, SIZE, replace=False, p=favour) for _ in range(DRAWS)])
    assert not inclusions_fair(favourites)
    assert inclusions_fair(rng.permuted(np.tile(np.arange(POPULATION), (DRAWS, 1)), axis=1)[:, :SIZE])


@pytest.mark.parametrize("population", [SIZE, SIZE + 1, 1000, 10**9])
def test_any_population_of_at_least_the_cohort(population):
    cohort = draw(Uniform(SIZE), population, jax.random.split(jax.random.key(0), 3))
    assert all(len(set(ids)) == SIZE for ids in cohort.ids.tolist())
    assert ((cohort.ids >= 0) & (cohort.ids < population)).all()


def test_everyone_is_everyone():
    assert Everyone().cohort_size(4) == 4
    cohort = Everyone().select((), jax.random.key(0), 0, 4)
    assert cohort.ids.tolist() == [0, 1, 2, 3]
    assert cohort.valid.all()
    assert cohort.work.tolist() == [1.0] * 4


def loss(params, batch, key):
    return batch["x"] * params


def simulation(**options):
    data = jaxfed.FederatedData.from_arrays({"x": np.ones(7, np.float32)}, np.arange(7))
    return Simulation(jaxfed.fedavg(loss, lrate=0.1, batch_size=1), data, **options)


def test_cohorts_differ_between_rounds_and_depend_on_the_key_alone():
    sim = simulation(cohort_size=3, lanes=3)

    def cohorts(seed):
        _, history = sim.run(sim.init(jnp.zeros(()), key=jax.random.key(seed)), rounds=6)
        return [tuple(report.clients.tolist()) for report in history]

    assert cohorts(0) == cohorts(0) != cohorts(1)
    assert len(set(cohorts(0))) > 3


BAD = [
    ({"cohort_size": 8}, "cohort_size: expected at most the population of 7 clients, got 8"),
    ({"selector": Uniform(8)}, "expected at most the population of 7 clients, got 8"),
    ({"cohort_size": 0}, "Uniform.size: expected an integer at least 1, got 0"),
    ({"cohort_size": 3, "selector": Everyone()}, "Expected cohort_size or selector, got both"),
    ({"selector": "everybody"}, "No selector is called 'everybody'"),
]


@pytest.mark.parametrize(("options", "text"), BAD)
def test_bad_cohorts_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        simulation(**options)


def test_a_selector_by_name():
    assert simulation(selector=("uniform", {"size": 3})).selector == Uniform(3)
    assert simulation(cohort_size=3).selector == Uniform(3)
    assert simulation().selector == Everyone()
