"""Keyed permutations evaluated at single positions: shuffling and sampling without an array of the population's size."""

import jax
import jax.numpy as jnp

# Four rounds, or halves of two bits, are visibly unfair at n = 5.
_ROUNDS = 8
_SMALLEST_HALF = 3


def permute(key: jax.Array, positions: jax.Array, size: jax.Array | int) -> jax.Array:
    """Where a random permutation of ``range(size)`` sends each position.

    A Feistel network over the smallest even number of bits that holds ``size`` (at least six), walked until it lands inside. The
    cost depends on the number of positions alone: 100 clients out of a million take as long as out of a thousand.

    Args:
        key: A PRNG key: it decides the permutation.
        positions: Integers from 0 to ``size - 1``, of any shape.
        size: How many elements are permuted, at least 1; may be traced.

    Returns:
        Distinct integers from 0 to ``size - 1`` for distinct positions, int32.

    Example:
        >>> order = permute(jax.random.key(0), jnp.arange(7), 7)
        >>> print(jnp.sort(order))
        [0 1 2 3 4 5 6]
    """
    size = jnp.maximum(jnp.asarray(size, jnp.uint32), 1)
    bits = 32 - jax.lax.clz(size - 1)
    half = jnp.maximum((bits + 1) // 2, _SMALLEST_HALF)
    round_keys = jax.random.bits(key, (_ROUNDS,), jnp.uint32)

    def walk(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        values, outside = carry
        values = jnp.where(outside, _feistel(values, half, round_keys), values)
        return values, values >= size

    # The first pass is part of the loop: unrolled twice, the network would double the time that a round takes to compile.
    # A position outside would be walked for ever.
    start = jnp.minimum(jnp.asarray(positions, jnp.uint32), size - 1)
    return jax.lax.while_loop(lambda carry: carry[1].any(), walk, (start, start >= 0))[0].astype(jnp.int32)


def _feistel(values: jax.Array, half: jax.Array, round_keys: jax.Array) -> jax.Array:
    """A bijection of ``[0, 4**half)``."""
    mask = (jnp.uint32(1) << half) - 1
    left, right = values >> half, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_hash(right ^ round_key) & mask)
    return (left << half) | right


def _hash(x: jax.Array) -> jax.Array:
    """The 32-bit finaliser of MurmurHash3: every input bit reaches every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
