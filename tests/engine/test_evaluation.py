"""Metrics over all rows and by client, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine.oracle import CLASSES, FEATURES, flat, loss_and_gradient, softmax_data, softmax_loss, softmax_params

import jaxfed
from jaxfed import Model, Simulation
from jaxfed.engine.evaluation import sum_metrics
from jaxfed.engine.population import Population

pytestmark = pytest.mark.usefixtures("x64")


def loss_with_accuracy(params, batch, key):
    logits = jnp.dot(batch["x"], params["weight"]) + params["bias"][None]
    hits, training = logits.argmax(1) == batch["y"], jnp.full(batch["y"].shape, key is not None)
    return softmax_loss(params, batch, key), {"accuracy": hits.astype(jnp.float32), "training": training}


def federation(rows, seed=0):
    """Rows dealt over clients 0 to 5, of whom 2 has none."""
    data = softmax_data([rows])
    clients = np.random.default_rng(seed).choice([0, 1, 3, 4, 5], rows)
    return jaxfed.FederatedData.from_arrays(data.arrays, clients, num_clients=6)


def expected(data, of_client):
    values = np.array([of_client(data.client(i)) if size else np.nan for i, size in enumerate(data.sizes)])
    return values, np.nansum(values * data.sizes) / data.sizes.sum()


@pytest.mark.parametrize("rows", [1, 7, 255, 256, 257, 600, 1024])
def test_loss_and_accuracy_of_any_number_of_rows(rows):
    data, params = federation(rows), softmax_params()
    simulation = Simulation(jaxfed.fedavg(loss_with_accuracy, lrate=0.1, batch_size=4), data)
    found = simulation.evaluate(simulation.init(params, key=jax.random.key(0)))
    theta = flat(params)
    weight, bias = theta[CLASSES:].reshape(FEATURES, CLASSES), theta[:CLASSES]
    oracles = {
        "loss": lambda c: loss_and_gradient(theta, c["x"], c["y"])[0],
        "accuracy": lambda c: ((c["x"] @ weight + bias).argmax(1) == c["y"]).mean(),
        "training": lambda c: 0.0,
    }
    for name, of_client in oracles.items():
        by_client, total = expected(data, of_client)
        np.testing.assert_allclose(found.by_client[name], by_client, rtol=1e-12)
        assert found.metrics[name] == pytest.approx(total, rel=1e-12)
    assert set(found.metrics) == set(oracles)
    assert found.examples.tolist() == data.sizes.tolist()


def masked_metrics(params, stats, batch):
    """Values that tell in how many batches a row was counted, whatever is in rows that are masked."""
    share = 1 / batch["mask"].sum()
    return {"loss": jnp.where(batch["mask"], share, jnp.nan), "offset": batch["x"][:, 0] - stats["mean"]}


def unused(*args):
    raise AssertionError("evaluation called it")


MASKED = Model(unused, unused, unused, masked_metrics)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10])
def test_every_row_counts_once_and_masked_rows_never(batch_size):
    x = jnp.arange(10.0)[:, None]
    columns = (jnp.array([0, 3, 7, 10]), jnp.array([3, 4, 3, 0]), jnp.zeros(4, jnp.int32))
    population = Population({"x": x}, *columns, weight=1.0, capacity=4, count=4)
    sums = sum_metrics(MASKED, (), {"mean": jnp.array(1.0)}, population, at_once=batch_size)
    batches = -(-10 // batch_size)
    assert sums["loss"].sum() == pytest.approx(batches)
    np.testing.assert_allclose(sums["offset"], [0, 14, 21, 0], rtol=1e-12)


def test_another_data_set_and_other_weights():
    train, test = federation(40), federation(30, seed=1)
    simulation = Simulation(jaxfed.fedavg(loss_with_accuracy, lrate=0.1, batch_size=4), train)
    start = simulation.init(softmax_params(), key=jax.random.key(0))
    state, history = simulation.run(start, rounds=3, eval_every=2, eval_data=test)
    assert [report.evaluation is not None for report in history] == [False, True, True]
    for which, evaluated in ((state, history[2].evaluation), (start, simulation.evaluate(start, test))):
        loss, _ = loss_and_gradient(flat(which.params), test.arrays["x"], test.arrays["y"])
        assert evaluated.metrics["loss"] == pytest.approx(loss, rel=1e-12)


def test_rows_are_needed():
    simulation = Simulation(jaxfed.fedavg(softmax_loss, lrate=0.1, batch_size=4), federation(5))
    state = simulation.init(softmax_params(), key=jax.random.key(0))
    empty, _ = federation(5).split_by(np.ones(5, bool))
    with pytest.raises(ValueError, match="at least one row, got none"):
        simulation.evaluate(state, empty)
