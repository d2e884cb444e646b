"""How many lanes: the climb against exhaustive search, and what a simulation does with ``lanes="auto"``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfed
from jaxfed import Simulation
from jaxfed.lane_choice import LADDER, best_of, climb


@pytest.mark.parametrize("start", [1, 7, 20, 64])
@pytest.mark.parametrize("best", [1, 5, 7, 50])
def test_the_climb_finds_the_bottom_of_a_valley(start, best):
    asked = []

    def measure(lanes):
        asked.append(lanes)
        return 1 + abs(np.log(lanes / best))

    seconds = climb(measure, start, most=64)
    ladder = sorted({start, *(lanes for lanes in LADDER if lanes <= 64)})
    assert best_of(seconds) == min(ladder, key=lambda lanes: abs(np.log(lanes / best)))
    assert len(asked) == len(set(asked)) == len(seconds)


def test_no_more_is_compiled_than_needed():
    assert list(climb(lambda lanes: 1.0, 10, most=100)) == [10, 20, 5]
    assert list(climb(lambda lanes: -lanes, 10, most=60)) == [10, 20, 50]


def loss(params, batch, key):
    return jnp.square(batch["x"] - params)


def simulation(**options):
    data = jaxfed.FederatedData.from_arrays({"x": np.arange(24.0, dtype="float32")}, np.arange(24) % 12)
    return Simulation(jaxfed.fedavg(loss, lrate=0.1, batch_size=1), data, 10, chunk=2, **options)


def test_auto_measures_once_enough_rounds_are_to_come(monkeypatch):
    measured = []

    def seconds(self, state, lanes):
        measured.append(lanes)
        return {1: 3.0, 2: 2.0, 5: 4.0}.get(lanes, 9.0)

    monkeypatch.setattr(Simulation, "_seconds", seconds)
    short, long = simulation(lanes="auto"), simulation(lanes="auto")
    monkeypatch.setattr("jaxfed.simulation._WORTH", np.inf)
    state = short.init(jnp.zeros(()), key=jax.random.key(0))
    expected, _ = short.run(state, rounds=6)
    assert (measured, short.lane_seconds, short.lanes(state.params)) == ([10], {}, 10)
    monkeypatch.setattr("jaxfed.simulation._WORTH", 0)
    found, _ = long.run(state, rounds=6)
    assert (long.lanes(state.params), best_of(long.lane_seconds)) == (2, 2)
    assert measured[1:] == [10, 10, 5, 2, 1]
    # The rounds run for it leave no trace; other lanes add up in another order.
    np.testing.assert_allclose(found.params, expected.params, rtol=1e-5)
    long.run(state, rounds=6)
    assert len(measured) == 6


def test_tuning_really_runs_rounds():
    tuned = simulation(lanes="auto")
    state = tuned.init(jnp.zeros(()), key=jax.random.key(0))
    lanes = tuned.tune(state)
    assert tuned.lane_seconds[lanes] == min(tuned.lane_seconds.values()) > 0
    assert int(state.round) == 0


@pytest.mark.parametrize("lanes", [0, -1, 2.5, "fast"])
def test_other_lanes_are_refused(lanes):
    with pytest.raises((TypeError, ValueError), match="lanes"):
        simulation(lanes=lanes)
