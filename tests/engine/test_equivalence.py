"""The compiled round equals a plain loop over clients, for any lanes, on clients of unequal sizes."""

import jax
import numpy as np
import pytest
from engine.oracle import SIZES, Planned, Rules, flat, loss_and_gradient, plan, softmax_data, softmax_loss, softmax_params, train

import jaxfed
from jaxfed import Algorithm, Epochs, GradientMaskedMean, LocalTraining, Optimizer, Simulation

LOCAL = {"lrate": 0.1, "batch_size": 4, "epochs": 2}
STEPS = 2 * -(-SIZES // 4)
KEEP = Optimizer(0.1, modules=[("momentum", {"beta": 0.5})], keep_state=True)
MASKED_CLIENT = LocalTraining(softmax_loss, KEEP.replace(keep_state=False), Epochs(4, epochs=2))
MASKED = Algorithm(MASKED_CLIENT, 1.0, GradientMaskedMean("steps", 0.4))
SERVER_MOMENTUM = Optimizer(0.5, modules=["momentum"])

CASES = {
    "fedavg": (jaxfed.fedavg(softmax_loss, **LOCAL), Rules()),
    "fedprox by steps": (jaxfed.fedprox(softmax_loss, mu=0.5, weights="steps", **LOCAL), Rules(mu=0.5, by="steps")),
    "fedadam": (
        jaxfed.fedadam(softmax_loss, weights="uniform", **LOCAL),
        Rules(server="adam", server_lrate=0.01, by="uniform"),
    ),
    "fedyogi": (jaxfed.fedyogi(softmax_loss, **LOCAL), Rules(server="yogi", server_lrate=0.01)),
    "fedadagrad": (jaxfed.fedadagrad(softmax_loss, **LOCAL), Rules(server="adagrad", server_lrate=0.1)),
    "fedavgm": (jaxfed.fedavgm(softmax_loss, **LOCAL), Rules(server="momentum")),
    "scaffold": (jaxfed.scaffold(softmax_loss, **LOCAL), Rules(scaffold="II")),
    "scaffold I": (jaxfed.scaffold(softmax_loss, option="I", weights="uniform", **LOCAL), Rules(scaffold="I", by="uniform")),
    "momentum kept": (jaxfed.fedavg(softmax_loss, **LOCAL | {"lrate": KEEP}), Rules(beta=0.5, keep_state=True)),
    "gradient masked": (MASKED, Rules(beta=0.5, by="steps", threshold=0.4)),
    "adaalter": (
        jaxfed.adaalter(softmax_loss, eps=0.7, server_lrate=SERVER_MOMENTUM, **LOCAL),
        Rules(adaalter=0.7, server="momentum", server_lrate=0.5),
    ),
}
WEIGHT = {"examples": SIZES.sum(), "steps": STEPS.sum(), "uniform": (SIZES > 0).sum()}


def both(case, lanes, dtype=np.float64, rounds=4, **options):
    """The library's weights by round ``[R, P]`` and losses by client, and the loop's."""
    algorithm, rules = CASES[case]
    data, params = softmax_data(dtype=dtype), softmax_params(dtype)
    simulation = Simulation(algorithm, data, lanes=lanes, **options)
    state = simulation.init(params, key=jax.random.key(5))
    theirs = train(rules, data, plan(simulation, state, rounds), params, WEIGHT[rules.by])
    pairs = list(simulation.rounds(state, rounds=rounds))
    losses = [dict(zip(r.clients[r.counted].tolist(), r.metrics["loss"][r.counted])) for _, r in pairs]
    return (np.array([flat(s.params) for s, _ in pairs]), losses), theirs


def assert_same(ours, theirs, tolerance):
    np.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=tolerance)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert mine == pytest.approx(other, abs=tolerance)


LANES = [(case, 3) for case in CASES] + [(case, lanes) for case in ("fedavg", "scaffold", "momentum kept") for lanes in (1, 7)]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("case", "lanes"), LANES)
def test_seven_of_nine_clients_equal_the_loop(case, lanes):
    assert_same(*both(case, lanes, cohort_size=7), 1e-12)


@pytest.mark.parametrize("case", ["fedavg", "scaffold"])
def test_float32_is_near_the_loop(case):
    assert_same(*both(case, 3, np.float32, cohort_size=7), 5e-6)


COHORTS = {
    "one client, which may hold one row or none": Planned([[1], [2], [3], [1], [8]]),
    "stragglers and clients without work": Planned([[3, 0, 5, 1], [0, 3, 4, 7]], [[0.5, 0.0, 2.0, 1.0], [1.0, 0.1, 0.75, 1.0]]),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("selector", COHORTS.values(), ids=COHORTS)
def test_other_cohorts_equal_the_loop(selector):
    assert_same(*both("scaffold", 3, rounds=5, selector=selector), 1e-12)


def final(algorithm, data=None, cohort_size=None):
    """The weights after three rounds."""
    simulation = Simulation(algorithm, softmax_data() if data is None else data, cohort_size, lanes=3)
    state, _ = simulation.run(simulation.init(softmax_params(), key=jax.random.key(2)), rounds=3)
    return flat(state.params)


@pytest.mark.usefixtures("x64")
def test_the_numbering_of_clients_does_not_matter():
    algorithm, data = jaxfed.scaffold(softmax_loss, lrate=0.1, batch_size=None, epochs=2), softmax_data()
    shuffled = data.select(np.random.default_rng(3).permutation(9))
    np.testing.assert_allclose(final(algorithm, data), final(algorithm, shuffled), rtol=0, atol=1e-12)


def draw_loss(params, batch, key):
    return jax.random.uniform(key) + 0.0 * batch["x"][:, 0] + 0.0 * params["bias"].sum()


def drawn(lanes):
    """What each client drew on average in a round's steps, ``[R, C]``."""
    simulation = Simulation(jaxfed.fedavg(draw_loss, **LOCAL), softmax_data([3, 9, 1, 5], np.float32), lanes=lanes)
    _, history = simulation.run(simulation.init(softmax_params(np.float32), key=jax.random.key(0)), rounds=5)
    return np.array([report.metrics["loss"] for report in history])


def test_draws_are_the_same_for_any_lanes_and_differ_between_clients_and_rounds():
    one, three = drawn(1), drawn(3)
    assert (one == three).all()
    assert len(set(one.ravel().tolist())) == one.size == 20


# Identities between algorithms.


@pytest.mark.usefixtures("x64")
def test_one_full_batch_step_of_everyone_is_gradient_descent():
    algorithm, data, theta = jaxfed.fedavg(softmax_loss, lrate=0.5, batch_size=None), softmax_data(), flat(softmax_params())
    for _ in range(3):
        theta = theta - 0.5 * loss_and_gradient(theta, data.arrays["x"], data.arrays["y"])[1]
    np.testing.assert_allclose(final(algorithm), theta, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_one_client_is_centralised_sgd():
    algorithm, data, theta = jaxfed.fedavg(softmax_loss, lrate=0.5, batch_size=4), softmax_data([10]), flat(softmax_params())
    simulation = Simulation(algorithm, data)
    rounds = plan(simulation, simulation.init(softmax_params(), key=jax.random.key(2)), rounds=3)
    for index in (rows for [(_, steps)] in rounds for rows in steps):
        theta = theta - 0.5 * loss_and_gradient(theta, data.arrays["x"][index], data.arrays["y"][index])[1]
    np.testing.assert_allclose(final(algorithm, data), theta, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_fedprox_without_a_pull_is_fedavg_bit_for_bit():
    fedavg, fedprox = jaxfed.fedavg(softmax_loss, **LOCAL), jaxfed.fedprox(softmax_loss, mu=0.0, **LOCAL)
    assert (final(fedavg, cohort_size=7) == final(fedprox, cohort_size=7)).all()


@pytest.mark.usefixtures("x64")
def test_scaffold_with_identical_clients_is_fedavg():
    rows = softmax_data([6]).arrays
    same = jaxfed.FederatedData.from_arrays({key: np.tile(x.T, 4).T for key, x in rows.items()}, np.repeat(np.arange(4), 6))
    options = {"lrate": 0.3, "batch_size": None, "steps": 5}
    fedavg, scaffold = (final(recipe(softmax_loss, **options), same) for recipe in (jaxfed.fedavg, jaxfed.scaffold))
    np.testing.assert_allclose(scaffold, fedavg, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_server_sgd_of_rate_one_without_momentum_is_fedavg():
    plain, momentum = jaxfed.fedavg(softmax_loss, **LOCAL), jaxfed.fedavgm(softmax_loss, momentum=0.0, **LOCAL)
    assert jaxfed.fedavg(softmax_loss, server_lrate=Optimizer(1.0), **LOCAL) == plain
    np.testing.assert_allclose(final(momentum, cohort_size=7), final(plain, cohort_size=7), rtol=0, atol=1e-12)
