"""The verbs on pytrees that the parts are written in. A rate is cast to each leaf's dtype where it is used."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxfed import checks

Tree = Any
Scalar = Any


def cast(rate: Scalar, leaf: jax.Array) -> jax.Array:
    """A number in the dtype of a leaf, so that a swept float32 rate does not widen bfloat16 weights."""
    return jnp.asarray(rate, jnp.result_type(leaf))


def copy(tree: Tree) -> Tree:
    """The same values in buffers of their own: what must outlive a donated original."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def zeros_like(tree: Tree) -> Tree:
    """Zeros of the same shapes and dtypes."""
    return jax.tree.map(jnp.zeros_like, tree)


def full_like(tree: Tree, value: Scalar) -> Tree:
    """One value everywhere, in the same shapes and dtypes."""
    return jax.tree.map(lambda x: jnp.full_like(x, value), tree)


def subtract(left: Tree, right: Tree) -> Tree:
    """``left - right``, leaf by leaf."""
    return jax.tree.map(jnp.subtract, left, right)


def scale(rate: Scalar, tree: Tree) -> Tree:
    """``rate * tree``.

    >>> import jax.numpy as jnp
    >>> print(scale(0.5, jnp.ones(2, jnp.bfloat16)))
    [0.5 0.5]
    """
    return jax.tree.map(lambda x: cast(rate, x) * x, tree)


def divide(tree: Tree, number: Scalar) -> Tree:
    """``tree / number``, the number cast before dividing: an int32 count would divide in float32 even under float64."""
    return jax.tree.map(lambda x: x / cast(number, x), tree)


def add_scaled(left: Tree, rate: Scalar, right: Tree) -> Tree:
    """``left + rate * right``."""
    return jax.tree.map(lambda x, y: x + cast(rate, x) * y, left, right)


def add_noise(tree: Tree, std: Scalar, key: jax.Array) -> Tree:
    """The tree with independent Gaussian noise of a standard deviation on every entry."""
    return add_scaled(tree, std, optax.tree.random_like(key, tree, jax.random.normal))


def average(decay: Scalar, old: Tree, new: Tree) -> Tree:
    """``decay * old + (1 - decay) * new``, one step of an exponential moving average."""
    return jax.tree.map(lambda x, y: cast(decay, y) * x + cast(1 - decay, y) * y, old, new)


def square(tree: Tree) -> Tree:
    """Elementwise squares."""
    return jax.tree.map(jnp.square, tree)


def widen(tree: Tree) -> Tree:
    """Floating leaves in float32 or wider, for sums: a thousand bfloat16 tenths add up to 100, not 32."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32)) if _floats(x) else x, tree)


def cast_like(tree: Tree, like: Tree) -> Tree:
    """The values of ``tree`` in the dtypes of ``like``."""
    return jax.tree.map(lambda x, y: jnp.asarray(x, jnp.result_type(y)), tree, like)


def norm(tree: Tree) -> jax.Array:
    """The Euclidean norm over all leaves together, computed in float32 or wider; 0 for an empty tree."""
    squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(widen(tree))]
    return jnp.sqrt(sum(squares, start=jnp.zeros(())))


def select(condition: jax.Array | bool, yes: Tree, no: Tree) -> Tree:
    """``yes`` where the scalar condition holds, else ``no``; typed PRNG keys are leaves like others."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def where_rows(keep: jax.Array, tree: Tree) -> Tree:
    """The rows of leaves ``[C, ...]`` where ``keep [C]``, and zeros in place of the others, whatever they held.

    >>> import jax.numpy as jnp
    >>> print(where_rows(jnp.array([True, False]), jnp.array([1.0, jnp.nan])))
    [1. 0.]
    """
    return jax.vmap(lambda k, row: select(k, row, zeros_like(row)))(keep, tree)


def weighted_mean(tree: Tree, weights: jax.Array) -> Tree:
    """The mean over the rows of leaves ``[C, ...]`` by ``weights [C]``; zeros if all weights are 0.

    >>> import jax.numpy as jnp
    >>> print(weighted_mean(jnp.array([1.0, 5.0]), jnp.array([3.0, 1.0])))
    2.0
    """
    total = weights.sum()
    shares = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0)
    return jax.tree.map(lambda x: x.sum(0), jax.vmap(scale)(shares, tree))


def merge(partial: Tree, whole: Tree) -> Tree:
    """The leaves of ``partial``, and those of ``whole`` where ``partial`` has None.

    >>> merge({"bias": None, "kernel": 5}, {"bias": 1, "kernel": 2})
    {'bias': 1, 'kernel': 5}
    """
    return jax.tree.map(lambda x, y: y if x is None else x, partial, whole, is_leaf=lambda x: x is None)


def keep_leaves(tree: Tree, keep: Callable[[str], bool]) -> Tree:
    """The leaves whose name satisfies ``keep``, and None in place of the others.

    >>> keep_leaves({"bias": 1, "kernel": 2}, lambda name: name == "bias")
    {'bias': 1, 'kernel': None}
    """
    return map_with_names(lambda name, leaf: leaf if keep(name) else None, tree)


def all_finite(tree: Tree) -> jax.Array:
    """Whether no floating leaf holds NaN or an infinity, as a scalar bool."""
    finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree) if _floats(x)]
    return jnp.all(jnp.stack(finite)) if finite else jnp.array(True)


def map_with_names(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Maps ``function(name, leaf, ...)`` where a leaf's name is its path: ``dense/kernel``."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(checks.leaf_name(path), *leaves), tree, *rest)


def names(tree: Tree) -> list[str]:
    """The names of all leaves, in order.

    >>> names({"dense": {"bias": 0, "kernel": 0}})
    ['dense/bias', 'dense/kernel']
    """
    return [checks.leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _floats(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)
