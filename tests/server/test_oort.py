"""Oort beside a transcription of FedScale's program into plain Python, with its two faults of indexing mended."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from server.selections import draw, fits

import jaxfed
from jaxfed import Oort
from jaxfed.messages import Cohort

POPULATION = 40


class Program:
    """The program, client by client; draws are left to whoever asks."""

    def __init__(self, rule):
        self.rule, self.examples = rule, np.asarray(rule.examples, float)
        self.seconds = None if rule.seconds is None else np.asarray(rule.seconds, float)
        self.reward = self.examples.copy()
        self.last, self.picks = np.zeros(POPULATION, int), np.zeros(POPULATION, int)
        self.round, self.percentile, self.history = 0, rule.percentile, [0.0]

    def feedback(self, ids, valid, utility):
        """A round is over."""
        self.round += 1
        good = [u for u, ok in zip(utility, valid) if ok and math.isfinite(u)]
        mean = sum(good) / len(good) if good else 0.0
        exploited = [u for i, u, ok in zip(ids, utility, valid) if self.last[i] > 0 and ok and math.isfinite(u)]
        self.history.append(sum(exploited) / len(exploited) if exploited else 0.0)
        for i, u, ok in zip(ids, utility, valid):
            self.reward[i] = u if ok and math.isfinite(u) else mean
            self.last[i], self.picks[i] = self.round, self.picks[i] + 1
        now, step = self.round + 1, self.rule.pacer_step
        if now >= 2 * step and now % step == 0:
            before, present = sum(self.history[-2 * step : -step]), sum(self.history[-step:])
            if abs(present - before) <= before * 0.1:
                self.percentile = min(100.0, self.percentile + self.rule.pacer_delta)
            elif abs(present - before) >= before * 5:
                self.percentile = max(self.rule.pacer_delta, self.percentile - self.rule.pacer_delta)

    def slow(self, client):
        if self.seconds is None or self.percentile >= 100:
            return 1.0
        place = min(int(POPULATION * self.percentile / 100), POPULATION - 1)
        limit = sorted(self.seconds)[place]
        return (limit / self.seconds[client]) ** self.rule.penalty if self.seconds[client] > limit else 1.0

    def scores(self):
        now = self.round + 1
        known = sorted(reward for reward in self.reward if reward > 0)
        cut = known[min(int(len(known) * self.rule.clip), len(known) - 1)]
        least = known[0] * 0.999
        scale = max(known[-1] - least, 1e-4)
        found = {}
        for client in np.flatnonzero(self.last):
            score = (min(self.reward[client], cut) - least) / scale + math.sqrt(0.1 * math.log(now) / self.last[client])
            found[client] = abs(score * self.slow(client))
        return found

    def pools(self):
        """Who may be exploited and how many, who may be explored and how many."""
        scores = self.scores()
        share = self.rule.explore
        for _ in range(self.round):
            share = max(share * self.rule.explore_decay, self.rule.explore_least)
        unseen = {c: self.examples[c] * self.slow(c) for c in np.flatnonzero(self.last == 0)}
        count = min(int(self.rule.size * (1 - share if unseen else 1) + 1e-9), len(scores))
        ordered = sorted(scores, key=scores.get, reverse=True)
        cut = scores[ordered[min(count, len(ordered) - 1)]] * self.rule.cutoff
        pool = []
        for client in ordered:
            if scores[client] < cut and len(pool) > 10 * count:
                break
            pool.append(client)
        explore = min(len(unseen), self.rule.size - count)
        window = sorted(unseen, key=unseen.get, reverse=True)[: int(self.rule.window * explore)]
        return set(pool), count, set(window), explore


def rule(**options):
    rng = np.random.default_rng(5)
    arrays = {"examples": rng.integers(5, 90, POPULATION), "seconds": rng.lognormal(2, 1, POPULATION)}
    return Oort(6, **{"metric": "loss"} | arrays | options)


def followed(selector, rounds, valid=0.9, seed=0, level=lambda round: 1.0):
    """A rule and the program told of the same rounds: after each, both."""
    rng, program = np.random.default_rng(seed), Program(selector)
    state = selector.init(POPULATION)
    choose, observe = jax.jit(selector.select, static_argnums=3), jax.jit(selector.observe)
    for round in range(rounds):
        cohort = choose(state, jax.random.key(1000 * seed + round), jnp.array(round), POPULATION)
        ids = np.asarray(cohort.ids)
        here = rng.uniform(size=6) < valid
        losses, rows = (level(round) * rng.uniform(0.1, 2, 6)).astype(np.float32), np.asarray(selector.examples)[ids]
        losses[rng.uniform(size=6) < 0.05] = np.nan
        metrics = {"loss": jnp.asarray(losses), "examples": jnp.asarray(rows)}
        state = observe(state, Cohort(cohort.ids, jnp.asarray(here), jnp.ones(6)), metrics)
        before = program.last.copy()
        program.feedback(ids, here, [float(x) for x in losses * rows])
        yield cohort, before, state, program


OPTIONS = [{}, {"seconds": None}, {"clip": 0.5, "penalty": 1.0, "percentile": 60.0, "pacer_step": 3, "pacer_delta": 20.0}]


@pytest.mark.parametrize("options", OPTIONS)
def test_state_and_scores_follow_the_program(options):
    selector, percentiles = rule(**options), set()
    for round, (_, _, state, program) in enumerate(followed(selector, 45)):
        np.testing.assert_array_equal(state.last, program.last)
        np.testing.assert_array_equal(state.picks, program.picks)
        seen = program.last > 0
        np.testing.assert_allclose(np.asarray(state.utility)[seen], program.reward[seen], rtol=1e-6)
        assert float(state.percentile) == program.percentile
        percentiles.add(program.percentile)
        found = np.asarray(selector.score(state, jnp.array(round + 1)))
        expected = program.scores()
        np.testing.assert_allclose(found[list(expected)], list(expected.values()), rtol=2e-5, atol=2e-6)
    assert len(percentiles) > 1 or selector.pacer_step > 3


def test_a_pacer_grows_strict_where_utility_jumps():
    selector = rule(pacer_step=4, percentile=50.0, pacer_delta=10.0)
    jump = followed(selector, 16, valid=1.0, level=lambda round: 20.0 if round > 10 else 1.0)
    assert min(program.percentile for _, _, _, program in jump) < 50
    for _, _, state, program in followed(selector, 16, valid=1.0, level=lambda round: 20.0 if round > 10 else 1.0):
        assert float(state.percentile) == program.percentile


LITTLE = {"explore": 0.4, "explore_least": 0.1, "cutoff": 0.95, "window": 2.0}


@pytest.mark.parametrize(("size", "options"), [*((6, options) for options in OPTIONS), (3, LITTLE)])
def test_cohorts_are_of_the_program_s_pools(size, options):
    """As many of each kind as the program takes, from the pool from which it draws; who fills the cohort is anybody."""
    selector = rule(**options).replace(size=size)
    state, program = selector.init(POPULATION), Program(selector)
    rng, compared = np.random.default_rng(1), 0
    for round in range(25):
        cohort = selector.select(state, jax.random.key(round), jnp.array(round), POPULATION)
        ids = np.asarray(cohort.ids)
        assert cohort.valid.all()
        assert len(set(ids.tolist())) == size
        pool, count, window, explore = program.pools() if round else (set(), 0, set(), 0)
        exploited, explored = set(ids[program.last[ids] > 0].tolist()), set(ids[program.last[ids] == 0].tolist())
        if count + explore == size:
            assert (len(exploited), len(explored)) == (count, explore)
            assert exploited <= pool
            assert explored <= window
            compared += count > 0
        else:
            assert len(exploited & pool) >= count
        losses = rng.uniform(0.1, 2, size).astype(np.float32)
        rows = np.asarray(selector.examples)[ids]
        state = selector.observe(state, cohort, {"loss": jnp.asarray(losses), "examples": jnp.asarray(rows)})
        program.feedback(ids, [True] * size, [float(x) for x in losses * rows])
    assert compared > 2


def test_draws_are_in_proportion_to_scores_and_examples():
    selector = rule(explore=0.5, explore_decay=1.0, cutoff=0.0, window=100.0).replace(size=2)
    state = selector.init(POPULATION)
    seen = np.arange(12)
    told = {"loss": jnp.linspace(0.5, 3.0, 12), "examples": jnp.full(12, 20.0)}
    state = selector.observe(state, Cohort(jnp.asarray(seen), jnp.ones(12, bool), jnp.ones(12)), told)
    ids = draw(selector, POPULATION, draws=20_000, state=state, round=1).ids
    scores = np.asarray(selector.score(state, jnp.array(1)))[seen]
    assert (ids[:, 0] < 12).all()
    # Exploited: one of eleven at most by the pool of ten times as many; the lowest is outside where it does not suffice.
    order = np.argsort(-scores)[:11]
    counts = np.bincount(ids[:, 0], minlength=12)
    inside = counts[:12] > 0
    assert set(order) <= set(np.flatnonzero(inside))
    assert fits(counts[:12][inside], scores[inside] / scores[inside].sum())
    promise = np.asarray(selector.examples * selector.slowness(state))[12:]
    likely = promise / promise.sum() * 20_000 > 5
    counts = np.bincount(ids[:, 1], minlength=POPULATION)[12:]
    assert counts.sum() == 20_000
    shares = np.append(promise[likely], promise[~likely].sum()) / promise.sum()
    assert fits(np.append(counts[likely], counts[~likely].sum()), shares)


def test_the_first_cohort_is_uniform():
    ids = draw(rule(), POPULATION).ids
    assert fits(np.bincount(ids.ravel(), minlength=POPULATION), np.ones(POPULATION) / POPULATION)


def test_who_took_part_too_often_is_left_out():
    selector = rule(most_picks=2, seconds=None)
    state = selector.init(POPULATION)._replace(
        picks=jnp.arange(POPULATION) % 5.0, last=jnp.ones(POPULATION), utility=jnp.ones(POPULATION)
    )
    # 16 of 40 have 3 or 4 picks; twelve are three of ten, those of 4 first.
    barred = np.asarray(selector.barred(state))
    assert barred.sum() == 12
    assert barred[np.arange(POPULATION) % 5 == 4].all()
    assert not set(draw(selector, POPULATION, 300, state, round=3).ids.ravel()) & set(np.flatnonzero(barred))


def test_worth_before_it_is_scaled():
    """Figures of the paper's formula: three losses of 1, 2 and 2 make 5.196; half as fast as the limit makes a quarter."""
    selector = Oort(1, examples=[3.0, 2.0], seconds=[10.0, 20.0], percentile=1.0)
    rows = jnp.array([3.0, 2.0])
    told = {"examples": rows, "loss_rms": jnp.sqrt(jnp.array([9.0, 25.0]) / rows)}
    state = selector.observe(selector.init(2), Cohort(jnp.arange(2), jnp.ones(2, bool), jnp.ones(2)), told)
    np.testing.assert_allclose(state.utility, [5.196152422707, 7.071067811865], rtol=1e-6)
    np.testing.assert_allclose(selector.slowness(state), [1.0, 0.25])


def test_presets_and_shapes():
    assert Oort.paper(2, np.ones(3)) == Oort(2, np.ones(3), explore_decay=0.95, explore_least=0.2, clip=0.98, cutoff=0.95)
    assert Oort.paper(2, np.ones(3), clip=0.9).clip == 0.9
    data = jaxfed.FederatedData.from_arrays({"x": np.ones(4, np.float32)}, np.arange(4))
    algorithm = jaxfed.fedavg(lambda p, b, k: b["x"] * p, lrate=0.1, batch_size=1)
    for arrays in ({"examples": np.ones(3)}, {"examples": np.ones(4), "seconds": np.ones(5)}):
        with pytest.raises(ValueError, match="expected a row for each of 4 clients"):
            jaxfed.Simulation(algorithm, data, selector=Oort(2, metric="loss", **arrays))
