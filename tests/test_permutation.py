"""Keyed permutations: bijective, fair, and evaluated at single positions."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxfed import permutation
from jaxfed.permutation import permute


@jax.jit
def orders(keys, size, positions):
    return jax.vmap(lambda key: permute(key, positions, size))(keys)


def test_every_size_up_to_seventy_is_permuted():
    positions = jnp.arange(70)
    for size in range(1, 71):
        found = np.asarray(orders(jax.random.split(jax.random.key(size), 3), size, jnp.minimum(positions, size - 1)))[:, :size]
        np.testing.assert_array_equal(np.sort(found), np.tile(np.arange(size), (3, 1)))


@pytest.mark.parametrize("size", [2**12 - 1, 2**12, 2**12 + 1, 100_003])
def test_large_sizes_are_permuted(size):
    found = np.asarray(permute(jax.random.key(0), jnp.arange(size), size))
    np.testing.assert_array_equal(np.sort(found), np.arange(size))
    assert abs(stats.spearmanr(found, np.arange(size)).statistic) < 5 / np.sqrt(size)


@pytest.mark.parametrize("size", [2**31 - 1, 2**30, 2**30 + 1])
def test_points_of_the_largest_sizes_are_distinct_and_inside(size):
    positions = jnp.concatenate([jnp.arange(500), size - 1 - jnp.arange(500)])
    found = np.asarray(permute(jax.random.key(1), positions, size))
    assert len(set(found.tolist())) == 1000
    assert (found >= 0).all()
    assert (found < size).all()
    assert stats.kstest(found / size, "uniform").pvalue > 1e-4


def test_the_answer_depends_on_the_key_and_not_on_the_shape_or_the_neighbours():
    one, other = (np.asarray(permute(jax.random.key(seed), jnp.arange(12), 12)) for seed in (0, 1))
    assert (one != other).any()
    np.testing.assert_array_equal(permute(jax.random.key(0), jnp.arange(12).reshape(3, 4), 12).ravel(), one)
    assert [int(permute(jax.random.key(0), jnp.array(i), 12)) for i in range(12)] == one.tolist()
    assert permute(jax.random.key(0), jnp.arange(12), 12).dtype == jnp.int32


def test_every_tweak_gives_another_order():
    tweaked = {tuple(permute(jax.random.key(0), jnp.arange(9), 9, tweak).tolist()) for tweak in range(50)}
    assert len(tweaked) == 50


def test_the_program_is_the_same_for_every_size():
    lower = jax.jit(partial(permute, jax.random.key(0), jnp.arange(10))).lower
    assert lower(jnp.int32(10)).as_text() == lower(jnp.int32(10_000_000)).as_text()


# Fairness. Two-sided: too even is no more random than too uneven.

DRAWS, N = 40_000, 5


def draw():
    keys = jax.random.split(jax.random.key(7), DRAWS)
    return np.asarray(orders.__wrapped__(keys, N, jnp.arange(N)))


def by_place(found):
    """Position x value: N x N cells whose rows and columns all add up to DRAWS, hence (N - 1) ** 2 degrees of freedom."""
    counts = np.array([np.bincount(found[:, i], minlength=N) for i in range(N)])
    expected = DRAWS / N
    return stats.chi2.cdf(((counts - expected) ** 2 / expected).sum() * (N - 1) / N, (N - 1) ** 2)


def by_cell(codes, cells):
    counts = np.unique(codes, return_counts=True)[1]
    return stats.chisquare(np.pad(counts, (0, cells - len(counts)))).pvalue


def p_values(found):
    """By place, by the pairs to which neighbours go (N (N - 1) = 20 each), and by whole orders (N! = 120)."""
    pairs = [by_cell(found[:, i] * N + found[:, i + 1], 20) for i in range(N - 1)]
    return np.array([by_place(found), *pairs, by_cell(found @ N ** np.arange(N), 120)])


def is_fair(found):
    values = p_values(found)
    return bool(((values > 1e-4) & (values < 1 - 1e-4)).all())


def test_all_orders_of_five_are_equally_likely():
    assert is_fair(draw())


@pytest.mark.parametrize(("rounds", "side"), [(2, 8), (8, 2)])
def test_fewer_rounds_or_smaller_sides_would_be_unfair(rounds, side, monkeypatch):
    monkeypatch.setattr(permutation, "_ROUNDS", rounds)
    monkeypatch.setattr(permutation, "_SMALLEST_SIDE", side)
    assert not is_fair(draw())


def test_the_test_of_fairness_refuses_what_is_too_even():
    every_order = np.array(list(itertools.permutations(range(N))))
    assert not is_fair(np.resize(every_order, (DRAWS, N)))


def test_numpy_passes_the_test_of_fairness():
    rng = np.random.default_rng(0)
    assert is_fair(rng.permuted(np.tile(np.arange(N), (DRAWS, 1)), axis=1))
