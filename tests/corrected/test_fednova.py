"""FedNova against the paper's formulas in NumPy, its fixed points, and its closed forms for momentum and proximal terms."""

import jax.numpy as jnp
import numpy as np
import pytest
from corrected.loops import OPTIMUM, OPTIONS, RATE, SIZES, START, clients, descend, end, gradient, loss, parabola, run

from jaxfed import FedNova, Optimizer, Upload, fedavg
from jaxfed.algorithms_corrected import fednova
from jaxfed.optimizer.rates import FromSchedule


def slow(cohorts, rate=RATE):
    """Wang et al. 2020: d_i = delta_i / a_i, tau = sum p_i a_i, w <- w - tau sum p_i d_i."""
    w, path = START, []
    for cohort in cohorts:
        p = SIZES[cohort] / SIZES[cohort].sum()
        ends = [descend(w, *clients()[i], rate=rate) for i in cohort]
        directions = np.array([(w - y) / steps for y, steps in ends])
        w = w - (p @ [steps for _, steps in ends]) * (p @ directions)
        path.append(w)
    return np.array(path)


@pytest.mark.parametrize("lanes", [1, 3])
def test_fednova_is_the_papers(lanes):
    path, cohorts = run(fednova(loss, **OPTIONS), lanes)
    np.testing.assert_allclose(path, slow(cohorts), rtol=1e-12)


def test_fixed_point_with_ten_and_two_steps():
    options = {"lrate": 0.05, "batch_size": 1, "weights": "uniform"}
    assert float(end(fednova(parabola, **options), 200, (10, 2)).params) == pytest.approx(0.903339524649, abs=1e-9)
    assert float(end(fedavg(parabola, **options), 200, (10, 2)).params) == pytest.approx(0.651458407346, abs=1e-9)


def test_small_rates_lead_to_the_optimum():
    """The rest is of the order of the rate: halved with it."""
    ends = [float(end(fednova(parabola, lrate=r, batch_size=1, weights="uniform"), 4000, (10, 2)).params) for r in (1e-3, 5e-4)]
    rests = OPTIMUM - np.array(ends)
    assert 0 < rests[1] < 1e-4
    assert rests[0] / rests[1] == pytest.approx(2, rel=0.05)


def test_equal_steps_are_fedavg():
    algorithm = fednova(parabola, lrate=0.05, batch_size=1, weights="uniform")
    assert float(end(algorithm, 200, (10, 10)).params) == pytest.approx(0.713442169685, abs=1e-9)


def reach(optimizer, steps):
    """``a_i``, in units of the learning rate."""
    metrics = {"examples": jnp.ones(()), "steps": jnp.asarray(steps, float), "loss": jnp.ones(())}
    aggregator, upload = FedNova("uniform", optimizer), Upload(jnp.ones(()), (), {}, metrics)
    return float(aggregator.prepare(upload, aggregator.send(aggregator.init(jnp.ones(()))))[1]) / RATE


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_reach_is_the_papers_norm(steps):
    """Its closed forms for local momentum rho and for a proximal term mu."""
    rho, mu = 0.9, 0.5
    momentum = (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
    prox = (1 - (1 - RATE * mu) ** steps) / (RATE * mu)
    assert reach(Optimizer(RATE), steps) == pytest.approx(steps, rel=1e-12)
    assert reach(Optimizer(RATE, modules=[("momentum", {"beta": rho})]), steps) == pytest.approx(momentum, rel=1e-12)
    assert reach(Optimizer(RATE, regularizers=[("fedprox", {"alpha": mu})]), steps) == pytest.approx(prox, rel=1e-12)


def slow_momentum(cohorts, rho=0.5):
    w, path = START, []
    for cohort in cohorts:
        p, ends, norms = SIZES[cohort] / SIZES[cohort].sum(), [], []
        for i in cohort:
            velocity = np.zeros(2)

            def heavy(w, x, y):
                nonlocal velocity
                velocity = rho * velocity + gradient(w, x, y)
                return velocity

            y, steps = descend(w, *clients()[i], heavy)
            ends.append(y)
            norms.append(sum((1 - rho ** (steps - k)) / (1 - rho) for k in range(steps)))
        w = w - (p @ norms) * (p @ ((w - np.array(ends)) / np.array(norms)[:, None]))
        path.append(w)
    return np.array(path)


@pytest.mark.parametrize("lanes", [1, 3])
def test_fednova_with_local_momentum(lanes):
    optimizer = Optimizer(RATE, modules=[("momentum", {"beta": 0.5})])
    path, cohorts = run(fednova(loss, **(OPTIONS | {"lrate": optimizer})), lanes)
    np.testing.assert_allclose(path, slow_momentum(cohorts), rtol=1e-12)


def rate_of(round):
    """0, 0.05, 0.04."""
    return 0.1 * round / (1.0 + round * round)


def slow_prox(cohorts, mu):
    """A reach of (1 - (1 - eta mu)^K) / mu, which is that of the round's own rate."""
    w, path = START, []
    for eta, cohort in zip(map(rate_of, range(3)), cohorts):
        p, anchor = SIZES[cohort] / SIZES[cohort].sum(), w
        ends = [descend(w, *clients()[i], lambda w, x, y, a=anchor: gradient(w, x, y) + mu * (w - a), eta) for i in cohort]
        norms = np.array([(1 - (1 - eta * mu) ** steps) / mu for _, steps in ends])
        if eta > 0:
            w = w - (p @ norms) * (p @ ((w - np.array([y for y, _ in ends])) / norms[:, None]))
        path.append(w)
    return np.array(path)


def test_the_reach_is_that_of_the_rounds_own_rate():
    """From the rate of round 0, which is 0 here, no weight would ever move."""
    optimizer = Optimizer(FromSchedule(rate_of, step_level=False), regularizers=[("fedprox", {"alpha": 5.0})])
    path, cohorts = run(fednova(loss, **(OPTIONS | {"lrate": optimizer})), 3)
    np.testing.assert_allclose(path, slow_prox(cohorts, 5.0), rtol=1e-12)
    assert np.abs(path[2] - path[0]).max() > 0.1


def loss_of_leaves(params, batch, key):
    return loss(jnp.stack([params["a"], params["b"]]), batch, key)


def test_leaves_with_rates_of_their_own_have_each_its_reach():
    algorithm = fednova(loss_of_leaves, **(OPTIONS | {"lrate": {"a": 0.1, "*": 0.02}}))
    path, cohorts = run(algorithm, 3, start=dict(zip("ab", START)))
    np.testing.assert_allclose(path, slow(cohorts, np.array([0.1, 0.02])), rtol=1e-12)


@pytest.mark.parametrize("options", [{"modules": ["momentum"], "keep_state": True}, {"modules": ["scaffold-client"]}])
def test_a_reach_that_steps_do_not_tell_is_refused(options):
    with pytest.raises(ValueError, match="steps alone do not tell how far it goes"):
        FedNova(optimizer=Optimizer(0.1, **options))
