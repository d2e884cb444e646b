"""The user's side of a simulation: what it takes, refuses, reports, and evaluates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfed
from jaxfed import Model, Simulation
from jaxfed.engine.lanes import default_lanes

KEY = jax.random.key(0)


def loss(params, batch, key):
    return jnp.square(jnp.dot(batch["x"], params["w"]) - batch["y"])


def federation(seed=0, clients=6, rows=30):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 2)).astype(np.float32)
    return jaxfed.FederatedData.from_arrays({"x": x, "y": x @ np.float32([1, -2])}, np.arange(rows) % clients)


ALGORITHM = jaxfed.fedavg(loss, lrate=0.1, batch_size=5)
PARAMS = {"w": jnp.zeros(2)}


@pytest.fixture(scope="module")
def simulation():
    return Simulation(ALGORITHM, federation(), 4, lanes=2, chunk=3)


def test_training_reaches_the_weights_that_made_the_data(simulation):
    state, history = simulation.run(simulation.init(PARAMS, key=KEY), rounds=100)
    np.testing.assert_allclose(state.params["w"], [1, -2], atol=1e-3)
    assert history["loss"][-1] < 1e-4 < history["loss"][0]
    assert simulation.evaluate(state).metrics["loss"] < 1e-5


def test_a_report_of_every_round(simulation):
    state, history = simulation.run(simulation.init(PARAMS, key=KEY), rounds=5)
    assert [r.round for r in history] == [1, 2, 3, 4, 5] == list(range(1, int(state.round) + 1))
    for r in history:
        assert len(set(r.clients.tolist())) == 4
        assert r.counted.all()
        assert r.metrics["examples"].tolist() == [5.0] * 4
        assert r.metrics["steps"].tolist() == [1.0] * 4
        assert r.update_norm > 0
    assert all(isinstance(value, (int, float, list)) for row in history.rows() for value in row.values())


@pytest.mark.parametrize(("start", "rounds", "every", "evaluated"), [(0, 7, 3, [3, 6, 7]), (2, 5, 3, [3, 6, 7]), (0, 4, 0, [])])
def test_evaluation_happens_at_multiples_and_at_the_end(simulation, start, rounds, every, evaluated):
    state, _ = simulation.run(simulation.init(PARAMS, key=KEY), rounds=start)
    after, history = simulation.run(state, rounds=rounds, eval_every=every)
    assert [r.round for r in history if r.evaluation is not None] == evaluated
    if evaluated:
        assert history[-1].evaluation.metrics == simulation.evaluate(after).metrics


def test_evaluation_does_not_change_a_run(simulation):
    state = simulation.init(PARAMS, key=KEY)
    plain, _ = simulation.run(state, rounds=4)
    evaluated, _ = simulation.run(state, rounds=4, eval_every=1, eval_data=federation(seed=1, clients=3))
    np.testing.assert_array_equal(plain.params["w"], evaluated.params["w"])


def test_the_key_decides_everything(simulation):
    def run(seed):
        return simulation.run(simulation.init(PARAMS, key=jax.random.key(seed)), rounds=2)[0].params["w"].tolist()

    assert run(0) == run(0) != run(1)


def test_weights_are_copied_on_the_way_in_and_out(simulation):
    mine = np.zeros(2, np.float32)
    state = simulation.init({"w": mine}, key=KEY)
    mine[:] = 7
    assert state.params["w"].tolist() == [0, 0]
    given = {"w": jnp.zeros(2)}
    after, _ = simulation.run(simulation.init(given, key=KEY), rounds=1)
    assert given["w"].tolist() == [0, 0] != after.params["w"].tolist()


def make_model():
    def init(key):
        return {"w": jax.random.normal(key, (2,))}, {"seen": jnp.zeros(())}

    def stateful_loss(params, stats, batch, key):
        return loss(params, batch, key), {"seen": stats["seen"] + 1}

    def predict(params, stats, batch):
        return jnp.dot(batch["x"], params["w"])

    def metrics(params, stats, batch):
        return {"loss": loss(params, batch, None)}

    return Model(init, stateful_loss, predict, metrics)


def test_a_model_brings_its_first_weights_and_statistics():
    simulation = Simulation(jaxfed.fedavg(make_model(), lrate=0.1, batch_size=5), federation(), lanes=3)
    one, same, other = (simulation.init(key=jax.random.key(seed)) for seed in (0, 0, 1))
    assert one.params["w"].tolist() == same.params["w"].tolist() != other.params["w"].tolist()
    assert one.stats == {"seen": 0}
    assert simulation.run(one, rounds=2)[0].stats == {"seen": 2}
    given = simulation.init(PARAMS, key=KEY, stats={"seen": jnp.array(5.0)})
    assert float(simulation.run(given, rounds=1)[0].stats["seen"]) == pytest.approx(6)


@pytest.mark.parametrize(
    ("weights", "cohort", "lanes"), [(2, 6, 6), (2, 50, 10), (19_999, 50, 10), (20_000, 50, 1), (10**6, 3, 1)]
)
def test_default_lanes_on_a_cpu(weights, cohort, lanes):
    if jax.default_backend() == "cpu":
        assert default_lanes({"w": np.zeros(weights, np.float32)}, cohort) == lanes


def test_lanes_are_at_most_the_cohort():
    assert Simulation(ALGORITHM, federation(), 4, lanes=100).lanes(PARAMS) == 4
    assert Simulation(ALGORITHM, federation(), 4, lanes=3).lanes(PARAMS) == 3
    assert Simulation(ALGORITHM, federation(), 4).lanes(PARAMS) == 4


MAKE = [
    (lambda: Simulation(loss, federation()), TypeError, r"algorithm: expected Algorithm, got .* Use a recipe such as fedavg"),
    (lambda: Simulation(ALGORITHM, {"x": 1}), TypeError, "data: expected FederatedData, got .* Use FederatedData.from_arrays"),
    (lambda: Simulation(ALGORITHM, federation(), 7), ValueError, "at most the population of 6 clients, got 7"),
    (lambda: Simulation(ALGORITHM, federation(), lanes=0), ValueError, "lanes: expected an integer at least 1, got 0"),
    (lambda: Simulation(ALGORITHM, federation(), chunk=0), ValueError, "chunk: expected an integer at least 1, got 0"),
    (lambda: Simulation(ALGORITHM, federation(), lanes=2.5), TypeError, "lanes: expected an integer, got 2.5"),
    (lambda: Simulation(ALGORITHM, federation().split_by(np.ones(30, bool))[0]), ValueError, "at least one row, got none"),
]


@pytest.mark.parametrize(("make", "error", "text"), MAKE)
def test_bad_simulations_are_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


INIT = [
    (PARAMS, 0, TypeError, r"key: expected one PRNG key, got 0 \(int\). Make it with jax.random.key"),
    (PARAMS, jax.random.PRNGKey(0), TypeError, "key: expected one PRNG key"),
    (PARAMS, jax.random.split(jax.random.key(5)), TypeError, "key: expected one PRNG key"),
    (None, KEY, ValueError, "is a plain loss without initial weights; pass params to init"),
    ({}, KEY, ValueError, "params: expected a tree with at least one array, got none"),
    ({"w": np.array([1, 2])}, KEY, TypeError, "params, leaf w: expected floating numbers"),
    ({"w": {"deep": np.array([True])}}, KEY, TypeError, "params, leaf w/deep: expected floating numbers"),
    ({"w": np.array([1.0, np.nan])}, KEY, ValueError, "params, leaf w: expected finite numbers, got NaN or inf"),
    ({"w": "zeros"}, KEY, TypeError, "params, leaf w: expected floating numbers, got 'zeros'"),
    ({"w": 1 + 2j}, KEY, TypeError, "params, leaf w: expected floating numbers"),
]


@pytest.mark.parametrize(("params", "key", "error", "text"), INIT)
def test_bad_first_weights_and_keys_are_refused(simulation, params, key, error, text):
    with pytest.raises(error, match=text):
        simulation.init(params, key=key)


def test_bad_runs_are_refused(simulation):
    state = simulation.init(PARAMS, key=KEY)
    with pytest.raises(ValueError, match="rounds: expected an integer at least 0, got -1"):
        simulation.run(state, rounds=-1)
    with pytest.raises(ValueError, match="eval_every: expected an integer at least 0"):
        simulation.run(state, rounds=1, eval_every=-2)
    with pytest.raises(TypeError, match=r"state: expected RunState, got .* Make it with simulation\.init"):
        simulation.run(PARAMS, rounds=1)
    with pytest.raises(TypeError, match="data: expected FederatedData"):
        simulation.evaluate(state, {"x": 1})
    other = Simulation(ALGORITHM, federation(clients=5))
    with pytest.raises(ValueError, match="expected one of 5 clients, got one of 6"):
        other.run(state, rounds=1)


def mean_loss(params, batch, key):
    return loss(params, batch, key).mean()


def test_a_loss_that_is_not_per_example_is_refused():
    simulation = Simulation(jaxfed.fedavg(mean_loss, lrate=0.1, batch_size=5), federation())
    with pytest.raises(ValueError, match=r"values of shape \[B\] = \(5,\), got \(\). Return the loss of every example"):
        simulation.run(simulation.init(PARAMS, key=KEY), rounds=1)


@pytest.mark.parametrize("eval_data", [{"x": 1}, federation().split_by(np.ones(30, bool))[0]])
def test_bad_evaluation_data_are_refused_before_training(simulation, eval_data, monkeypatch):
    state = simulation.init(PARAMS, key=KEY)
    monkeypatch.setattr(simulation, "_advance", lambda *_: pytest.fail("trained"))
    with pytest.raises((TypeError, ValueError), match=r"FederatedData|at least one row"):
        simulation.run(state, rounds=3, eval_every=3, eval_data=eval_data)
