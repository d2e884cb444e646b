"""Rows of a table ``[N, ...]`` of what clients keep, on a device or on the host; only those that are asked for move.

A table is a ``jax.Array`` (of typed keys too, on one device or sharded over several) or a ``numpy.ndarray``, mapped to a file or
not. Rows travel as NumPy arrays, those of keys as their numbers.
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_BLOCK_BYTES = 2**23


def is_key(leaf: Any) -> bool:
    """Whether an array holds typed PRNG keys, which are stored as their numbers."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def stored(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape and type under which an array is stored; nothing is fetched.

    >>> stored(jax.random.key(0))
    ShapeDtypeStruct(shape=(2,), dtype=uint32)
    """
    like = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(np.shape(like), np.dtype(like.dtype))


def row_bytes(table: Any) -> int:
    """The bytes of one row."""
    like = stored(table)
    return int(np.prod(like.shape[1:], dtype=np.int64)) * like.dtype.itemsize


def blocks(ids: np.ndarray, bytes_per_row: int) -> list[np.ndarray]:
    """Cuts ids ``[c]`` into pieces whose rows fit into a few MiB.

    >>> blocks(np.arange(5), bytes_per_row=2**22)
    [array([0, 1]), array([2, 3]), array([4])]
    """
    size = max(1, _BLOCK_BYTES // max(1, bytes_per_row))
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def rows(table: Any, ids: np.ndarray) -> np.ndarray:
    """The rows of these clients.

    Args:
        table: ``[N, ...]``.
        ids: ``[c]``, each below N.

    Returns:
        ``[c, ...]``, a copy on the host.

    Example:
        >>> rows(jnp.arange(8).reshape(4, 2), np.array([3, 0]))
        array([[6, 7],
               [0, 1]], dtype=int32)
    """
    if isinstance(table, np.ndarray):
        return np.asarray(table[ids])
    return np.asarray(_take(table, _padded(ids, 0)))[: len(ids)]


def put(table: Any, ids: np.ndarray, values: np.ndarray) -> Any:
    """The table with these clients' rows replaced: in place on the host, and on a device in the buffer of the one that was given.

    Args:
        table: ``[N, ...]``; it must not be used afterwards.
        ids: ``[c]``, each below N and none twice.
        values: ``[c, ...]`` as :func:`rows` gives them.

    Example:
        >>> put(jnp.zeros((3, 2)), np.array([1]), np.ones((1, 2), np.float32))[:, 0]
        Array([0., 1., 0.], dtype=float32)
    """
    if isinstance(table, np.ndarray):
        table[ids] = values
        return table
    padding = np.zeros((_power_of_two(len(ids)) - len(ids), *values.shape[1:]), values.dtype)
    # Padding has the number N, which a scatter drops.
    numbers = _padded(ids, table.shape[0])
    return _putter(_sharding(table))(table, numbers, np.concatenate([values, padding]))


def zeros_like(table: Any) -> Any:
    """An empty table of the same kind and in the same place; one that is mapped to a writable file is emptied itself.

    >>> zeros_like(jnp.ones(3))
    Array([0., 0., 0.], dtype=float32)
    """
    if isinstance(table, np.memmap) and table.flags.writeable:
        _clear(table)
        return table
    if isinstance(table, np.ndarray):
        return np.zeros(table.shape, table.dtype)
    like, impl = stored(table), jax.random.key_impl(table) if is_key(table) else None
    return _zeros(like.shape, like.dtype, impl, _sharding(table))()


def _clear(table: np.memmap) -> None:
    for ids in blocks(np.arange(len(table)), row_bytes(table)):
        block = table[ids[0] : ids[-1] + 1]
        # A hole in a file stays a hole that takes no room, unless it is written to.
        if np.asarray(block).view(np.uint8).any():
            block[...] = np.zeros((), table.dtype)


@cache
def _zeros(shape: tuple[int, ...], dtype: np.dtype, impl: Any, sharding: Any) -> Any:
    """The program that makes a table; compiled once for each kind."""

    def make() -> jax.Array:
        raw = jnp.zeros(shape, dtype)
        return raw if impl is None else jax.random.wrap_key_data(raw, impl=impl)

    return jax.jit(make, out_shardings=sharding)


@jax.jit
def _take(table: jax.Array, ids: jax.Array) -> jax.Array:
    taken = table[ids]
    return jax.random.key_data(taken) if jnp.issubdtype(table.dtype, jax.dtypes.prng_key) else taken


@cache
def _putter(sharding: Any) -> Any:
    @partial(jax.jit, donate_argnums=0, out_shardings=sharding)
    def put(table: jax.Array, ids: jax.Array, values: jax.Array) -> jax.Array:
        if jnp.issubdtype(table.dtype, jax.dtypes.prng_key):
            values = jax.random.wrap_key_data(values, impl=jax.random.key_impl(table))
        return table.at[ids].set(values, mode="drop")

    return put


def _sharding(table: jax.Array) -> Any:
    """None for an array that nobody has placed: what is computed from it may go anywhere."""
    return table.sharding if table.committed else None


def _padded(ids: np.ndarray, fill: int) -> np.ndarray:
    """Ids ``[a power of two]``, so that few programs serve every number of rows."""
    return np.concatenate([ids, np.full(_power_of_two(len(ids)) - len(ids), fill, ids.dtype)]).astype(np.int32)


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
