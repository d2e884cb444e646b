"""Cox's loss and Harrell's C against their definitions, a row and a pair at a time."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxfed
from jaxfed.models.adapters import from_linen
from jaxfed.models.survival import concordance_index, cox


def draw(seed, rows=30):
    rng = np.random.default_rng(seed)
    # Few different times and risks, so that there are ties.
    return rng.integers(-3, 4, rows) / 2, rng.integers(1, 12, rows).astype(float), rng.integers(0, 2, rows)


def slow_cox(risks, time, event):
    values = []
    for i, e in enumerate(event):
        at_risk = [math.exp(risks[j]) for j in range(len(time)) if time[j] >= time[i]]
        values.append(e * (math.log(sum(at_risk)) - risks[i]))
    return values


def slow_concordance(risks, time, event):
    good = pairs = 0
    for i, j in itertools.permutations(range(len(time)), 2):
        if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
            pairs += 1
            good += 1 if risks[i] > risks[j] else 0.5 if risks[i] == risks[j] else 0
    return good / pairs


@pytest.mark.parametrize("seed", range(3))
def test_cox_is_its_definition(seed, x64):
    risks, time, event = draw(seed)
    batch = {"time": jnp.array(time), "event": jnp.array(event)}
    for shape in ((30,), (30, 1)):
        np.testing.assert_allclose(cox(jnp.array(risks).reshape(shape), batch), slow_cox(risks, time, event), rtol=1e-12)


def test_padded_rows_do_not_count(x64):
    risks, time, event = draw(0)
    mask = np.arange(30) < 21
    batch = {"time": jnp.array(time), "event": jnp.array(event), "mask": jnp.array(mask)}
    found = cox(jnp.array(risks), batch)
    np.testing.assert_allclose(found[:21], slow_cox(risks[:21], time[:21], event[:21]), rtol=1e-12)
    assert jnp.isfinite(found).all()
    slope = jax.grad(lambda r: jnp.where(mask, cox(r, batch), 0).sum())(jnp.array(risks))
    np.testing.assert_array_equal(slope[21:], 0)


def test_large_risks_do_not_overflow():
    batch = {"time": jnp.array([1.0, 2.0]), "event": jnp.array([1, 1])}
    np.testing.assert_allclose(cox(jnp.array([1e4, 1e4]), batch), [np.log(2), 0], atol=1e-3)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"expected risks \[B\] or \[B, 1\] .* got \(3, 2\)"):
        cox(jnp.zeros((3, 2)), {"time": jnp.zeros(3), "event": jnp.zeros(3)})


@pytest.mark.parametrize("seed", range(3))
def test_concordance_is_its_definition(seed):
    np.testing.assert_allclose(concordance_index(*draw(seed)), slow_concordance(*draw(seed)), rtol=1e-6)


def test_a_federation_learns_who_is_at_risk():
    """Times fall with the first input: the order is found, by clients that each see their own patients only."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3)).astype(np.float32)
    time = np.exp(-2 * x[:, 0] + rng.gumbel(size=200)).astype(np.float32)
    arrays = {"x": x, "time": time, "event": rng.integers(0, 2, 200)}
    data = jaxfed.FederatedData.from_arrays(arrays, np.arange(200) % 4)
    model = from_linen(nn.Dense(1, use_bias=False), data.client(0), loss=cox, label_key=None)
    simulation = jaxfed.Simulation(jaxfed.fedavg(model, lrate=0.1, batch_size=16), data)
    state, _ = simulation.run(simulation.init(key=jax.random.key(0)), rounds=20)
    kernel = state.params["kernel"][:, 0]
    assert kernel[0] > 5 * jnp.abs(kernel[1:]).max()
    assert concordance_index(x @ kernel, time, arrays["event"]) > 0.8
