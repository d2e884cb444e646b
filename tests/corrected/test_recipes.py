"""The recipes by name: from plain options, in low precision, with late clients, and with a client whose update is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corrected.loops import OPTIONS, START, data, loss

import jaxfed
from jaxfed import Stragglers, Uniform, build_recipe
from jaxfed.algorithms_corrected import CORRECTED_RECIPES

OWN = {
    "fednova": {},
    "feddyn": {"alpha": 0.5},
    "mimelite": {"base": ["mime-adam", {"eps": 0.1}]},
    "mime": {"base": ["momentum", {"beta": 0.5}]},
    "qfedavg": {"q": 0.5},
    "afl": {"domains": 4, "ascent_rate": 0.2, "ascent": "projected"},
}
DOMAINS = {"domain": range(4)}


def breaks_for_client_2(params, batch, key):
    """NaN where the domain is 2."""
    return loss(params, batch, key) * jnp.where(batch["domain"] == 2, jnp.nan, 1.0)


def run(name, loss, start, rounds=4, **options):
    simulation = jaxfed.Simulation(build_recipe(name, loss, **OPTIONS, **OWN[name]), data(DOMAINS), lanes=2, **options)
    return simulation.run(simulation.init(start, key=jax.random.key(0)), rounds=rounds)


def test_the_table_holds_every_recipe():
    assert set(OWN) == set(CORRECTED_RECIPES)


@pytest.mark.parametrize("name", OWN)
def test_low_precision_is_kept_and_late_clients_count(name):
    start = jnp.asarray(START, jnp.bfloat16)
    with jax.enable_x64(False):
        state, history = run(name, loss, start, selector=Stragglers(Uniform(3), 0.4, epochs=2))
    assert state.params.dtype == jnp.bfloat16
    assert jnp.isfinite(state.params).all()
    assert not jnp.array_equal(state.params, start)
    assert all(report.counted.all() for report in history)
    assert {float(steps) for report in history for steps in report.metrics["steps"]} >= {1.0, 2.0}


@pytest.mark.parametrize("name", OWN)
def test_a_client_that_breaks_is_left_out(name):
    """NaN reaches neither the weights nor what the server keeps."""
    state, history = run(name, breaks_for_client_2, START)
    assert [report.excluded for report in history] == [[2]] * 4
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((state.params, state.server, state.aggregator)))
    assert np.asarray(state.seen).tolist() == [True, True, False, True]
