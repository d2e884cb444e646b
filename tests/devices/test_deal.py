"""Who comes when on which device: against a plain loop, and how even it is."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfed.engine.cohort import deal

# Few shapes: each is compiled.
CLIENTS = 7
SHAPES = [(1, 1), (2, 1), (3, 3), (2, 2), (8, 1)]


def deal_by_hand(steps, devices, lanes):
    """Cards dealt in groups, there and back again, to those with work."""
    there = sorted((client for client, n in enumerate(steps) if n >= 0), key=lambda client: -steps[client])
    hands, order = [[] for _ in range(devices)], list(range(devices))
    while there:
        for device in order:
            hands[device].append(there[:lanes])
            there = there[lanes:]
        order.reverse()
    return hands


def dealt(steps, devices, lanes):
    """Each device's groups, as numbers of clients."""
    deck, waves = _deal(jnp.asarray(steps), jnp.asarray(sum(n >= 0 for n in steps)), devices=devices, lanes=lanes)
    assert deck.shape == (devices, -(-len(steps) // (devices * lanes)), lanes)
    assert (deck[:, int(waves) :] == len(steps)).all()
    return [[[client for client in group if client < len(steps)] for group in hand[: int(waves)]] for hand in deck.tolist()]


@partial(jax.jit, static_argnames=("devices", "lanes"))
def _deal(steps, count, *, devices, lanes):
    return deal(steps, count, devices, lanes)


cohorts = st.lists(st.integers(-1, 50), min_size=CLIENTS, max_size=CLIENTS)


@pytest.mark.parametrize(("devices", "lanes"), SHAPES)
@settings(max_examples=30, deadline=None, database=None)
@given(steps=cohorts)
def test_like_a_loop_and_even(devices, lanes, steps):
    hands = dealt(steps, devices, lanes)
    assert hands == deal_by_hand(steps, devices, lanes)
    assert sorted(client for hand in hands for group in hand for client in group) == [i for i, n in enumerate(steps) if n >= 0]
    loads = np.array([sum(max((steps[client] for client in group), default=0) for group in hand) for hand in hands])
    assert loads.max() - loads.min() <= max(0, *steps)


@pytest.mark.parametrize("size", [1, 100])
def test_other_numbers_of_clients(size):
    steps = np.random.default_rng(size).integers(0, 9, size).tolist()
    assert dealt(steps, 3, 2) == deal_by_hand(steps, 3, 2)


def test_the_bound_is_reached():
    """One long client among those without work: nothing can even that out."""
    steps = [9, 0, 0, 0, 0, 0, 0]
    loads = [sum(steps[client] for group in hand for client in group) for hand in dealt(steps, 2, 1)]
    assert sorted(loads) == [0, 9]
