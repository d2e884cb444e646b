"""Where runs end, against closed forms: f_i(x) = a_i / 2 (x - b_i)^2 with a = (1, 10), b = (0, 1), full batches, a rate of 0.05.

How many steps a client takes is data here (a cohort's ``work``), so that most cases share a compiled program.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine.oracle import Planned

import jaxfed
from jaxfed import Optimizer, fedavg, fedprox, scaffold

CURVATURE, CENTER, RATE = np.array([1.0, 10.0]), np.array([0.0, 1.0]), 0.05
OPTIMUM = 10 / 11
FULL = {"lrate": RATE, "batch_size": None, "steps": 1, "weights": "uniform"}
pytestmark = pytest.mark.usefixtures("x64")


def quadratic(params, batch, key):
    return 0.5 * batch["a"] * jnp.square(params - batch["b"])


def linear(params, batch, key):
    return batch["g"] * params


def final_state(algorithm, data, rounds, **options):
    simulation = jaxfed.Simulation(algorithm, data, chunk=50, **options)
    return simulation.run(simulation.init(jnp.zeros(()), key=jax.random.key(0)), rounds=rounds)[0]


def end(algorithm, rounds, steps, sizes=(1, 1)):
    """Where the two clients' run ends when they take ``steps`` steps, or passes over ``sizes`` copies of their one row."""
    clients = np.repeat(np.arange(2), sizes)
    data = jaxfed.FederatedData.from_arrays({"a": CURVATURE[clients], "b": CENTER[clients]}, clients)
    selector = Planned([[0, 1]], [np.broadcast_to(steps, 2)])
    return float(final_state(algorithm, data, rounds, selector=selector).params)


def contraction(steps, mu=0.0):
    """How far ``steps`` steps take ``x`` to the center of each client's local problem, as a factor of ``x - b_i``."""
    pull = CURVATURE + mu
    return (1 - (1 - RATE * pull) ** np.array(steps)) * CURVATURE / pull


def balance(factors):
    return (factors * CENTER).sum() / factors.sum()


def test_the_closed_forms_give_the_published_numbers():
    published = {OPTIMUM: 0.909090909091, balance(contraction(10)): 0.713442169685}
    published |= {balance(contraction([10, 2])): 0.651458407346, balance(contraction(10, mu=1.0)): 0.736187894143}
    for ours, theirs in published.items():
        assert ours == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 10, (10, 2)])
def test_fedavg_ends_where_local_steps_balance(steps):
    assert end(fedavg(quadratic, **FULL), 200, steps) == pytest.approx(balance(contraction(steps)), abs=1e-9)


def test_fedsgd_ends_at_the_optimum():
    assert end(fedavg(quadratic, **FULL), 200, 1) == pytest.approx(OPTIMUM, abs=1e-9)


@pytest.mark.parametrize("weights", ["examples", "steps"])
def test_fedavg_in_batches_of_one_weighs_by_examples_and_steps(weights):
    algorithm = fedavg(quadratic, lrate=RATE, batch_size=1, weights=weights)
    factors = np.array([10, 2]) * contraction([10, 2])
    assert end(algorithm, 100, 1, sizes=[10, 2]) == pytest.approx(balance(factors), abs=1e-9)


def test_examples_and_steps_are_different_weights():
    algorithm = fedavg(quadratic, lrate=RATE, batch_size=1, weights="examples")
    by_steps = np.array([20, 2]) * contraction([20, 2])
    assert abs(end(algorithm, 100, (2, 1), sizes=[10, 2]) - balance(by_steps)) > 0.01


@pytest.mark.parametrize("steps", [10, (10, 2)])
def test_fedprox_ends_where_its_steps_balance(steps):
    algorithm = fedprox(quadratic, mu=1.0, **FULL)
    assert end(algorithm, 100, steps) == pytest.approx(balance(contraction(steps, mu=1.0)), abs=1e-9)


def test_fedprox_with_exact_local_solutions():
    """400 steps leave 5e-19 of the way; then the weights of the balance are a / (a + mu)."""
    assert end(fedprox(quadratic, mu=1.0, **FULL), 40, 400) == pytest.approx(0.645161290323, abs=1e-9)


def test_unequal_steps_of_small_rates_lead_to_another_objective():
    """To sum p K a b / sum p K a; the rest is of the order of the rate, halved with it."""
    rests = np.array([end(fedavg(quadratic, **(FULL | {"lrate": r})), 3000, (10, 2)) for r in (1e-3, 5e-4)]) - 2 / 3
    assert np.abs(rests[1]) < 3e-3
    assert rests[0] / rests[1] == pytest.approx(2, rel=0.05)


SERVERS = {
    "half": 0.5,
    "momentum": Optimizer(0.3, modules=[("momentum", {"beta": 0.5})]),
    "adam": Optimizer(0.1, modules=[("adam", {"eps": 0.1})]),
    "adam of the paper": Optimizer(0.1, modules=[("adam:paper", {"tau": 0.1})]),
}


@pytest.mark.parametrize("server", SERVERS.values(), ids=SERVERS)
def test_the_server_optimizer_does_not_move_fedavg(server):
    algorithm = fedavg(quadratic, server_lrate=server, **FULL)
    assert end(algorithm, 1500, 10) == pytest.approx(balance(contraction(10)), abs=1e-9)


@pytest.mark.parametrize("option", ["I", "II"])
@pytest.mark.parametrize("steps", [1, 2, 10, (10, 2), (3, 4)])
def test_scaffold_ends_at_the_optimum(option, steps):
    assert end(scaffold(quadratic, option=option, **FULL), 800, steps) == pytest.approx(OPTIMUM, abs=1e-9)


RAGGED = np.array([1, 4, 2, 7, 3])


def ragged():
    """Five clients with rows of their own, and a sixth without any."""
    rng = np.random.default_rng(0)
    arrays = {"a": rng.uniform(0.5, 8.0, RAGGED.sum()), "b": rng.normal(size=RAGGED.sum())}
    return jaxfed.FederatedData.from_arrays(arrays, np.repeat(np.arange(5), RAGGED), num_clients=6)


def optimum(weights):
    """The minimum of ``sum_i p_i mean_j f_ij``."""
    arrays, share = ragged().arrays, np.repeat(weights / RAGGED, RAGGED)
    return (share * arrays["a"] * arrays["b"]).sum() / (share * arrays["a"]).sum()


@pytest.mark.parametrize(
    ("weights", "option", "cohort"),
    [("examples", "II", 2), ("examples", "I", None), ("uniform", "II", 2), ("steps", "II", None)],
)
def test_scaffold_on_ragged_clients_ends_where_the_weights_say(weights, option, cohort):
    algorithm = scaffold(quadratic, option=option, lrate=RATE, batch_size=None, steps=5, weights=weights)
    found = float(final_state(algorithm, ragged(), 1500, cohort_size=cohort).params)
    assert found == pytest.approx(optimum(RAGGED if weights == "examples" else np.ones(5)), abs=1e-9)


def test_the_two_optima_of_ragged_clients_differ():
    assert abs(optimum(RAGGED) - optimum(np.ones(5))) > 0.01


PAIRS = Planned([[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]])


@pytest.mark.parametrize(("denominator", "controls"), [("population", [0.3, 1.0]), ("seen", [1.5, 2.5])])
def test_the_control_of_scaffold_while_few_were_seen(denominator, controls):
    data = jaxfed.FederatedData.from_arrays({"g": np.arange(1.0, 11.0)}, np.arange(10))
    algorithm = scaffold(linear, denominator=denominator, **FULL)
    simulation = jaxfed.Simulation(algorithm, data, selector=PAIRS)
    state, found = simulation.init(jnp.zeros(()), key=jax.random.key(0)), []
    for rounds in (1, 1, 5):
        state, _ = simulation.run(state, rounds=rounds)
        found.append(float(state.server.modules[0].control))
    assert found == pytest.approx([*controls, 5.5], abs=1e-12)
