"""Clients that do not count: not finite, without rows, without work. The others' results stay exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine.oracle import Planned

import jaxfed
from jaxfed import Algorithm, GradientMaskedMean, LocalTraining, Optimizer, Simulation, Steps, Sum

KEEP = Optimizer(0.1, modules=["adam"], keep_state=True)
FULL = {"batch_size": None, "steps": 3}
ALL_WORK = np.ones((1, 4))
EVERYONE, WITHOUT_2 = Planned([[0, 1, 2, 3]], ALL_WORK), Planned([[0, 1, 5, 3]], ALL_WORK)
BAD = {"nan": np.nan, "inf": np.inf, "minus inf": -np.inf, "overflow": 1e30}


def loss(params, batch, key):
    """Client 2 multiplies by ``fault`` what all others do by 1: gradients that are NaN, infinite or overflow."""
    fault = jnp.where(batch["faulty"], batch["fault"], 1.0)
    return fault * jnp.square(params["w"] - batch["b"]) + fault * jnp.square(fault * params["v"])


def federation(fault=np.nan):
    arrays = {"b": np.arange(5, dtype=np.float32), "faulty": np.array([0, 0, 1, 0, 0], bool)}
    # NaN is no data; it appears on the way, as it does in training.
    data = jaxfed.FederatedData.from_arrays(arrays | {"fault": np.zeros(5, np.float32)}, [0, 1, 2, 3, 3], num_clients=5)
    data._arrays["fault"] = np.full(5, fault, np.float32)
    return data


def one_round(algorithm, fault, selector, state=None):
    simulation = Simulation(algorithm, federation(fault), selector=selector, lanes=2)
    params = {"v": jnp.ones((), jnp.float32), "w": jnp.zeros((), jnp.float32)}
    before = simulation.init(params, key=jax.random.key(0)) if state is None else state
    after, history = simulation.run(before, rounds=1)
    return before, after, history[0]


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]


def assert_equal(left, right):
    for one, other in zip(leaves(left), leaves(right), strict=True):
        np.testing.assert_array_equal(one, other)


ALGORITHMS = {
    "kept adam": jaxfed.fedadam(loss, lrate=KEEP, **FULL),
    "scaffold": jaxfed.scaffold(loss, lrate=0.1, **FULL),
    "gradient masked": Algorithm(LocalTraining(loss, 0.1, Steps(None, steps=3)), 1.0, GradientMaskedMean("uniform")),
    "sum": Algorithm(LocalTraining(loss, 0.1, Steps(None, steps=3)), 1.0, Sum()),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_a_client_that_is_not_finite_is_left_out(algorithm):
    for fault in BAD.values():
        _, after, report = one_round(algorithm, fault, EVERYONE)
        assert report.excluded == [2]
        assert report.counted.tolist() == [True, True, False, True]
        assert all(np.isfinite(x).all() for x in leaves(after))


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_the_others_are_exactly_as_in_a_round_without_it(algorithm):
    _, with_it, report = one_round(algorithm, np.nan, EVERYONE)
    _, without, other = one_round(algorithm, np.nan, WITHOUT_2)
    assert_equal(with_it._replace(seen=0 * with_it.seen), without._replace(seen=0 * without.seen))
    assert with_it.seen.tolist() == without.seen.tolist() == [True, True, False, True, False]
    assert report.update_norm == other.update_norm
    assert other.clients.tolist() == [0, 1, 3]
    assert report.loss == other.loss
    assert report.row()["clients"] == other.row()["clients"] == 3


def row(table, client):
    return jax.tree.map(lambda x: x[client], table)


@pytest.mark.parametrize("name", ["kept adam", "scaffold"])
def test_the_kept_row_of_an_excluded_client_stays(name):
    _, healthy, report = one_round(ALGORITHMS[name], 1.0, EVERYONE)
    assert report.excluded == []
    _, after, report = one_round(ALGORITHMS[name], np.nan, EVERYONE, state=healthy)
    assert report.excluded == [2]
    assert_equal(row(after.kept, 2), row(healthy.kept, 2))
    assert after.seen[2]
    moved = [(a != b).any() for a, b in zip(leaves(row(after.kept, 1)), leaves(row(healthy.kept, 1)))]
    assert any(moved)


def slope_loss(w, batch, key):
    """A gradient that is ``slope`` everywhere."""
    return batch["slope"] * w


PERSONAL = {
    "ditto": jaxfed.ditto(slope_loss, strength=0.0, lrate=1e-30, personal_lrate=1e10, **FULL),
    "apfl": jaxfed.apfl(slope_loss, alpha=0.5, lrate=1e-30, personal_lrate=1e10, **FULL),
}


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("name", PERSONAL)
def test_what_is_not_finite_is_not_kept_though_the_upload_is(name, lanes):
    """At a slope of 1e30 client 2 overflows in its own model and in nothing that it sends."""
    data = [jaxfed.FederatedData.from_arrays({"slope": np.array([1, 1, x, 1], np.float32)}, range(4)) for x in (1, 1e30)]
    start, states = None, []
    for rows, cohort in ((data[0], EVERYONE), (data[1], EVERYONE), (data[1], Planned([[0, 1, 3, 3]], [[1.0, 1.0, 1.0, 0.0]]))):
        simulation = Simulation(PERSONAL[name], rows, selector=cohort, lanes=lanes)
        state = simulation.init(jnp.ones(()), key=jax.random.key(0)) if start is None else start
        state, history = simulation.run(state, rounds=1)
        start = state if start is None else start
        states.append((state, history[0]))
    (healthy, _), (after, report), (without, _) = states
    assert report.excluded == [2]
    assert np.isfinite([report.metrics["loss"][2], report.update_norm]).all()
    assert all(np.isfinite(x).all() for x in leaves(after))
    assert_equal(row(after.kept, 2), row(healthy.kept, 2))
    assert_equal(after.params, without.params)


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_a_round_in_which_nobody_counts_changes_nothing_but_its_number(algorithm):
    _, state, _ = one_round(algorithm, 1.0, EVERYONE)
    for selector in (Planned([[2, 4, 5, 5]], ALL_WORK), Planned([[0, 1, 3, 2]], [[0.0, 0.0, 0.0, 1.0]])):
        _, after, report = one_round(algorithm, np.nan, selector, state=state)
        assert not report.counted.any()
        assert np.isnan(report.loss)
        assert int(after.round) == int(state.round) + 1
        assert_equal(after._replace(round=state.round), state)


def test_clients_without_rows_or_work_never_count():
    selector = Planned([[0, 1, 3, 4]], [[1.0, 0.0, 1.0, 1.0]])
    _, after, report = one_round(ALGORITHMS["scaffold"], 1.0, selector)
    assert report.excluded == [1, 4]
    assert after.seen.tolist() == [True, False, False, True, False]
    assert report.metrics["steps"].tolist() == [3, 0, 3, 0]
