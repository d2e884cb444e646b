"""Mime and MimeLite against the paper's table in NumPy, their identities, and Mime's fixed point."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corrected.loops import OPTIMUM, OPTIONS, RATE, SIZES, START, clients, data, descend, end, gradient, loss, parabola, run

import jaxfed
from jaxfed import (
    SVRG,
    Algorithm,
    FullGradient,
    LocalTraining,
    Mean,
    MimeClient,
    MimeServer,
    Optimizer,
    RoundStart,
    Steps,
    fedavg,
)
from jaxfed.algorithms_corrected import mime, mimelite


class Heavy:
    """The paper's SGD with momentum: U = V = (1 - beta) g + beta m."""

    base = ("ewma", {"beta": 0.8})
    first = (np.zeros(2),)

    def step(g, m):
        return 0.2 * g + 0.8 * m

    def track(g, m):
        return (0.2 * g + 0.8 * m,)


class Adaptive:
    """The paper's Adam: U = ((1 - beta_1) g + beta_1 m) / (sqrt(v) + eps), V the two running means."""

    base = ("mime-adam", {"beta_1": 0.8, "beta_2": 0.7, "eps": 0.01, "init_v": 0.5})
    first = (np.zeros(2), np.full(2, 0.5))

    def step(g, m, v):
        return (0.2 * g + 0.8 * m) / (np.sqrt(v) + 0.01)

    def track(g, m, v):
        return 0.2 * g + 0.8 * m, 0.3 * g**2 + 0.7 * v


def slow(cohorts, weights, base, corrected):
    """Karimireddy et al. 2021, algorithm 1; ``weights`` [N] are ones in the paper."""
    w, statistics, path = START, base.first, []
    for cohort in cohorts:
        p = weights[cohort] / weights[cohort].sum()
        mean = p @ [gradient(w, *clients()[i]) for i in cohort]

        def direction(y, *batch, w=w, mean=mean, statistics=statistics):
            g = gradient(y, *batch) - gradient(w, *batch) + mean if corrected else gradient(y, *batch)
            return base.step(g, *statistics)

        w = p @ [descend(w, *clients()[i], direction)[0] for i in cohort]
        statistics = base.track(mean, *statistics)
        path.append(w)
    return np.array(path)


@pytest.mark.parametrize("recipe", [mime, mimelite])
@pytest.mark.parametrize(("base", "weights", "lanes"), [(Heavy, "uniform", 1), (Adaptive, "examples", 3)])
def test_mime_is_the_papers(lanes, recipe, base, weights):
    path, cohorts = run(recipe(loss, base=base.base, weights=weights, **OPTIONS), lanes)
    by = np.ones(4) if weights == "uniform" else SIZES
    np.testing.assert_allclose(path, slow(cohorts, by, base, recipe is mime), rtol=1e-11)


@pytest.mark.parametrize(("base", "sizes"), [("ewma", (1, 1)), ("ewma", (10, 2)), ("momentum", (10, 10))])
def test_fixed_point_is_the_optimum_for_any_steps(base, sizes):
    algorithm = mime(parabola, base=base, lrate=0.005, batch_size=1, weights="uniform")
    assert float(end(algorithm, 2000, sizes).params) == pytest.approx(OPTIMUM, abs=1e-9)


def test_mimelite_without_memory_is_fedavg():
    options = {"lrate": 0.05, "batch_size": 1, "weights": "uniform"}
    state = end(mimelite(parabola, base=("ewma", {"beta": 0}), **options), 200, (10, 10))
    assert float(state.params) == pytest.approx(0.713442169685, abs=1e-9)


def test_mime_with_one_full_batch_is_gradient_descent():
    algorithm = mime(loss, base=("ewma", {"beta": 0}), lrate=RATE, batch_size=None)
    simulation, w = jaxfed.Simulation(algorithm, data(), lanes=3), START
    x, y = (np.concatenate(parts) for parts in zip(*clients()))
    for state, _ in simulation.rounds(simulation.init(START, key=jax.random.key(0)), rounds=3):
        w = w - RATE * gradient(w, x, y)
        np.testing.assert_allclose(state.params, w, rtol=1e-12)


def test_library_adam_is_applied_as_its_own_step():
    """As in FedJAX: each local step is Adam's from the server's state, the square in hand included; t does not advance."""
    w = jnp.array([1.0, -2.0])
    adam = jaxfed.Adam()
    server = MimeServer(adam)
    state = server.receive(server.init(w), jnp.array([0.5, 0.1]), None)
    local = MimeClient().start_round((), RoundStart(w, aux=server.send(state), full_gradient=lambda p: 3 * p))
    first, local = MimeClient().update(jnp.array([1.0, 1.0]), local)
    again, local = MimeClient().update(jnp.array([1.0, 1.0]), local)
    np.testing.assert_array_equal(first, adam.update(jnp.array([1.0, 1.0]), state)[0])
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(MimeClient().end_round(local, w, w)[1], 3 * w)


def test_svrg_needs_a_survey():
    client = LocalTraining(parabola, 0.1, Steps(1), SVRG())
    with pytest.raises(ValueError, match="needs a first pass over the cohort"):
        Algorithm(client, 1.0, Mean())


def test_a_survey_asks_plain_local_training():
    training = LocalTraining(parabola, 0.1, Steps(1))
    with pytest.raises(TypeError, match="expected LocalTraining, got APFL"):
        Algorithm(jaxfed.APFL(training), 1.0, Mean(), FullGradient())
    # Fine-tuning trains the global model in that way.
    assert Algorithm(jaxfed.Finetuned(training), 1.0, Mean(), FullGradient()).survey == FullGradient()


def test_base_is_no_half_of_a_pair():
    with pytest.raises(ValueError, match="exchanges nothing, got 'scaffold-server'"):
        MimeServer("scaffold-server")


def test_both_halves_are_needed():
    with pytest.raises(ValueError, match="'mime'"):
        fedavg(parabola, lrate=Optimizer(0.1, modules=["mime-client"]), batch_size=1)


def test_other_modules_beside_it_warn():
    with pytest.warns(UserWarning, match="another module beside it"):
        mimelite(parabola, lrate=Optimizer(0.1, modules=["momentum"]), batch_size=1)
