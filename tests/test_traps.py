"""Traps of other systems that concern whole rounds: each test fails on the behaviour named. Others lie beside their part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfed
from jaxfed import Algorithm, FederatedData, LocalTraining, Mean, Model, Optimizer, Simulation, Steps


def distance(params, batch, key):
    """Each row pulls to its own point."""
    return jnp.square(params - batch["x"]) / 2


def unlike_clients():
    """One row at 0; four rows at 5."""
    return FederatedData.from_arrays({"x": jnp.array([0.0, 5.0, 5.0, 5.0, 5.0])}, [0, 1, 1, 1, 1])


def one_round(algorithm, data, params=0.0, key=0, **options):
    simulation = Simulation(algorithm, data, **options)
    return simulation.run(simulation.init(jnp.asarray(params), key=jax.random.key(key)), rounds=1)[0]


@pytest.mark.parametrize(("weights", "mean"), [("examples", 4.0), ("uniform", 2.5), ("steps", 2.5)])
def test_t15_weights_are_named(weights, mean):
    """declearn weighs by steps, Fed-BioMed by examples, FedScale not at all. One local step of rate 1 ends at the mean."""
    algorithm = jaxfed.fedavg(distance, lrate=1.0, batch_size=4, steps=1, weights=weights)
    assert one_round(algorithm, unlike_clients()).params == pytest.approx(mean)


def with_statistics(params, stats, batch, key):
    """A model whose statistics are the batch's mean and a count of batches."""
    new = {"mean": batch["x"].mean(where=batch["mask"]), "batches": stats["batches"] + 1}
    return jnp.square(params - batch["x"]), new if key is not None else stats


def test_t26_statistics_are_averaged_and_counters_are_not():
    """FedScale averages integer counters; FederatedScope shares no statistics; Fed-BioMed turns them into float32."""
    model = Model(lambda key: None, with_statistics, lambda *a: None, lambda *a: {})
    algorithm = Algorithm(LocalTraining(model, 0.1, Steps(batch_size=4, steps=3)), 1.0, Mean("examples"))
    simulation = Simulation(algorithm, unlike_clients())
    stats = {"mean": jnp.zeros(()), "batches": jnp.array(7)}
    state = simulation.init(jnp.zeros(()), key=jax.random.key(0), stats=stats)
    state, _ = simulation.run(state, rounds=1)
    assert state.stats["mean"] == pytest.approx(4.0)
    assert state.stats["batches"] == 7
    assert state.stats["batches"].dtype == jnp.int32


def test_t27_the_anchor_has_a_gradient():
    """A penalty written as the squared norm of w - w0 has the gradient NaN at w = w0, the first step of every round."""
    algorithm = jaxfed.fedprox(distance, mu=1.0, lrate=0.1, batch_size=4, steps=2)
    assert np.isfinite(one_round(algorithm, unlike_clients()).params)


def test_t33_clients_draw_from_the_seed():
    """FedJAX's clients draw from the round's number alone: two seeds give the same batches."""
    algorithm = jaxfed.fedavg(distance, lrate=0.5, batch_size=1, epochs=1)
    data = FederatedData.from_arrays({"x": jnp.arange(8.0)}, [0] * 8)
    ends = {float(one_round(algorithm, data, key=key).params) for key in range(6)}
    assert len(ends) == 6


def test_noise_is_independent_over_clients_and_rounds():
    """The mean over n clients of noise of scale 1 has the scale 1 / sqrt(n); equal draws would keep 1, as would equal rounds."""
    noisy = Optimizer(1.0, modules=[("gaussian-noise", {"std": 1.0})])
    algorithm = jaxfed.fedavg(lambda p, b, k: 0 * b["x"] * p.sum(), lrate=noisy, batch_size=1, weights="uniform")
    data = FederatedData.from_arrays({"x": jnp.zeros(16)}, range(16))
    simulation = Simulation(algorithm, data)
    state = simulation.init(jnp.zeros(2000), key=jax.random.key(0))
    means = []
    for new, _ in simulation.rounds(state, rounds=2):
        means.append(np.asarray(new.params - state.params))
        state = new
    for mean in means:
        assert 0.8 < mean.std() * 4 < 1.2
    assert abs(np.corrcoef(means)[0, 1]) < 0.1


def test_zero_updates_are_safe():
    """T-20: a clip that divides by the norm of a zero update."""
    clipped = Optimizer(1.0, modules=["l2-global-clipping", "l2-clipping"])
    algorithm = jaxfed.fedavg(lambda p, b, k: 0 * b["x"] * p, lrate=clipped, batch_size=1)
    assert one_round(algorithm, unlike_clients(), params=3.0).params == 3.0
