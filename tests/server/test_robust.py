"""Robust aggregators against slow transcriptions of their papers, closed forms, and clients that lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from server.papers import RULES, norm

from jaxfed import Bulyan, CentredClipping, GeometricMedian, Krum, Mean, Median, NormBound, TrimmedMean
from jaxfed.messages import CohortInfo, Upload

UNBOUNDED = RULES | {
    "centred clipping": (CentredClipping(1e3), None),
    "norm bound": (NormBound(1e3, by="examples"), None),
}
CLIENTS, NUMBERS = 13, 6


def tree(x):
    return {"a": x[..., :2], "b": {"c": x[..., None, 2:]}}


def flat(t):
    return np.concatenate([np.ravel(t["a"]), np.ravel(t["b"]["c"])])


@jax.jit
def _combine(rule, uploads, weights, state):
    clients = (weights > 0).sum()
    return rule.combine(uploads, weights, state, CohortInfo(0, len(weights), weights.sum(), clients, weights.sum()))


def combine(rule, x, weights, stats=(), state=None):
    """One upload and the state from updates ``[C, d]``; those of weight 0 are left out."""
    x, weights = jnp.asarray(x, float), jnp.asarray(weights, float)
    metrics = dict.fromkeys(("examples", "steps", "loss"), weights)
    return _combine(rule, Upload(tree(x), stats, {}, metrics), weights, rule.init(tree(x[0])) if state is None else state)


def draws(seed, clients=CLIENTS):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(clients, NUMBERS)) * [1, 3, 0.1, 1, 5, 1], rng.integers(1, 9, clients).astype(float)


@jax.jit
def aggregate(rule, updates, weights):
    return rule.aggregate(updates, weights)


def alone(rule, updates):
    """The rule on updates that weigh alike."""
    return aggregate(rule, jnp.asarray(updates, float), jnp.ones(len(updates)))


# ---- the rules


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("left_out", [(), (0, 4), (1, 2, 12)])
def test_rule_is_its_paper(name, left_out):
    """What is left out is zero in the engine; here it is something else that may not matter."""
    rule, paper = RULES[name]
    for seed in range(3):
        x, w = draws(seed)
        w[list(left_out)] = 0
        np.testing.assert_allclose(flat(combine(rule, x, w)[0].delta), paper(x[w > 0], w[w > 0]), rtol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_order_of_clients_does_not_matter(name):
    x, w = draws(3)
    order = np.random.default_rng(4).permutation(CLIENTS)
    once, turned = (flat(combine(RULES[name][0], x[i], w[i])[0].delta) for i in (slice(None), order))
    np.testing.assert_allclose(once, turned, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_equal_clients_give_what_they_sent(name):
    x, w = draws(5)
    np.testing.assert_allclose(flat(combine(UNBOUNDED[name][0], x * 0 + x[0], w)[0].delta), x[0], rtol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_one_client_that_counts(name):
    x, w = draws(6)
    w[1:] = 0
    np.testing.assert_allclose(flat(combine(UNBOUNDED[name][0], x, w)[0].delta), x[0], rtol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_no_client_that_counts_gives_zeros(name):
    x, w = draws(7)
    combined, state = combine(RULES[name][0], x, w * 0)
    assert not flat(combined.delta).any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", RULES)
def test_an_update_that_is_not_finite_is_left_out_as_in_a_round(name, bad):
    x, w = draws(7)
    without = aggregate(RULES[name][0], jnp.asarray(x), jnp.asarray(w).at[4].set(0))
    x[4, 2] = bad
    np.testing.assert_array_equal(aggregate(RULES[name][0], jnp.asarray(x), jnp.asarray(w)), without)


@pytest.mark.parametrize("name", ["median", "trimmed mean", "geometric median", "centred clipping", "norm bound"])
def test_cohort_of_one(name):
    x, w = draws(8, clients=1)
    np.testing.assert_allclose(aggregate(UNBOUNDED[name][0], jnp.asarray(x), jnp.asarray(w))[None], x, rtol=1e-6)


@pytest.mark.parametrize(("values", "middle"), [([3, 1, 2], 2), ([4, 1, 2, 9], 3), ([5], 5), ([1, 8], 4.5)])
def test_median_in_closed_form(values, middle):
    assert alone(Median(), values) == middle


def test_trimmed_mean_survives_values_that_swallow_others():
    """A sum less its extremes would be left with their rounding errors (-0.33 in one library)."""
    assert alone(TrimmedMean(0.2), [2.0, -1e30, 3.0, 1e30, 4.0]) == 3


@pytest.mark.parametrize(
    ("ratio", "clients", "cut"), [(0.29, 100, 29), (0.3, 10, 3), (0.1, 9, 0), (0.1, 10, 1), (0.4999999999, 4, 1)]
)
def test_trimmed_mean_cuts_a_share_rounded_down(ratio, clients, cut):
    values = np.arange(clients) ** 2.0  # so that the mean tells which are in it
    assert alone(TrimmedMean(ratio), values) == pytest.approx(values[cut : clients - cut].mean(), rel=1e-6)


@pytest.mark.parametrize(
    ("points", "centre"),
    [
        ([[0, 0], [2, 0], [1, np.sqrt(3)]], [1, 1 / np.sqrt(3)]),
        ([[0, 0], [2, 2], [0, 2], [3, -1]], [1, 1]),
        ([[0, 0], [1, 0], [5, 0]], [1, 0]),
    ],
    ids=["equilateral triangle", "crossing of diagonals", "on a line"],
)
def test_geometric_median_in_closed_form(points, centre):
    np.testing.assert_allclose(alone(GeometricMedian(iterations=200), points), centre, atol=1e-3)


@pytest.mark.parametrize(("by", "centre"), [("uniform", 1.0), ("examples", 0.0)])
def test_geometric_median_on_a_line_is_the_weighted_median(by, centre):
    found = aggregate(GeometricMedian(iterations=500, by=by), jnp.array([0.0, 1.0, 7.0]), jnp.array([5.0, 1.0, 1.0]))
    assert found == pytest.approx(centre, abs=0.02)


def test_centred_clipping_comes_a_radius_nearer_each_round():
    x, places, state = np.tile([[10.0, 0, 0, 0, 0, 0]], (3, 1)), [], None
    for _ in range(4):
        combined, state = combine(CentredClipping(3.0), x, np.ones(3), state=state)
        places.append(flat(combined.delta)[0])
    np.testing.assert_allclose(places, [3, 6, 9, 10], rtol=1e-6)


def test_multi_krum_takes_no_liar_to_fill_up_its_number():
    """Seven are to be averaged, of which one does not count: the six others are all that is left beside three liars."""
    weights = jnp.ones(10).at[0].set(0)
    assert aggregate(Krum(3, 7), jnp.array([*range(7), 1e30, 1e30, 1e30]), weights) == 3.5


def test_krum_takes_the_first_of_equals():
    square = np.array([[0, 0, 9], [0, 1, 0], [1, 0, 0], [-1, 0, 0], [0, -1, 0]])
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
        first = next(i for i in order if i)
        np.testing.assert_array_equal(alone(Krum(1), square[order]), square[first])


def test_of_two_nearest_neighbours_krum_takes_the_inner_one():
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        assert alone(Krum(0), np.array([0.0, 1.0, 5.0])[order]) == 1


# ---- statistics and auxiliary variables


@pytest.mark.parametrize("name", ["krum", "multi-krum", "geometric median", "centred clipping"])
def test_one_set_of_weights_for_all_that_was_sent(name):
    """Statistics that are rows of the identity show the weights; they come from the update alone."""
    x, w = draws(9)
    shares = np.asarray(combine(UNBOUNDED[name][0], x, w, stats=jnp.eye(CLIENTS))[0].stats)
    assert shares.sum() == pytest.approx(1, rel=1e-6)
    np.testing.assert_allclose(shares @ x, flat(combine(UNBOUNDED[name][0], x, w)[0].delta), rtol=1e-4, atol=1e-5)


def test_centred_clipping_gives_a_far_client_little_say_in_statistics():
    x, w = draws(10)
    x[0] = 1e6
    shares = combine(CentredClipping(1.0), x, w, stats=jnp.eye(CLIENTS))[0].stats
    assert 0 < shares[0] < 1e-5


@pytest.mark.parametrize("name", ["median", "trimmed mean"])
def test_coordinate_rules_treat_statistics_like_updates(name):
    x, w = draws(11)
    combined = combine(RULES[name][0], x, w, stats=tree(jnp.asarray(x))["b"])[0]
    np.testing.assert_array_equal(combined.stats["c"], combined.delta["b"]["c"])


def test_bulyan_guards_statistics():
    x, w = draws(12)
    stats = jnp.zeros(CLIENTS).at[3].set(1e30)
    assert combine(Bulyan(1), x, w, stats=stats)[0].stats == 0


# ---- liars

HONEST = 10
LIES = {
    "far": lambda rng: np.full(NUMBERS, 1e6),
    "beyond squares": lambda rng: np.full(NUMBERS, -1e30),
    "apart": lambda rng: rng.normal(size=NUMBERS) * 1e6,
}


def with_liars(lie, liars, seed=13):
    """Ten honest clients among liars, the weights, and which are honest."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.normal(size=(HONEST, NUMBERS)) + 3, [LIES[lie](rng) for _ in range(liars)]])
    order = rng.permutation(len(x))
    return x[order], np.ones(len(x)), order < HONEST


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize(
    ("rule", "liars"),
    [(Median(), 4), (TrimmedMean(0.25), 3), (Krum(3), 3), (Krum(3, 5), 3), (Bulyan(2), 2)],
    ids=["median", "trimmed mean", "krum", "multi-krum", "bulyan"],
)
def test_liars_cannot_lead_out_of_what_honest_clients_sent(rule, liars, lie):
    x, w, honest = with_liars(lie, liars)
    found = flat(combine(rule, x, w)[0].delta)
    assert (found >= x[honest].min(0) - 1e-6).all()
    assert (found <= x[honest].max(0) + 1e-6).all()


@pytest.mark.parametrize("lie", LIES)
def test_geometric_median_stays_near_honest_clients(lie):
    """At most 2 (n - f) / (n - 2 f) times as far from a point as the farthest honest client (Lemma 2.1 of Minsker, 2015)."""
    x, w, honest = with_liars(lie, 4)
    centre = x[honest].mean(0)
    bound = 2 * HONEST / (HONEST - 4) * norm(x[honest] - centre).max()
    assert norm(flat(combine(GeometricMedian(), x, w)[0].delta) - centre) <= bound


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("rule", [NormBound(2.0), CentredClipping(2.0)])
def test_bounded_rules_move_by_their_bound_at_most(rule, lie):
    x, w, _ = with_liars(lie, 4)
    assert norm(flat(combine(rule, x, w)[0].delta)) <= 2.0 * (1 + 1e-6)


def test_a_mean_follows_one_liar():
    x, w, honest = with_liars("far", 1)
    assert (flat(combine(Mean("uniform"), x, w)[0].delta) > x[honest].max(0)).all()


def test_bulyan_finds_the_one_wrong_number_that_krum_lets_through():
    """A liar in the middle of all others except for one coordinate, within the spread of the sum of all."""
    rng = np.random.default_rng(14)
    x = rng.normal(size=(11, 400)).astype(np.float32)
    x[4] = 0
    x[4, 7] = 9.0
    assert alone(Krum(2), x)[7] == 9.0
    assert alone(Bulyan(2), x)[7] < np.abs(np.delete(x[:, 7], 4)).max()


# ---- bad input


@pytest.mark.parametrize(
    ("rule", "clients", "text"),
    [
        (Krum(2), 6, r"krum needs at least 2 \* byzantine \+ 3 = 7 clients, got cohort size 6.* or lower byzantine=2\.$"),
        (Krum(0), 2, r"= 3 clients, got cohort size 2\. Raise the cohort size\.$"),
        (Krum(1, 5), 5, "krum averages chosen=5 of 5 clients.* Choose at most 4"),
        (Bulyan(1), 6, r"bulyan needs at least 4 \* byzantine \+ 3 = 7 clients, got cohort size 6"),
    ],
)
def test_too_small_a_cohort(rule, clients, text):
    with pytest.raises(ValueError, match=text):
        rule.aggregate(jnp.ones((clients, 2)), jnp.ones(clients))


@pytest.mark.parametrize("rule", [Mean("uniform"), Median(), Krum(0), GeometricMedian()], ids=lambda rule: rule.name)
def test_updates_without_an_array(rule):
    with pytest.raises(ValueError, match=r"updates with at least one array, got \{\}"):
        rule.aggregate({}, jnp.ones(3))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: TrimmedMean(0.5), "TrimmedMean.ratio.* below 0.5"),
        (lambda: TrimmedMean(-0.1), "TrimmedMean.ratio"),
        (lambda: Krum(-1), "Krum.byzantine"),
        (lambda: Krum(1, 0), "Krum.chosen"),
        (lambda: Bulyan(-1), "Bulyan.byzantine"),
        (lambda: GeometricMedian(0.0), "GeometricMedian.smoothing"),
        (lambda: GeometricMedian(iterations=0), "GeometricMedian.iterations"),
        (lambda: CentredClipping(0.0), "CentredClipping.radius"),
        (lambda: NormBound(0.0), "NormBound.max_norm"),
        (lambda: Krum(1, by="size"), "Krum.by"),
    ],
)
def test_bad_hyperparameters(make, text):
    with pytest.raises(ValueError, match=text):
        make()
