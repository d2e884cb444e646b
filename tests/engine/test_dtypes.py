"""Weights of any floating type and tree, sums in float32 or wider, and statistics that train along."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfed
from jaxfed import Algorithm, Epochs, LocalTraining, Mean, Model, Optimizer, Simulation, Steps, Sum

KEY = jax.random.key(0)


def slope(params, batch, key):
    return jnp.broadcast_to(params, batch["one"].shape).astype(jnp.float32)


def thousand_clients(aggregator, lrate, dtype):
    """A round of 1000 clients, each of whom moves by ``-lrate``."""
    data = jaxfed.FederatedData.from_arrays({"one": np.ones(1000, np.float32)}, np.arange(1000))
    algorithm = Algorithm(LocalTraining(slope, lrate, Steps(None)), 1.0, aggregator)
    simulation = Simulation(algorithm, data, lanes=50)
    state, history = simulation.run(simulation.init(jnp.zeros((), dtype), key=KEY), rounds=1)
    return state.params, history[0].update_norm


def test_a_thousand_bfloat16_tenths_are_added_up_in_float32():
    tenth = float(jnp.bfloat16(0.1))
    params, norm = thousand_clients(Sum(), 0.1, jnp.bfloat16)
    assert norm == 1000 * tenth == 100.09765625
    assert params == jnp.bfloat16(-1000 * tenth)
    assert params.dtype == jnp.bfloat16


def test_float16_uploads_do_not_overflow_in_the_sum():
    params, norm = thousand_clients(Mean("uniform"), 100.0, jnp.float16)
    assert norm == pytest.approx(100, rel=1e-6)
    assert params == -100
    assert params.dtype == jnp.float16


def distance(params, batch, key):
    """Half the squared distance of every weight to the row's target."""

    def of_row(target):
        return sum(0.5 * jnp.square(x.astype(target.dtype) - target).sum() for x in jax.tree.leaves(params))

    return jax.vmap(of_row)(batch["t"])


def tree(*dtypes):
    """Four leaves in dicts, lists and tuples, one a scalar and one empty of axes but one."""
    shapes = [(), (3,), (2, 2), (1, 2, 1)]
    leaves = [jnp.full(shape, i + 1, dtypes[i % len(dtypes)]) for i, shape in enumerate(shapes)]
    return {"scalar": leaves[0], "list": [leaves[1], (leaves[2],)], "nested": {"deep": ({"x": leaves[3]},)}}


def train(algorithm, params, rounds=3):
    data = jaxfed.FederatedData.from_arrays({"t": np.array([0.0, 2.0, 1.0, 5.0], np.float32)}, [0, 0, 1, 2])
    simulation = Simulation(algorithm, data, lanes=2)
    return simulation.run(simulation.init(params, key=KEY), rounds=rounds)[0]


DTYPES = {"float32": 1e-6, "bfloat16": 0.03, "float16": 4e-3}


def assert_same_types(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(left)] == [(x.shape, x.dtype) for x in jax.tree.leaves(right)]


def assert_at_the_closed_form(after, before):
    """Two steps of 0.1 in each of three rounds go towards the mean of the clients' means, 7 / 3."""
    for x, x0 in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        expected = 7 / 3 + 0.9**6 * (np.asarray(x0, np.float64) - 7 / 3)
        np.testing.assert_allclose(np.asarray(x, np.float64), expected, rtol=DTYPES.get(x.dtype.name, 1e-12))


@pytest.mark.parametrize("dtypes", [("float32",), ("bfloat16",), ("float16",), ("bfloat16", "float32", "float16")], ids="+".join)
def test_trees_of_any_floating_type_are_trained(dtypes):
    before = tree(*dtypes)
    after = train(jaxfed.fedavg(distance, lrate=0.1, batch_size=None, steps=2, weights="uniform"), before).params
    assert_same_types(after, before)
    assert_at_the_closed_form(after, before)


@pytest.mark.usefixtures("x64")
def test_float32_and_float64_live_side_by_side():
    before = tree("float64", "float32")
    data_type_of_rows_is_wider = jaxfed.fedavg(distance64, lrate=0.1, batch_size=None, steps=2, weights="uniform")
    after = train(data_type_of_rows_is_wider, before).params
    assert_same_types(after, before)
    assert_at_the_closed_form(after, before)


def distance64(params, batch, key):
    return distance(params, {"t": batch["t"].astype(jnp.float64)}, key)


STATEFUL = Optimizer(0.1, modules=["adam", "momentum"], regularizers=["fedprox"], w_decay=0.01, keep_state=True)
EVERYWHERE = {
    "adam": jaxfed.fedadam(distance, lrate=STATEFUL, batch_size=1, server_lrate=0.1),
    "scaffold I": jaxfed.scaffold(distance, option="I", lrate=0.1, batch_size=1),
    "adaalter": jaxfed.adaalter(distance, lrate=0.1, batch_size=1),
    "gradient masked": Algorithm(LocalTraining(distance, 0.1, Epochs(1)), 1.0, jaxfed.GradientMaskedMean()),
}


@pytest.mark.parametrize("algorithm", EVERYWHERE.values(), ids=EVERYWHERE)
def test_no_state_changes_its_type_on_the_way(algorithm):
    before = tree("bfloat16", "float32", "float16")
    data = jaxfed.FederatedData.from_arrays({"t": np.ones(4, np.float32)}, [0, 0, 1, 2])
    simulation = Simulation(algorithm, data, lanes=2)
    start = simulation.init(before, key=KEY)
    after, _ = simulation.run(start, rounds=2)
    assert_same_types(after, start)
    assert_same_types(after.params, before)
    assert all(np.isfinite(np.asarray(x, np.float64)).all() for x in jax.tree.leaves(after.params))


# Statistics: a running mean of the inputs, and a count of batches.


def init_running(key):
    return jnp.zeros(()), {"mean": jnp.zeros(2, jnp.bfloat16), "batches": jnp.array(7, jnp.int32), "updates": jnp.zeros(())}


def running_loss(params, stats, batch, key):
    mean = jnp.where(batch["mask"][:, None], batch["x"], 0).sum(0) / batch["mask"].sum()
    new = {
        "mean": mean.astype(stats["mean"].dtype),
        "batches": stats["batches"] + 1,
        "updates": stats["updates"] + 1,
    }
    return jnp.broadcast_to(params, batch["mask"].shape), new


def running_predict(params, stats, batch):
    return batch["x"] - stats["mean"][None]


def running_metrics(params, stats, batch):
    return {"loss": jnp.square(running_predict(params, stats, batch)).sum(1)}


RUNNING = Model(init_running, running_loss, running_predict, running_metrics)


def with_statistics(weights, faulty=None):
    """Clients of 1, 3 and 4 rows, whose inputs are 1, 2 and 4 throughout."""
    clients = np.repeat(np.arange(3), [1, 3, 4])
    x = np.array([[1.0, -1.0], [2.0, -2.0], [4.0, -4.0]], np.float32)[clients]
    data = jaxfed.FederatedData.from_arrays({"x": x}, clients)
    if faulty is not None:
        data._arrays["x"] = np.where(clients[:, None] == faulty, np.float32(np.nan), x)
    algorithm = jaxfed.fedavg(RUNNING, lrate=0.1, batch_size=2, weights=weights, server_lrate=0.5)
    simulation = Simulation(algorithm, data, lanes=2)
    return simulation.run(simulation.init(key=KEY), rounds=1)[0]


@pytest.mark.parametrize(("weights", "shares"), [("examples", [1, 3, 4]), ("steps", [1, 2, 2]), ("uniform", [1, 1, 1])])
def test_statistics_are_averaged_by_the_weights_of_the_aggregator(weights, shares):
    stats = with_statistics(weights).stats
    mean = np.average([1, 2, 4], weights=shares)
    np.testing.assert_allclose(np.asarray(stats["mean"], np.float32), [mean, -mean], rtol=2**-8)
    assert float(stats["updates"]) == pytest.approx(np.average([1, 2, 2], weights=shares), rel=1e-6)
    assert stats["mean"].dtype == jnp.bfloat16


def test_integer_statistics_stay_the_servers():
    stats = with_statistics("examples").stats
    assert int(stats["batches"]) == 7
    assert stats["batches"].dtype == jnp.int32


def test_statistics_that_are_not_finite_leave_their_client_out():
    state = with_statistics("examples", faulty=1)
    np.testing.assert_allclose(np.asarray(state.stats["mean"], np.float32), [3.4, -3.4], rtol=2**-8)
    assert state.seen.tolist() == [True, False, True]
    assert float(state.params) == pytest.approx(-0.5 * 0.1 * (1 * 1 + 4 * 2) / 5, rel=1e-6)
