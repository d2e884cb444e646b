"""One program over several devices equals one device: every recipe, stacked rules, evaluation, on ragged clients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine.oracle import flat, softmax_data, softmax_loss, softmax_params

import jaxfed
from jaxfed import Simulation
from jaxfed.algorithms import RECIPES

LOCAL = {"lrate": 0.1, "batch_size": 4, "epochs": 2}
OPTIONS = {
    "scaffold": {"option": "I"},
    "fedbn": {"leaves": "bias"},
    "fedper": {"leaves": "bias"},
    "fedrep": {"leaves": "bias"},
}


def outcome(algorithm, devices=1, lanes=2, rounds=3, cohort_size=7, **options):
    """Weights after some rounds, what clients keep, and what a run says: losses, who counted, the evaluation."""
    simulation = Simulation(algorithm, softmax_data(), cohort_size, devices=devices, lanes=lanes, **options)
    state = simulation.init(softmax_params(), key=jax.random.key(3))
    state, history = simulation.run(state, rounds=rounds, eval_every=rounds)
    count = simulation.data.num_clients
    kept = [np.asarray(x)[:count] for x in jax.tree.leaves(state.kept) if jnp.issubdtype(x.dtype, jnp.floating)]
    reports = [np.where(r.counted, r.metrics["loss"], 0) for r in history] + [r.counted for r in history]
    evaluated = [history[-1].evaluation.metrics["loss"], history[-1].evaluation.by_client["loss"]]
    return [flat(state.params), np.asarray(state.seen), *kept, *reports, *evaluated]


def assert_equal(ours, theirs, tolerance):
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_on_three_devices(name):
    algorithm = RECIPES[name](softmax_loss, **LOCAL, **OPTIONS.get(name, {}))
    assert_equal(outcome(algorithm, 3), outcome(algorithm, 1), 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("devices", [[3], 2, 8])
@pytest.mark.parametrize("lanes", [1, 3])
def test_scaffold_on_any_number_of_devices(devices, lanes):
    algorithm = jaxfed.scaffold(softmax_loss, **LOCAL)
    devices = [jax.devices()[i] for i in devices] if isinstance(devices, list) else devices
    assert_equal(outcome(algorithm, devices, lanes), outcome(algorithm, 1, lanes), 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["fedavg", "scaffold", "ditto"])
@pytest.mark.parametrize("devices", [1, 3])
def test_pages_from_the_host_change_nothing(name, devices, tmp_path):
    algorithm = RECIPES[name](softmax_loss, **LOCAL)
    paged = tmp_path if devices == 3 else True
    assert_equal(outcome(algorithm, devices, rounds=5, paged=paged), outcome(algorithm, devices, rounds=5), 0)
