"""Selections by weights, reports and several rules: beside closed forms and plain loops; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from server.selections import DRAWS, Fixed, draw, fits, loss, run, simulation

import jaxfed
from jaxfed import Composition, Criterion, Oort, Stragglers, Uniform, Weighted
from jaxfed.messages import Cohort
from jaxfed.server.selection import highest


def cohort_of(*ids, valid=None):
    return Cohort(jnp.array(ids), jnp.ones(len(ids), bool) if valid is None else jnp.array(valid), jnp.ones(len(ids)))


def test_the_highest_are_taken_and_equal_ones_at_random():
    found = draw(Fixed(3, score=[5.0, 1.0, 1.0, 7.0, 1.0, 0.0]), 6)
    np.testing.assert_array_equal(found.ids[:, :2], np.tile([3, 0], (DRAWS, 1)))
    assert fits(np.bincount(found.ids[:, 2], minlength=6)[[1, 2, 4]], np.ones(3) / 3)
    assert found.valid.all()
    assert (found.work == 1).all()


def test_who_must_not_take_part_is_not_valid():
    found = draw(Fixed(4, score=[-1.0, 2.0, -2.0, 3.0, -1.0]), 5, draws=50)
    np.testing.assert_array_equal(found.valid, np.tile([True, True, False, False], (50, 1)))
    np.testing.assert_array_equal(found.ids[:, :2], np.tile([3, 1], (50, 1)))
    assert all(len(set(ids)) == 4 for ids in found.ids.tolist())


def test_weighted_draws_are_successive_draws_in_proportion():
    """P(first = i, second = j) = p_i p_j / (1 - p_i)."""
    weights = np.array([1.0, 4.0, 2.0, 0.0, 3.0])
    ids = draw(Weighted(2, weights), 5).ids
    p = weights / weights.sum()
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j and p[i] * p[j] > 0]
    counts = [(ids == pair).all(1).sum() for pair in pairs]
    assert sum(counts) == DRAWS
    assert fits(counts, [p[i] * p[j] / (1 - p[i]) for i, j in pairs])
    assert not fits(counts, np.ones(len(pairs)) / len(pairs))


@pytest.mark.parametrize("over", ["last", "mean", "sum"])
@pytest.mark.parametrize("lowest", [False, True])
def test_a_criterion_takes_the_best_of_what_was_reported(over, lowest):
    rng = np.random.default_rng(0)
    population, rule = 9, Criterion(3, lowest=lowest, over=over)
    state, told = rule.init(population), [[] for _ in range(population)]
    for _ in range(20):
        ids, losses = rng.choice(population, 4, replace=False), rng.uniform(size=4).astype(np.float32)
        state = rule.observe(state, cohort_of(*ids), {"loss": jnp.asarray(losses)})
        for client, value in zip(ids, losses):
            told[client].append(float(value))
    value = np.array([{"last": x[-1], "mean": np.mean(x), "sum": np.sum(x)}[over] for x in told])
    best = np.argsort(value if lowest else -value)[:3]
    np.testing.assert_array_equal(draw(rule, population, 5, state).ids, np.tile(best, (5, 1)))


def test_who_has_not_reported_comes_first_or_counts_as_a_share():
    losses = {"loss": jnp.array([0.9, 0.1])}
    first, equal = Criterion(3), Criterion(3, missing="equal")
    state = first.observe(first.init(5), cohort_of(0, 1), losses)
    ids = draw(first, 5, state=state).ids
    assert fits(np.bincount(ids[:, 0], minlength=5)[2:], np.ones(3) / 3)
    assert (np.sort(ids) == [2, 3, 4]).all()
    # A fifth for those three, below 0.9 and above 0.1.
    ids = draw(equal, 5, state=equal.observe(equal.init(5), cohort_of(0, 1), losses)).ids
    assert (ids[:, 0] == 0).all()
    assert not (ids == 1).any()


def test_what_is_not_finite_or_not_valid_is_not_a_report():
    rule = Criterion(2)
    state = rule.observe(rule.init(4), cohort_of(0, 1, 2, valid=[True, True, False]), {"loss": jnp.array([jnp.nan, 2.0, 9.0])})
    np.testing.assert_array_equal(state.count, [0, 1, 0, 0])
    np.testing.assert_array_equal(state.value, [0, 2, 0, 0])


def test_a_composition_chooses_among_those_that_are_left():
    rule = Composition([Fixed(2, score=[9.0, 8.0, 7.0, 1.0, 1.0]), Fixed(1, score=[5.0, 4.0, 3.0, 2.0, 1.0]), Uniform(1)])
    assert rule.cohort_size(5) == 4
    found = draw(rule, 5)
    np.testing.assert_array_equal(found.ids[:, :3], np.tile([0, 1, 2], (DRAWS, 1)))
    assert fits(np.bincount(found.ids[:, 3], minlength=5)[3:], np.ones(2) / 2)


def test_rules_of_a_composition_draw_apart_and_learn_alike():
    rule = Composition([Uniform(2), Uniform(2)])
    ids = draw(rule, 4).ids
    assert (np.sort(ids) == np.arange(4)).all()
    orders = ids @ [64, 16, 4, 1]
    assert fits(np.unique(orders, return_counts=True)[1], np.ones(24) / 24)
    rule = Composition([Criterion(1), Criterion(1, metric="steps")])
    state = rule.observe(rule.init(3), cohort_of(0, 2), {"loss": jnp.array([1.0, 2.0]), "steps": jnp.array([4.0, 3.0])})
    np.testing.assert_array_equal(state[0].value, [1, 0, 2])
    np.testing.assert_array_equal(state[1].value, [4, 0, 3])


@pytest.mark.parametrize(
    ("measure", "value"),
    # The gradient is x, the first loss 2 x, a step a tenth.
    [("update_norm", lambda x: 0.1 * x), ("loss_rms", lambda x: 2 * x), ("update_divergence", lambda x: 0.1 * x / 2)],
)
def test_measures_that_rules_read(measure, value):
    _, history = run(Criterion(5, metric=measure), [measure], rounds=1)
    report = history[0]
    np.testing.assert_allclose(report.metrics[measure], value(1.0 + report.clients), rtol=1e-6)


def test_the_mean_square_counts_rows_that_are_there():
    x = np.array([1.0, 2.0, 4.0, 3.0, 3.0], np.float32)
    data = jaxfed.FederatedData.from_arrays({"x": x}, np.array([0, 0, 0, 1, 1]))
    algorithm = jaxfed.fedavg(loss, lrate=0.1, batch_size=2, measures=["loss_rms"])
    sim = jaxfed.Simulation(algorithm, data)
    _, history = sim.run(sim.init({"w": np.float32(2.0)}, key=jax.random.key(0)), rounds=1)
    np.testing.assert_allclose(history[0].metrics["loss_rms"], [2 * np.sqrt(7), 6], rtol=1e-6)


@pytest.mark.parametrize("paged", [False, True])
def test_a_rule_learns_from_round_to_round(paged):
    """Client i moves the weight by a tenth of 1 + i: those of the highest number come again and again, once all have come."""
    _, history = run(Criterion(2, metric="update_norm"), ["update_norm"], rounds=6, **({"paged": True} if paged else {}))
    chosen = [set(report.clients.tolist()) for report in history]
    assert not chosen[0] & chosen[1]
    # Whoever is left after two rounds has priority, beside the best of the four.
    best = max(chosen[0] | chosen[1])
    assert chosen[2] == {best} | set(range(5)) - chosen[0] - chosen[1]
    assert chosen[3] == chosen[4] == chosen[5] == {3, 4}


def test_stragglers_pass_on_what_a_rule_learns():
    rule = Stragglers(Criterion(2, metric="update_norm"), 0.5, "drop", epochs=2)
    assert rule.reads == ("update_norm",)
    state, _ = run(rule, ["update_norm"], rounds=2)
    assert state.selector.count.sum() == 2


SIZES = "expected at most the population of 5 clients, got 6"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: simulation(Weighted(2, [1.0, 2.0])), r"Weighted.weights: expected a row for each of 5 clients, got 2"),
        (lambda: simulation(Weighted(2, [1.0, 0, 0, 0, 0])), "at least size=2 clients of a weight above 0, got 1"),
        (lambda: simulation(Weighted(6, np.ones(5))), "at least size=6 clients"),
        (lambda: Weighted(2, [1.0, -1.0]), "Weighted.weights: expected finite numbers at least 0"),
        (lambda: Weighted(2, [1.0, np.nan]), "Weighted.weights: expected finite numbers at least 0"),
        (lambda: Weighted(2, 3.0), r"Weighted.weights: expected an array with 1 axis.*got shape \(\)"),
        (lambda: simulation(Criterion(6)), SIZES),
        (
            lambda: simulation(Criterion(2, metric="update_norm")),
            r"reads the metrics \['update_norm'\].*measures=\['update_norm'\]",
        ),
        (lambda: simulation(Oort(2, np.ones(5))), r"'oort' reads the metrics \['loss_rms'\]"),
        (lambda: Criterion(2, over="median"), "expected one of 'last', 'mean', 'sum', got 'median'"),
        (lambda: Composition([]), "expected at least one, got none"),
        (lambda: Composition([Stragglers(Uniform(2), 0.5)]), "expected a selector that ranks clients, got Stragglers"),
        (lambda: simulation(Composition([Uniform(3), Uniform(3)])), "expected sizes of at most 5 clients together, got 6"),
    ],
)
def test_what_does_not_fit_is_refused(make, text):
    with pytest.raises((ValueError, TypeError), match=text):
        make()


def test_rules_by_name():
    found = simulation(
        ["composition", {"selectors": [["weighted", {"size": 1, "weights": [1, 1, 1, 1, 1]}], ["uniform", {"size": 2}]]}]
    )
    assert found.selector == Composition([Weighted(1, np.ones(5)), Uniform(2)])


def test_highest_needs_no_cohort_smaller_than_all():
    found = highest(jnp.arange(3.0), 3, jax.random.key(0))
    np.testing.assert_array_equal(found.ids, [2, 1, 0])
