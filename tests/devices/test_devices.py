"""One program over several devices equals one device, on ragged clients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices.runs import LOCAL, MODEL, assert_equal, broken, leaves, outcome, simulate, traces
from engine.oracle import Planned, softmax_data, softmax_loss

import jaxfed
from jaxfed import Krum
from jaxfed.algorithms import RECIPES
from jaxfed.engine.mesh import choose_devices
from jaxfed.engine.population import table_length
from jaxfed.placement import Placement

pytestmark = pytest.mark.usefixtures("x64")
OPTIONS = {
    "scaffold": {"option": "I"},
    "fedbn": {"leaves": "bias"},
    "fedper": {"leaves": "bias"},
    "fedrep": {"leaves": "bias"},
}
# Kept rows, auxiliary variables, statistics and the server's Adam at once.
SCAFFOLD = jaxfed.scaffold(MODEL, **LOCAL, server_lrate=jaxfed.Optimizer(0.1, modules=["adam"]))
QUICK = {
    "kept rows, statistics": SCAFFOLD,
    "survey, stacked uploads": jaxfed.mime(softmax_loss, **LOCAL).replace(aggregator=Krum(1, 3)),
    "personal evaluation": jaxfed.ditto(softmax_loss, **LOCAL),
}


# Three cohorts, one with empty places. The tests share their programs.
PLAN = Planned([[0, 1, 3, 4, 5, 6, 7], [8, 9, 2, 4, 9, 6, 9], [1, 3, 5, 7, 8, 0, 2]])
PLANNED = {"cohort_size": None, "selector": PLAN}
BACKWARDS = {"cohort_size": None, "selector": Planned([[1, 3, 5, 7, 8, 0, 2], [8, 9, 2, 4, 9, 6, 9], [0, 1, 3, 4, 5, 6, 7]])}


@pytest.mark.parametrize("algorithm", QUICK.values(), ids=QUICK)
def test_three_devices_equal_one(algorithm):
    assert_equal(outcome(*simulate(algorithm, 3, **PLANNED)), outcome(*simulate(algorithm, **PLANNED)))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_on_three_devices(name):
    algorithm = RECIPES[name](softmax_loss, **LOCAL, **OPTIONS.get(name, {}))
    assert_equal(outcome(*simulate(algorithm, 3)), outcome(*simulate(algorithm)))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [[3], 2, 3, 8])
@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("cohort_size", [1, 7])
def test_any_number_of_devices_lanes_and_clients(devices, lanes, cohort_size):
    devices = [jax.devices()[i] for i in devices] if isinstance(devices, list) else devices
    ours, theirs = (simulate(SCAFFOLD, d, lanes, cohort_size) for d in (devices, 1))
    assert_equal(outcome(*ours), outcome(*theirs))


def test_a_client_that_diverges_is_left_out():
    for devices in (1, 3):
        healthy, state = simulate(SCAFFOLD, devices, **PLANNED)
        before, _ = healthy.run(state, rounds=1)
        sick, _ = simulate(SCAFFOLD, devices, **PLANNED, data=broken(softmax_data(), 4))
        after, history = sick.run(before, rounds=1)
        assert 4 in history[0].excluded
        assert all(np.isfinite(x).all() for x in leaves(after))
        rows = [[x[client] for x in leaves(s.kept)] for s in (before, after) for client in (6, 4)]
        assert_equal(rows[1], rows[3], 0)
        assert (rows[0][0] != rows[2][0]).any()


def test_a_second_run_and_other_cohorts_trace_nothing():
    ours, state = simulate(SCAFFOLD, 3, **PLANNED)
    state, _ = ours.run(state, rounds=2)
    before = len(traces)
    other, _ = simulate(SCAFFOLD, 3, **BACKWARDS)
    later, _ = other.run(state, rounds=1)
    list(other.rounds(later, rounds=2))
    ours.run(ours.portable(state), rounds=1)
    assert len(traces) == before


def test_a_state_goes_on_on_other_devices():
    three, start = simulate(SCAFFOLD, 3, **PLANNED)
    one, _ = simulate(SCAFFOLD, **PLANNED)
    state, _ = three.run(start, rounds=2)
    whole, _ = three.run(state, rounds=1)
    for given in (state, three.portable(state)):
        after, _ = one.run(given, rounds=1)
        assert_equal(leaves(one.portable(after)), leaves(three.portable(whole)))
        assert {len(x.sharding.device_set) for x in jax.tree.leaves(after)} == {1}
    back, _ = three.run(after, rounds=1)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(back)} == {3}


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (8, 1), (8, 2), (2, 8)])
def test_a_table_of_other_devices_keeps_its_rows(before, after):
    table = {"a": jnp.arange(table_length(9, choose_devices(before, 9)) * 2).reshape(-1, 2)}
    placement = Placement(softmax_data(), SCAFFOLD, choose_devices(after, 9))
    found = placement.by_device(table)["a"]
    assert len(found) == table_length(9, placement.devices)
    np.testing.assert_array_equal(found[:9], table["a"][:9])
