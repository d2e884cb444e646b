"""Privacy of clients and of rows: norms, the scale of the noise from both sides, what would travel without noise, budgets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from server.selections import draw

import jaxfed
from jaxfed import AdaptivePrivateMean, LocalTraining, PoissonSampling, PrivateGradient, PrivateMean, accounting, dpfedavg
from jaxfed.client.gradients import as_model
from jaxfed.messages import CohortInfo, Upload

MANY = 20_000


def scale_fits(values, std):
    """Whether the variance is that of so many normal draws: neither too large nor too small."""
    statistic = float((np.asarray(values, float) ** 2).sum() / std**2)
    return 1e-5 < stats.chi2.cdf(statistic, np.size(values)) < 1 - 1e-5


def info(key=0, clients=3):
    return CohortInfo(0, 10, 10.0, clients, float(clients), jax.random.key(key))


def upload(delta, **more):
    return Upload(delta, more.get("stats", {}), more.get("aux", {}), {"examples": jnp.ones(())})


# ---- clients


@pytest.mark.parametrize(("norm", "multiplier", "expected"), [(0.5, 2.0, 4), (3.0, 0.7, 50)])
def test_noise_of_a_mean_has_its_scale(norm, multiplier, expected):
    rule = PrivateMean(expected, norm, multiplier)
    gradient, _ = rule.finalize({"a": jnp.zeros(MANY), "b": jnp.zeros((MANY, 2))}, (), info())
    std = multiplier * norm / expected
    assert scale_fits(gradient["a"], std)
    assert scale_fits(gradient["b"], std)
    assert not scale_fits(gradient["a"], 1.05 * std)
    assert not scale_fits(gradient["a"], std / 1.05)
    assert abs(np.corrcoef(gradient["a"], gradient["b"][:, 0])[0, 1]) < 0.03


def test_noise_is_new_with_every_key_and_the_same_with_the_same():
    rule = PrivateMean(2)
    one, again, other = (rule.finalize(jnp.zeros(9), (), info(key))[0] for key in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.isclose(one, other).any()


def test_updates_are_clipped_over_all_leaves_and_divided_by_the_expected_number():
    rule = PrivateMean(5, 1.0, 0.0)
    long, short = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}, {"a": jnp.array([0.3]), "b": jnp.array([-0.4])}
    total = jax.tree.map(jnp.add, rule.prepare(upload(long), ()), rule.prepare(upload(short), ()))
    gradient, _ = rule.finalize(total, (), info(clients=2))
    np.testing.assert_allclose([gradient["a"][0], gradient["b"][0]], [0.9 / 5, 0.4 / 5], rtol=1e-6)


def test_a_greatest_norm_follows_the_quantile():
    """Norms of 1 to 100 and a quantile of 0.3: the norm settles near 30, from above and from below."""
    norms = jnp.arange(1.0, 101.0)
    for first in (0.5, 2000.0):
        rule = AdaptivePrivateMean(100, first, noise_multiplier=1e-3, quantile=0.3, rate=0.3, count_std=0.5)
        state = rule.init(jnp.zeros(1))
        for step in range(200):
            sent = rule.send(state)
            total = jax.vmap(lambda norm: rule.prepare(upload(norm[None]), sent))(norms)  # noqa: B023
            state = rule.finalize(jax.tree.map(lambda x: x.sum(0), total), state, info(step, 100))[1]
        assert 28 < float(state) < 32


def test_the_step_of_a_greatest_norm():
    """50 rounds in which 0.3 are short enough and 0.5 should be, at a rate of 0.2: e^2."""
    rule = AdaptivePrivateMean(10, 1.0, 0.0, quantile=0.5, rate=0.2)
    state = rule.init(jnp.zeros(1))
    for step in range(50):
        _, state = rule.finalize((jnp.zeros(1), jnp.array(3.0 - 10 / 2)), state, info(step))
    assert float(state) == pytest.approx(np.exp(2), rel=1e-5)


def test_a_client_moves_the_count_by_a_half():
    """As the split of the budget has it: with 0 and 1 a client that comes could move it by one."""
    rule = AdaptivePrivateMean(10, max_norm=1.0)
    moved = [float(rule.prepare(upload(jnp.array([norm])), jnp.array(1.0))[1]) for norm in (0.5, 1.0, 1.5)]
    assert moved == [0.5, 0.5, -0.5]


def test_both_noises_of_an_adaptive_mean_have_their_scales():
    rule = AdaptivePrivateMean(10, 2.0, noise_multiplier=1.0, rate=1.0, count_std=5.0)
    assert rule.sum_multiplier == pytest.approx(1.00503782, rel=1e-8)
    gradient, _ = rule.finalize((jnp.zeros(MANY), jnp.zeros(())), jnp.array(2.0), info())
    assert scale_fits(gradient, 1.00503782 * 2.0 / 10)
    keys = jax.random.split(jax.random.key(3), 4000)
    moved = jax.vmap(lambda key: rule.finalize((jnp.zeros(1), jnp.array(0.0)), 1.0, info()._replace(key=key))[1])(keys)
    # log C = -(b - 0.5) with b = 0.5 + N(0, 25) / 10.
    assert scale_fits(np.log(moved), 0.5)
    assert not scale_fits(np.log(moved), 0.55)


@pytest.mark.parametrize("rule", [PrivateMean(2), AdaptivePrivateMean(2)])
def test_what_would_travel_without_noise_is_refused(rule):
    with pytest.raises(ValueError, match="uploads hold statistics of the model"):
        rule.prepare(upload(jnp.ones(2), stats={"mean": jnp.ones(1)}), 1.0)
    with pytest.raises(ValueError, match="uploads hold auxiliary variables"):
        rule.prepare(upload(jnp.ones(2), aux={"scaffold": jnp.ones(2)}), 1.0)
    total = jnp.ones(2) if isinstance(rule, PrivateMean) else (jnp.ones(2), jnp.ones(()))
    with pytest.raises(ValueError, match="expected a CohortInfo with a key to draw noise from, got none"):
        rule.finalize(total, jnp.ones(()), info()._replace(key=None))


def test_a_budget_that_the_count_would_take_is_refused():
    with pytest.raises(ValueError, match=r"noise_multiplier / count_std: expected a finite number below 2, got 2\.0"):
        AdaptivePrivateMean(2, noise_multiplier=1.0, count_std=0.5)


def push(params, batch, key):
    return batch["x"] @ params["w"]


@pytest.mark.parametrize("options", [{}, {"devices": 1, "lanes": 3}, {"paged": True}])
def test_a_private_round(options):
    """Gradients of norm 3 and 0.5 at a rate of 0.1: updates of 0.3, clipped to 0.2, and 0.05; then noise of 0.2 / 4."""
    x = np.zeros((2, 3000), np.float32)
    x[0, 0], x[1, 1] = 3.0, 0.5
    data = jaxfed.FederatedData.from_arrays({"x": x}, np.arange(2))
    found = {}
    for multiplier in (0.0, 1.0):
        algorithm = dpfedavg(push, max_norm=0.2, noise_multiplier=multiplier, expected=4, lrate=0.1, batch_size=1)
        sim = jaxfed.Simulation(algorithm, data, **options)
        first = sim.init({"w": np.zeros(3000, np.float32)}, key=jax.random.key(0))
        found[multiplier] = [np.asarray(sim.run(first, rounds=n)[0].params["w"]) for n in (1, 2)]
    np.testing.assert_allclose(found[0.0][0][:3], [-0.2 / 4, -0.05 / 4, 0], atol=1e-7)
    one, two = (noisy - plain for noisy, plain in zip(found[1.0], found[0.0]))
    assert scale_fits(one, 0.2 / 4)
    assert scale_fits(two - one, 0.2 / 4)
    assert abs(np.corrcoef(one, two - one)[0, 1]) < 0.08


def test_only_equal_weights_can_be_hidden():
    assert dpfedavg(push, expected=3, lrate=0.1, batch_size=1).aggregator == PrivateMean(3, 1.0, 1.0)
    with pytest.raises(ValueError, match="expected weights='uniform', as other weights could not be hidden, got 'examples'"):
        dpfedavg(push, expected=3, lrate=0.1, batch_size=1, weights="examples")


def test_cohorts_of_poisson_sampling_are_binomial():
    cohorts = draw(PoissonSampling(12, rate=0.4), 12)
    taken = np.zeros((len(cohorts.ids), 12), bool)
    np.put_along_axis(taken, cohorts.ids, cohorts.valid, 1)
    sizes = np.bincount(taken.sum(1), minlength=13)
    expected = stats.binom.pmf(np.arange(13), 12, 0.4) * len(taken)
    few = expected < 5
    statistic = ((sizes - expected)[~few] ** 2 / expected[~few]).sum()
    assert 1e-4 < stats.chi2.cdf(statistic, (~few).sum() - 1) < 1 - 1e-4
    # Independent: any two are both there with the square of the rate.
    pairs = (taken[:, :, None] & taken[:, None, :]).mean(0)[~np.eye(12, dtype=bool)]
    assert abs(pairs - 0.16).max() < 5 * np.sqrt(0.16 * 0.84 / len(taken))


# ---- rows


def rows(*norms, width=3000):
    x = np.zeros((len(norms), width), np.float32)
    x[np.arange(len(norms)), np.arange(len(norms))] = norms
    return {"x": jnp.asarray(x), "mask": jnp.ones(len(norms), bool)}


def test_rows_are_clipped_one_by_one_and_others_leave():
    batch = rows(5.0, 0.5, 9.0, width=4)
    batch = batch | {"mask": jnp.array([True, True, False]), "x": batch["x"].at[2, 0].set(jnp.nan)}
    loss, _, gradient = PrivateGradient(8, 2.0, 0.0)(as_model("loss", push), {"w": jnp.ones(4)}, {}, batch, jax.random.key(0))
    np.testing.assert_allclose(gradient["w"], [2 / 8, 0.5 / 8, 0, 0], rtol=1e-6)
    assert float(loss) == 2.75


def test_noise_of_a_gradient_has_its_scale_and_no_rows_have_it_too():
    rule, model, params = PrivateGradient(8, 2.0, 1.5), as_model("loss", push), {"w": jnp.zeros(MANY)}
    batch = rows(1.0, width=MANY) | {"mask": jnp.array([False])}
    found = [rule(model, params, {}, batch, jax.random.key(key))[2]["w"] for key in (0, 1)]
    assert scale_fits(found[0], 1.5 * 2 / 8)
    assert not scale_fits(found[0], 1.05 * 1.5 * 2 / 8)
    assert abs(np.corrcoef(*found)[0, 1]) < 0.03


def test_local_training_draws_noise_anew_in_every_step_at_every_client():
    """Without gradients weights walk at random: after K steps of rate 1 the variance is K of one step's."""
    data = jaxfed.FederatedData.from_arrays({"x": np.zeros((4, 4000), np.float32)}, np.array([0, 0, 1, 1]))
    client = LocalTraining(push, 1.0, jaxfed.Poisson(2, steps=3, rate=0.5), PrivateGradient(6, 2.0, 1.5))
    sim = jaxfed.Simulation(jaxfed.Algorithm(client, 1.0, jaxfed.Mean("uniform")), data)
    state, _ = sim.run(sim.init({"w": np.zeros(4000, np.float32)}, key=jax.random.key(0)), rounds=1)
    assert scale_fits(state.params["w"], 0.5 * np.sqrt(3) / np.sqrt(2))


def test_a_model_that_mixes_rows_is_refused():
    with pytest.raises(ValueError, match="the model has statistics, which mix the rows of a batch"):
        PrivateGradient(2)(as_model("loss", push), {}, {"mean": jnp.ones(2)}, rows(1.0, width=2), jax.random.key(0))


# ---- budgets


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta", "rdp"),
    # By integer orders with the improved conversion; orders between them and a tighter accountant spend no more.
    [(4.0, 0.01, 10_000, 1e-5, 1.0355), (1.1, 0.01, 1000, 1e-5, 1.7253), (1.1, 256 / 60_000, 3510, 1e-5, 1.2804)],
)
def test_what_is_spent(noise, rate, steps, delta, rdp):
    budget = {"noise_multiplier": noise, "sampling_rate": rate, "steps": steps, "delta": delta}
    assert 0.97 * rdp < accounting.epsilon(**budget, accountant="rdp") < 1.001 * rdp
    assert 0.8 * rdp < accounting.epsilon(**budget) < rdp


@pytest.mark.parametrize(("epsilon", "sigma"), [(0.5, 7.031827), (1.0, 3.730632), (4.0, 1.081162), (8.0, 0.600229)])
def test_the_noise_of_one_gaussian_is_that_of_balle_and_wang(epsilon, sigma):
    budget = {"epsilon": epsilon, "sampling_rate": 1.0, "steps": 1, "delta": 1e-5}
    assert accounting.noise_multiplier(**budget) == pytest.approx(sigma, rel=1e-4)


def test_a_hundred_gaussians_are_one():
    """A hundred of 20 are one of 2: mu = 0.5, which spends 1.993091."""
    spent = accounting.epsilon(noise_multiplier=20.0, sampling_rate=1.0, steps=100, delta=1e-5)
    assert spent == pytest.approx(1.993091, rel=1e-4)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier: expected a finite number above 0"),
        ({"sampling_rate": 1.5}, "sampling_rate: expected a finite number above 0 and at most 1"),
        ({"steps": 0}, "steps: expected an integer at least 1"),
        ({"delta": 1.0}, "delta: expected a finite number above 0 and below 1"),
        ({"accountant": "prv"}, "accountant: expected one of 'pld', 'rdp', got 'prv'"),
    ],
)
def test_numbers_outside_of_their_bounds_are_refused(wrong, text):
    budget = {"noise_multiplier": 1.0, "sampling_rate": 0.1, "steps": 10, "delta": 1e-5}
    with pytest.raises(ValueError, match=text):
        accounting.epsilon(**budget | wrong)
