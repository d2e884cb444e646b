"""Rows of tables against NumPy's own indexing, on one device, on eight and on the host."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.run import tables

SHARDED = """
import warnings, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxfed.run import tables
warnings.simplefilter("error")
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("clients",)), PartitionSpec("clients"))
whole, ids = np.arange(64.0, dtype=np.float32).reshape(16, 4), np.array([3, 9, 15])
for table in (jnp.asarray(whole), jax.random.split(jax.random.key(0), 16)):
    placed = jax.device_put(table, sharding)
    assert placed.sharding.num_devices == 8
    expected = np.asarray(jax.random.key_data(table) if tables.is_key(table) else table)[ids]
    got = tables.rows(placed, ids)
    assert got.tobytes() == expected.tobytes()
    empty = tables.zeros_like(placed)
    filled = tables.put(empty, ids, got)
    assert filled.sharding == sharding
    assert tables.rows(filled, ids).tobytes() == expected.tobytes()
    assert not tables.rows(filled, np.setdiff1d(np.arange(16), ids)).any()
"""


def test_a_sharded_table_stays_sharded():
    root = str(Path(__file__).resolve().parents[2])
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    result = subprocess.run([sys.executable, "-c", SHARDED], env=os.environ | flags, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("place", [jnp.array, np.array])
@pytest.mark.parametrize("ids", [[0], [4, 1], [2, 0, 4], [0, 1, 2, 3, 4]])
def test_rows_and_put_are_indexing(place, ids):
    whole, ids = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32), np.array(ids)
    assert np.array_equal(tables.rows(place(whole), ids), whole[ids])
    expected = whole.copy()
    expected[ids] = 7
    assert np.array_equal(tables.put(place(whole), ids, np.full((len(ids), 2, 3), 7, np.float32)), expected)


def test_a_table_is_put_in_its_own_buffer():
    table = tables.zeros_like(jnp.zeros((1000, 10)))
    where = table.unsafe_buffer_pointer()
    assert tables.put(table, np.arange(3), np.ones((3, 10), np.float32)).unsafe_buffer_pointer() == where
    assert table.is_deleted()


def test_a_hole_in_a_file_stays_a_hole(tmp_path):
    table = np.memmap(tmp_path / "table", np.float32, "w+", shape=(2**22, 4))
    table[7] = np.nan
    assert tables.zeros_like(table) is table
    assert not table.any()
    table.flush()
    # One block was written, of the eight that the file has.
    assert os.stat(tmp_path / "table").st_blocks * 512 < 2 * 2**23


def test_a_file_that_cannot_be_written_is_left_alone(tmp_path):
    np.full(4, 3.0).tofile(tmp_path / "table")
    table = np.memmap(tmp_path / "table", float, "r", shape=(4,))
    assert tables.zeros_like(table) is not table
    assert (table == 3).all()


def test_blocks_hold_a_row_at_least_and_cover_all():
    ids = np.arange(10)
    for row in (0, 1, 2**22, 2**30):
        blocks = tables.blocks(ids, row)
        assert np.array_equal(np.concatenate(blocks), ids)
        assert all(len(block) * row <= 2**23 or len(block) == 1 for block in blocks)
    assert tables.blocks(ids[:0], 4) == []


def test_nothing_is_fetched_to_learn_how_keys_are_stored():
    keys = jax.random.split(jax.random.key(0), 5)
    assert (tables.stored(keys).shape, tables.row_bytes(keys)) == ((5, 2), 8)
