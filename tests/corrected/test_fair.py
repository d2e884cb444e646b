"""q-FedAvg and agnostic averaging against the papers' formulas in NumPy, and their fixed points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corrected.loops import OPTIONS, RATE, SIZES, START, clients, data, descend, end, loss, mean_loss, parabola, run

import jaxfed
from jaxfed import Agnostic, Algorithm, Epochs, LocalTraining, QFair, fedavg
from jaxfed.algorithms_corrected import afl, qfedavg
from jaxfed.server.fair import climb_exponentiated, climb_projected

MIN_MAX = 0.759746926648
ONE = {"lrate": 0.05, "batch_size": None, "steps": 1, "weights": "uniform"}


def slow_fair(cohorts, q, weights):
    """Li et al. 2020, algorithm 2 with L = 1 / lr; ``weights`` [N] are ones there."""
    w, path = START, []
    for cohort in cohorts:
        top, bottom = np.zeros(2), 0.0
        for i in cohort:
            way, loss_before = (w - descend(w, *clients()[i])[0]) / RATE, mean_loss(w, *clients()[i])
            top = top + weights[i] * loss_before**q * way
            bottom += weights[i] * (q * loss_before ** (q - 1) * way @ way + loss_before**q / RATE)
        w = w - top / bottom
        path.append(w)
    return np.array(path)


@pytest.mark.parametrize(("q", "weights", "lanes"), [(0.5, "uniform", 1), (2.0, "uniform", 1), (2.0, "examples", 3)])
def test_qfedavg_is_the_papers(lanes, q, weights):
    path, cohorts = run(qfedavg(loss, q=q, weights=weights, **OPTIONS), lanes)
    np.testing.assert_allclose(path, slow_fair(cohorts, q, np.ones(4) if weights == "uniform" else SIZES), rtol=1e-11)


@pytest.mark.parametrize("weights", ["uniform", "examples"])
def test_q_of_zero_is_fedavg_with_the_same_weights_bit_for_bit(weights):
    fair, plain = (run(recipe(loss, weights=weights, **options), 1)[0] for recipe, options in variants())
    np.testing.assert_array_equal(fair, plain)


def variants():
    return [(qfedavg, OPTIONS | {"q": 0.0}), (fedavg, OPTIONS)]


MINIMA = {0.0: 0.909090909091, 1.0: 0.822744969637, 2.0: 0.799239991087, 5.0: 0.778329084881}


@pytest.mark.parametrize("q", MINIMA)
def test_one_full_step_ends_at_the_minimum_of_q_ffl(q):
    assert float(end(qfedavg(parabola, q=q, **ONE), 2000).params) == pytest.approx(MINIMA[q], abs=1e-9)


def test_more_local_steps_drift_less_with_smaller_rates():
    """With K = 10 the rest is of the order of the rate."""
    rates = (2e-3, 1e-3)
    ends = [float(end(qfedavg(parabola, q=1.0, lrate=r, batch_size=1, weights="uniform"), 6000, (10, 10)).params) for r in rates]
    rests = np.abs(np.array(ends) - MINIMA[1.0])
    assert 1e-5 < rests[1] < 2e-2
    assert rests[0] / rests[1] == pytest.approx(2, rel=0.1)


def test_losses_become_more_alike_with_q():
    """The spread of the clients' losses falls monotonically."""

    def spread(q):
        x = float(end(qfedavg(parabola, q=q, **ONE), 500).params)
        return abs(x**2 - 10 * (x - 1) ** 2) / 2

    spreads = [spread(q) for q in MINIMA]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] < spreads[0] / 3


def project(v, total=1.0):
    """The nearest point of the simplex, by bisection of the shift."""
    low, high = v.min() - total, v.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(v - middle, 0).sum() > total else (low, middle)
    return np.maximum(v - low, 0)


def slow_agnostic(cohorts, domain, domains, rate, ascent):
    w, shares, path = START, np.full(domains, 1 / domains), []
    for cohort in cohorts:
        ways, losses, seen = np.zeros((domains, 2)), np.zeros(domains), np.isin(np.arange(domains), domain[cohort])
        for d in np.flatnonzero(seen):
            own = [i for i in cohort if domain[i] == d]
            p = SIZES[own] / SIZES[own].sum()
            ways[d] = p @ [w - descend(w, *clients()[i])[0] for i in own]
            losses[d] = p @ [mean_loss(w, *clients()[i]) for i in own]
        mass = shares[seen].sum()
        # Where all who came are of domains without a share, the round moves nothing.
        update, new = (shares * seen) @ ways / mass if mass > 0 else 0, shares.copy()
        slopes = rate * losses[seen]
        raised = shares[seen] * np.exp(slopes)
        new[seen] = mass * raised / raised.sum() if ascent == "exponentiated" else project(shares[seen] + slopes, mass)
        w, shares = w - update, new
        path.append(w)
    return np.array(path)


@pytest.mark.parametrize(("ascent", "lanes"), [("exponentiated", 1), ("projected", 3)])
@pytest.mark.parametrize("domain", [(0, 1, 1, 0), (0, 1, 2, 3)])
def test_agnostic_is_the_papers(lanes, ascent, domain):
    """Two domains of two clients each; and each client its own domain, of which one is absent each round."""
    count = max(domain) + 1
    path, cohorts = run(afl(loss, domains=count, ascent_rate=0.3, ascent=ascent, **OPTIONS), lanes, {"domain": domain})
    np.testing.assert_allclose(path, slow_agnostic(cohorts, np.array(domain), count, 0.3, ascent), rtol=1e-11)


def test_a_client_of_no_known_domain_does_not_count():
    domain, known = np.array([0, 2, 1, -1]), np.array([0, 2])
    algorithm = afl(loss, domains=2, ascent_rate=0.3, **OPTIONS)
    path, cohorts = run(algorithm, 3, {"domain": domain})
    known_cohorts = [cohort[np.isin(cohort, known)] for cohort in cohorts]
    np.testing.assert_allclose(path, slow_agnostic(known_cohorts, domain, 2, 0.3, "exponentiated"), rtol=1e-11)
    simulation = jaxfed.Simulation(algorithm, data({"domain": domain}), lanes=3)
    _, history = simulation.run(simulation.init(START, key=jax.random.key(0)), rounds=1)
    assert history[0].excluded == [1, 3]


@pytest.mark.parametrize("ascent", ["exponentiated", "projected"])
@pytest.mark.parametrize("sizes", [(1, 1), (10, 2)])
def test_agnostic_ends_at_the_min_max(ascent, sizes):
    """With one weight, losses are equal at one place alone, whatever the local steps; the shares make up for those."""
    options = {"lrate": 0.02, "batch_size": 1, "weights": "uniform"}
    state = end(afl(parabola, ascent_rate=0.1, ascent=ascent, **options), 3000, sizes)
    assert float(state.params) == pytest.approx(MIN_MAX, abs=1e-9)
    if sizes == (1, 1):
        # l x = (1 - l) 10 (1 - x)
        odds = 10 * (1 - MIN_MAX) / MIN_MAX
        np.testing.assert_allclose(state.aggregator, [odds / (1 + odds), 1 / (1 + odds)], rtol=1e-8)


def test_a_share_that_underflows_rises_again():
    """In exact arithmetic e^-300 of a share is not nothing: once its loss is the higher one, the domain has all of it again."""
    both, shares = jnp.ones(2, bool), jnp.full(2, 0.5, jnp.float32)
    for slopes, winner in (([300.0, 0.0], 0), ([0.0, 300.0], 1), ([1e6, 0.0], 0), ([0.0, 1e6], 1)):
        shares = climb_exponentiated(shares, jnp.asarray(slopes, jnp.float32), both)
        assert float(shares[winner]) == pytest.approx(1)
        assert float(shares.sum()) == pytest.approx(1)


def test_projection_is_the_nearest_point():
    rng = np.random.default_rng(0)
    for _ in range(20):
        shares, slopes, seen = rng.dirichlet(np.ones(5)), rng.normal(size=5), rng.random(5) < 0.7
        seen[0] = True
        shares = np.where(seen, shares, 0)
        expected = project((shares + slopes)[seen], shares.sum())
        got = climb_projected(jnp.asarray(shares), jnp.asarray(slopes), jnp.asarray(seen))
        np.testing.assert_allclose(got[seen], expected, atol=1e-12)
        np.testing.assert_array_equal(got[~seen], 0)


@pytest.mark.parametrize("aggregator", [QFair(), Agnostic()])
def test_a_metric_that_nobody_measures_is_refused(aggregator):
    client = LocalTraining(parabola, 0.1, Epochs(1))
    with pytest.raises(ValueError, match=r"Build the client with measures=\['start_loss'"):
        Algorithm(client, 1.0, aggregator)


def test_data_without_domains_are_refused():
    simulation = jaxfed.Simulation(afl(loss, **OPTIONS), data())
    with pytest.raises(ValueError, match=r"the key 'domain', a number per row; got \['x', 'y'\]"):
        simulation.run(simulation.init(START, key=jax.random.key(0)), rounds=1)


def test_q_needs_a_rate_that_is_a_number():
    with pytest.raises(TypeError, match=r"QFair\.lrate: expected a number"):
        qfedavg(loss, lrate=("exponential-decay", {"base": 0.1, "rate": 0.9}), batch_size=1)


def test_the_start_loss_is_that_of_evaluation():
    simulation = jaxfed.Simulation(qfedavg(loss, **OPTIONS), data(), lanes=2)
    state = simulation.init(START, key=jax.random.key(0))
    _, history = simulation.run(state, rounds=1)
    measured = dict(zip(history[0].clients.tolist(), history[0].metrics["start_loss"]))
    for i, (x, y) in enumerate(clients()):
        assert measured[i] == pytest.approx(mean_loss(START, x, y), rel=1e-12)


def test_a_loss_of_zero_does_no_harm():
    zero = jnp.zeros(())
    upload = jaxfed.Upload(zero, (), {}, {"examples": zero + 1, "steps": zero + 1, "loss": zero, "start_loss": zero})
    for q in (0.0, 0.5, 3.0):
        way, curvature = QFair("uniform", q, 0.1).prepare(upload, ())
        assert jnp.isfinite(way)
        assert jnp.isfinite(curvature)
