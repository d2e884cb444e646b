"""Rows of a table go to their lanes and back, whatever they hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.engine.lanes import Lane, Outcome, fold_waves

COUNT = 6
OUTSIDE = COUNT


def table():
    return {
        "number": jnp.arange(COUNT, dtype=float),
        "matrix": jnp.arange(COUNT * 6, dtype=float).reshape(COUNT, 2, 3),
        "flag": jnp.arange(COUNT) % 2 == 0,
        "nothing": jnp.zeros((COUNT, 0, 3)),
        "key": jax.random.split(jax.random.key(0), COUNT),
    }


def changed(row):
    new = {"number": row["number"] + 100, "matrix": row["matrix"] + 100, "flag": ~row["flag"]}
    return row | new | {"key": jax.random.fold_in(row["key"], 1)}


def visit(lane, row):
    return Outcome(row["matrix"], changed(row), row["number"], (), lane.place < COUNT)


def plain(tree):
    return tree | {"key": jax.random.key_data(tree["key"])}


@pytest.mark.parametrize("lanes", [1, 2])
def test_each_lane_sees_the_row_of_its_place_and_changes_that_alone(lanes):
    places = jnp.array([4, 1, 3, OUTSIDE])
    waves = Lane(*[places.reshape(-1, lanes)] * len(Lane._fields))
    total, new, outcome = jax.jit(fold_waves, static_argnums=0)(visit, waves, len(places) // lanes, table())

    expected = table()
    for place in (4, 1, 3):
        row = changed({name: leaf[place] for name, leaf in expected.items()})
        expected = {name: leaf.at[place].set(row[name]) for name, leaf in expected.items()}
    jax.tree.map(np.testing.assert_array_equal, plain(new), plain(expected))
    # A place outside is read as the last row and never written.
    seen = np.array([4, 1, 3, COUNT - 1])
    np.testing.assert_array_equal(outcome.row.reshape(-1), seen)
    np.testing.assert_array_equal(total, np.arange(COUNT * 6.0).reshape(COUNT, 2, 3)[seen].sum(0))
