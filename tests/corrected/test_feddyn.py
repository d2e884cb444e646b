"""FedDyn against the paper's formulas in NumPy, and its fixed point."""

import jax.numpy as jnp
import numpy as np
import pytest
from corrected.loops import OPTIMUM, OPTIONS, SIZES, START, clients, descend, end, gradient, loss, parabola, run

from jaxfed import FedDynClient, Optimizer, RoundStart
from jaxfed.algorithms_corrected import feddyn

ALPHA = 0.5


def slow(cohorts, weights):
    """Acar et al. 2021 with h_i and h as there; ``weights`` [N] are ones in the paper."""
    w, h, linear, path = START, np.zeros(2), np.zeros((len(SIZES), 2)), []
    for cohort in cohorts:
        ends = []
        for i in cohort:
            anchor = w
            y, _ = descend(w, *clients()[i], lambda w, x, y, i=i, a=anchor: gradient(w, x, y) - linear[i] + ALPHA * (w - a))
            linear[i] -= ALPHA * (y - w)
            ends.append(y)
        p = weights[cohort]
        h = h - ALPHA * (p @ (np.array(ends) - w)) / weights.sum()
        w = p @ np.array(ends) / p.sum() - h / ALPHA
        path.append(w)
    return np.array(path)


@pytest.mark.parametrize(("lanes", "weights"), [(1, "uniform"), (3, "uniform"), (3, "examples")])
def test_feddyn_is_the_papers(lanes, weights):
    path, cohorts = run(feddyn(loss, alpha=ALPHA, weights=weights, **OPTIONS), lanes)
    by = np.ones(4) if weights == "uniform" else SIZES
    np.testing.assert_allclose(path, slow(cohorts, by), rtol=1e-11)


@pytest.mark.parametrize("sizes", [(1, 1), (10, 10), (10, 2)])
def test_fixed_point_is_the_optimum_for_any_steps(sizes):
    algorithm = feddyn(parabola, alpha=1.0, lrate=0.05, batch_size=1, weights="uniform")
    assert float(end(algorithm, 1500, sizes).params) == pytest.approx(OPTIMUM, abs=1e-9)


def test_fixed_point_by_examples_is_the_weighted_optimum():
    algorithm = feddyn(parabola, alpha=1.0, lrate=0.05, batch_size=1)
    assert float(end(algorithm, 1500, (10, 2)).params) == pytest.approx(20 / 30, abs=1e-9)


def test_partial_participation_reaches_the_optimum():
    algorithm = feddyn(parabola, alpha=1.0, lrate=0.05, batch_size=1, weights="uniform")
    assert float(end(algorithm, 4000, (10, 10), cohort_size=1).params) == pytest.approx(OPTIMUM, abs=1e-9)


def test_the_linear_term_stays_wide():
    """T-28: in bfloat16 a term of 1 would not see steps of a thousandth."""
    client, w = FedDynClient(0.1), jnp.ones((), jnp.bfloat16)
    kept = jnp.ones((), jnp.float32)
    state = client.start_round(kept, RoundStart(w))
    updates, state = client.update(w, state, w)
    kept, aux = client.end_round(state, w, w + jnp.asarray(0.0078125, jnp.bfloat16))
    assert updates.dtype == jnp.bfloat16
    assert float(kept) == pytest.approx(1 - 0.1 * 0.0078125, abs=1e-7)
    assert aux == ()


def test_weights_are_needed():
    client = FedDynClient()
    with pytest.raises(ValueError, match="needs the weights"):
        client.update(jnp.ones(2), client.init(jnp.ones(2)))


@pytest.mark.parametrize(("modules", "warns"), [(["feddyn-client", "momentum"], False), (["momentum", "feddyn-client"], True)])
def test_advice_about_its_place(modules, warns):
    optimizer = Optimizer(0.1, modules=modules)
    advice = [m.advice(optimizer) for m in optimizer.modules if m.name == "feddyn-client"]
    assert bool(advice[0]) == warns
