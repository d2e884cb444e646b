"""Shuffling and sampling: a cost by positions, not by what is permuted."""

import jax
import jax.numpy as jnp
import pytest

from jaxfed.permutation import permute


@pytest.mark.parametrize("size", [100, 10_000, 1_000_000])
def test_cohort_of_100(timed, size):
    drawn = timed(lambda key: permute(key, jnp.arange(100), size), jax.random.key(0))
    assert len(set(drawn.tolist())) == 100


def test_batch_of_20(timed):
    timed(lambda key, size: permute(key, jnp.arange(20), size), jax.random.key(0), jnp.int32(83))


def test_jax_choice_of_100_of_a_million(timed):
    """What sampling costs that permutes everyone, for comparison."""
    timed(lambda key: jax.random.choice(key, 1_000_000, (100,), replace=False), jax.random.key(0))
