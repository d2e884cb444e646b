"""When a run stops and which model was the best, against plain loops over all that was evaluated."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxfed
from jaxfed import BestModel, EarlyStopping, Evaluation, RoundReport


def stop_by_hand(values, patience, tolerance, relative, decrease):
    """After how many evaluations to stop, or None, from the definition: each is compared with the best of those before it."""
    better = []
    for i, value in enumerate(values):
        before = [v for v in values[:i] if math.isfinite(v)]
        if not before or not math.isfinite(value):
            better.append(math.isfinite(value))
        else:
            best = min(before) if decrease else max(before)
            gain = best - value if decrease else value - best
            better.append(gain > tolerance * (abs(best) if relative else 1))
        if len(better) >= patience and not any(better[-patience:]):
            return i + 1
    return None


def stop(values, **options):
    """The same by the object."""
    stopping = EarlyStopping("score", **options)
    return next((i for i, value in enumerate(values, 1) if stopping.observe(10 * i, value)), None)


NUMBERS = st.one_of(st.integers(-4, 4).map(float), st.sampled_from([math.nan, math.inf, -math.inf]))


@given(st.lists(NUMBERS, max_size=12), st.integers(1, 4), st.sampled_from([0.0, 0.25, 1.0, 2.0]), st.booleans(), st.booleans())
def test_it_stops_when_the_definition_says(values, patience, tolerance, relative, decrease):
    options = {"patience": patience, "tolerance": tolerance, "relative": relative, "decrease": decrease}
    assert stop(values, **options) == stop_by_hand(values, **options)


def test_a_relative_tolerance_is_a_fraction_of_the_best_before():
    """From 4 to 3 is a quarter of 4 and a third of 3: declearn, which divides by the new best, would go on."""
    assert stop([4.0, 3.0], tolerance=0.3, relative=True, decrease=True) == 2
    assert stop([4.0, 3.0], tolerance=0.24, relative=True, decrease=True) is None
    # With a best below zero a quotient would change its sign.
    assert stop([-4.0, -5.0], tolerance=0.2, relative=True, decrease=True) is None


@given(st.lists(NUMBERS, max_size=12), st.booleans())
def test_the_best_is_the_first_of_the_best_finite_ones(values, decrease):
    best = BestModel("score", decrease=decrease)
    for round, value in enumerate(values, 1):
        best.observe(round, value)
    finite = [v for v in values if math.isfinite(v)]
    if finite:
        expected = min(finite) if decrease else max(finite)
        assert (best.value, best.round) == (expected, values.index(expected) + 1)
    else:
        assert best.round is None


@pytest.mark.parametrize(
    ("metric", "decrease"),
    [("loss", True), ("error", True), ("loss_worst_decile", True), ("accuracy", False), ("accuracy_client_mean", False)],
)
def test_names_say_which_way_is_better(metric, decrease):
    assert BestModel(metric).decrease is EarlyStopping(metric).best.decrease is decrease
    assert BestModel(metric, decrease=not decrease).decrease is not decrease


def report(evaluation):
    metrics = {name: np.ones(1) for name in ("examples", "steps", "loss")}
    return RoundReport(3, np.arange(1), np.array([True]), metrics, 0.5, evaluation)


def test_rounds_without_an_evaluation_count_for_nothing():
    stopping = EarlyStopping("loss", patience=1)
    assert not stopping.update(report(None))
    assert not stopping.update(report(Evaluation.from_sums({"loss": [1.0]}, np.ones(1))))
    assert not stopping.update(report(None))
    assert stopping.stuck == 0
    assert stopping.update(report(Evaluation.from_sums({"loss": [1.0]}, np.ones(1))))
    assert stopping.reason == "loss has not improved for 1 evaluation"


def test_unknown_metrics_and_bad_numbers_are_refused():
    for watcher in (BestModel("los"), EarlyStopping("los")):
        with pytest.raises(ValueError, match=r"No evaluated metric is called 'los'\. Did you mean 'loss'\?"):
            watcher.update(report(Evaluation.from_sums({"loss": [1.0]}, np.ones(1))))
    with pytest.raises(ValueError, match=r"EarlyStopping\.patience: expected an integer at least 1, got 0"):
        EarlyStopping("loss", patience=0)
    with pytest.raises(ValueError, match=r"EarlyStopping\.tolerance: expected a finite number at least 0, got -1"):
        EarlyStopping("loss", tolerance=-1)
    with pytest.raises(TypeError, match=r"BestModel\.metric: expected str, got 3"):
        BestModel(3)
    for kind in (BestModel, EarlyStopping):
        with pytest.raises(TypeError, match=r"decrease: expected bool, got 'no'"):
            kind("loss", decrease="no")
        with pytest.raises(TypeError, match=r"report: expected RoundReport, got .* or the last of what chunks"):
            kind("loss").update([])


def loss(w, batch, key):
    """Parabolas, on which a rate above 1 diverges."""
    return batch["curvature"] / 2 * (w - batch["centre"]) ** 2


def federation():
    arrays = {"curvature": jnp.array([1.0, 2.0, 3.0, 1.0]), "centre": jnp.array([0.0, 1.0, 3.0, 4.0])}
    return jaxfed.FederatedData.from_arrays(arrays, [0, 1, 2, 2])


@pytest.mark.parametrize("paged", [False, True])
def test_the_best_of_personal_models_outlives_later_rounds(paged):
    """Its state still gives, client by client, what was evaluated in its round, though later rounds wrote over all tables."""
    algorithm = jaxfed.ditto(loss, strength=0.1, lrate=1.05, batch_size=None)
    simulation = jaxfed.Simulation(algorithm, federation(), cohort_size=2, paged=paged)
    start, best, history = simulation.init(jnp.zeros(()), key=jax.random.key(1)), BestModel("loss_worst_decile"), []
    for state, one in simulation.rounds(start, rounds=12, eval_every=1):
        best.update(one, state)
        history.append(one)
    by_hand = [np.percentile(one.evaluation.by_client["loss"], 90) for one in history]
    assert best.round - 1 == np.nanargmin(by_hand) < 11
    assert best.value == by_hand[best.round - 1]
    expected = history[best.round - 1].evaluation.by_client["loss"]
    np.testing.assert_array_equal(simulation.evaluate_in_use(best.state).by_client["loss"], expected)
    assert (simulation.evaluate_in_use(state).by_client["loss"] != expected).all()
    # And the run can go on from there.
    again, _ = simulation.run(best.state, rounds=12 - best.round)
    assert jax.tree.map(np.asarray, again.params) == jax.tree.map(np.asarray, state.params)


def test_curves_by_client_are_the_evaluations():
    simulation = jaxfed.Simulation(jaxfed.fedavg(loss, lrate=0.1, batch_size=None), federation())
    start = simulation.init(jnp.zeros(()), key=jax.random.key(1))
    _, history = simulation.run(start, rounds=5, eval_every=2)
    rounds, values = history.by_client("loss")
    assert rounds.tolist() == [2, 4, 5]
    for number, value in zip(rounds, values):
        w = float(simulation.run(start, rounds=int(number))[0].params)
        np.testing.assert_allclose(value, [w**2 / 2, (w - 1) ** 2, (1.5 * (w - 3) ** 2 + (w - 4) ** 2 / 2) / 2], rtol=1e-5)
    with pytest.raises(ValueError, match="No evaluated metric is called 'accuracy'"):
        history.by_client("accuracy")
    with pytest.raises(ValueError, match=r"No round of this history was evaluated"):
        simulation.run(start, rounds=1)[1].by_client("loss")
