"""Keyed permutations evaluated at single positions: shuffling and sampling without an array of the population's size."""

import jax
import jax.numpy as jnp

# Two rounds, or six with sides of four, are visibly unfair at n = 5.
_ROUNDS = 8
_SMALLEST_SIDE = 8
# 2**32 over the golden ratio: its multiples are spread evenly.
_GOLDEN = 0x9E3779B9


def permute(key: jax.Array, positions: jax.Array, size: jax.Array | int, tweak: jax.Array | int = 0) -> jax.Array:
    """Where a random permutation of ``range(size)`` sends each position.

    A Feistel network on a rectangle of at least ``size`` cells, as square as can be and at least 8 by 8, walked until it lands
    inside: rows and columns are shifted in turn by a hash of the other. The cost depends on the number of positions alone: 100
    clients out of a million take as long as out of a thousand.

    Args:
        key: A PRNG key: it decides the permutation. Its bits are hashed as they are: a call of JAX's generator would cost as much
            as the walk.
        positions: Integers from 0 to ``size - 1``, of any shape.
        size: How many elements are permuted, at least 1; may be traced.
        tweak: An integer; each gives another permutation for the same key.

    Returns:
        Distinct integers from 0 to ``size - 1`` for distinct positions, int32.

    Example:
        >>> order = permute(jax.random.key(0), jnp.arange(7), 7)
        >>> print(jnp.sort(order))
        [0 1 2 3 4 5 6]

    References:
        Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002
    """
    size = jnp.maximum(jnp.asarray(size, jnp.uint32), 1)
    rows = jnp.maximum(jnp.ceil(jnp.sqrt(size.astype(jnp.float32))).astype(jnp.uint32), _SMALLEST_SIDE)
    columns = jnp.maximum((size + rows - 1) // rows, _SMALLEST_SIDE)
    round_keys = _round_keys(key, tweak)

    def is_outside(cells: jax.Array) -> jax.Array:
        return (cells >> 16) * columns + (cells & 0xFFFF) >= size

    def walk(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        cells, first = carry
        moved = _feistel(cells, rows, columns, round_keys)
        return jnp.where(first | is_outside(cells), moved, cells), jnp.zeros_like(first)

    # A position outside would be walked for ever.
    start = jnp.minimum(jnp.asarray(positions, jnp.uint32), size - 1)
    # Row and column in one number: two would be computed apart, at twice the time to compile and to run.
    cells = (start // columns) << 16 | (start - start // columns * columns)
    # The first pass is part of the loop: unrolled twice, the network would double the time that a round takes to compile.
    cells, _ = jax.lax.while_loop(lambda c: (c[1] | is_outside(c[0])).any(), walk, (cells, jnp.ones((), bool)))
    return ((cells >> 16) * columns + (cells & 0xFFFF)).astype(jnp.int32)


def _round_keys(key: jax.Array, tweak: jax.Array | int) -> jax.Array:
    keys = jnp.arange(_ROUNDS, dtype=jnp.uint32) * jnp.uint32(_GOLDEN)
    for word in jax.random.key_data(key):
        keys = _hash(keys ^ word)
    return _hash(keys ^ jnp.asarray(tweak, jnp.uint32))


def _feistel(cells: jax.Array, rows: jax.Array, columns: jax.Array, round_keys: jax.Array) -> jax.Array:
    """A bijection of the cells of a rectangle, ``row << 16 | column``."""
    row, column = cells >> 16, cells & 0xFFFF
    for even, odd in zip(round_keys[::2], round_keys[1::2]):
        row = _shift(row, _hash(column ^ even), rows)
        column = _shift(column, _hash(row ^ odd), columns)
    return row << 16 | column


def _shift(place: jax.Array, bits: jax.Array, side: jax.Array) -> jax.Array:
    """A place on a side of at most 2**16, moved round it by a random distance."""
    moved = place + (((bits >> 16) * side) >> 16)
    return jnp.where(moved >= side, moved - side, moved)


def _hash(x: jax.Array) -> jax.Array:
    """The 32-bit finaliser of MurmurHash3: every input bit reaches every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
