"""Runs on some devices, and what is compared of them."""

import jax
import jax.numpy as jnp
import numpy as np
from engine.oracle import CLASSES, FEATURES, flat, softmax_data, softmax_loss, softmax_params

from jaxfed import FederatedData, Model, Simulation

LOCAL = {"lrate": 0.1, "batch_size": 4, "epochs": 2}
traces = []


def init(key):
    return softmax_params(), {"mean": jnp.zeros(FEATURES), "version": jnp.int32(7)}


def loss_with_statistics(params, stats, batch, key):
    """The features' running mean, and an integer that stays the server's."""
    traces.append(1)
    mean = 0.9 * stats["mean"] + 0.1 * jnp.where(batch["mask"][:, None], batch["x"], 0).mean(0)
    return softmax_loss(params, batch, key), {"mean": mean, "version": stats["version"] + 1}


def predict(params, stats, batch):
    return (batch["x"] - stats["mean"][None]) @ params["weight"] + params["bias"][None]


def metrics(params, stats, batch):
    logits = predict(params, stats, batch)
    return {"loss": softmax_loss(params, batch, None), "accuracy": (logits.argmax(1) == batch["y"]).astype(float)}


MODEL = Model(init=init, loss=loss_with_statistics, predict=predict, metrics=metrics)


def broken(data, client):
    """The same rows, those of one client so large that its training overflows."""
    arrays = {key: x.copy() for key, x in data.arrays.items()}
    arrays["x"][data.client_of_row == client] = 1e300
    return FederatedData(arrays, data.offsets, data.client_names)


def simulate(algorithm, devices=1, lanes=2, cohort_size=7, data=None, **options):
    """A simulation and its first state."""
    data = softmax_data() if data is None else data
    simulation = Simulation(algorithm, data, cohort_size, devices=devices, lanes=lanes, **options)
    own = algorithm.client.model == MODEL
    return simulation, simulation.init(None if own else softmax_params(), key=jax.random.key(3))


def outcome(simulation, state, rounds=3):
    """What a run leaves: weights, states, kept rows, what it reports, its evaluation, all by client or of all clients."""
    state, history = simulation.run(state, rounds=rounds, eval_every=rounds)
    state = simulation.portable(state)
    rest = [flat(state.params), *leaves((state.stats, state.server, state.aggregator, state.selector, state.kept)), state.seen]
    reports = [np.where(r.counted, r.metrics["loss"], 0) for r in history] + [r.counted for r in history]
    evaluation = history[-1].evaluation
    return [*rest, *reports, evaluation.metrics["loss"], evaluation.by_client["loss"]]


def leaves(tree):
    """Arrays without those that are PRNG keys."""
    return [np.asarray(x) for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]


def assert_equal(ours, theirs, tolerance=1e-12):
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=tolerance)


assert CLASSES == 3  # what three devices can share
