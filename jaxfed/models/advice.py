"""Names the layers of a client's loss that are slow inside a compiled loop on a CPU, each with its remedy (pure JAX)."""

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxfed.base import Model
from jaxfed.programs import inner_programs

_ROWS = 8
_REMEDIES = {
    "conv_general_dilated": "A convolution's gradient inside a compiled loop is 15 to 60 times slower on a CPU than a matrix "
    "product: pass conv_general_dilated=jaxfed.models.layers.conv_general_dilated to Flax's Conv.",
    "reduce_window_max": "Max pooling by reduce_window has a slow gradient on a CPU: use jaxfed.models.layers.max_pool.",
    "scan": "A recurrent layer adds its kernel's gradient at every time step, which costs as much as the step: use "
    "jaxfed.models.rnn.RNN (NNXRNN for NNX), or the functions of jaxfed.models.recurrent.",
}


def slow_layers(function: Callable, *arguments: Any) -> list[str]:
    """What in a function would be slow in a client's training on a CPU, one sentence each with the remedy.

    Args:
        function: The client's loss or its model's forward pass, as JAX traces it.
        arguments: Its arguments, or their shapes and dtypes; nothing is computed.

    Returns:
        Sentences, none twice; empty if nothing slow was found. What has a gradient of its own (``jax.custom_vjp``) is trusted.

    Example:
        >>> import jax.numpy as jnp
        >>> def loss(kernel, x):
        ...     return jax.lax.conv(x, kernel, (1, 1), "VALID").sum()
        >>> [advice] = slow_layers(loss, jnp.ones((1, 1, 3, 3)), jnp.ones((2, 1, 8, 8)))
        >>> advice[:50]
        "A convolution's gradient inside a compiled loop is"
        >>> slow_layers(lambda w, x: x @ w, jnp.ones((2, 2)), jnp.ones((3, 2)))
        []
    """
    found = set(_slow(jax.make_jaxpr(function)(*arguments).jaxpr))
    return [sentence for name, sentence in _REMEDIES.items() if name in found]


def warn_of_slow_layers(model: Model, params: Any, stats: Any, arrays: dict[str, Any], key: jax.Array) -> None:
    """Says once for a loss, on a CPU, what in it is slow inside a compiled loop.

    Args:
        model: The loss, as a Model.
        params: Its weights.
        stats: Its statistics.
        arrays: ``[examples, ...]`` by key, whose shapes and types make a batch.
        key: A PRNG key, for its type.
    """
    if jax.default_backend() != "cpu":
        return
    # Rows of zeros: one of several processes may have no row of its own, and only shapes and types are looked at.
    batch: Any = {name: np.zeros((_ROWS, *x.shape[1:]), x.dtype) for name, x in arrays.items()} | {"mask": np.ones(_ROWS, bool)}
    leaves, structure = jax.tree.flatten((model, params, stats, batch, key))
    shapes = tuple(jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves)
    _warn_once(structure, shapes)


@functools.lru_cache(maxsize=32)
def _warn_once(structure: Any, shapes: tuple) -> None:
    def loss(*leaves: Any) -> Any:
        model, params, stats, batch, key = jax.tree.unflatten(structure, leaves)
        return model.loss(params, stats, batch, key)[0]

    for sentence in slow_layers(loss, *shapes):
        warnings.warn(sentence, stacklevel=5)


def _slow(jaxpr: core.Jaxpr) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in _REMEDIES and (name != "scan" or _is_recurrent(eqn)):
            yield name
        if not name.startswith("custom_vjp"):
            for inner in inner_programs(eqn):
                yield from _slow(inner)


def _is_recurrent(eqn: Any) -> bool:
    """Whether a scan multiplies something that it carries by a matrix that stays the same."""
    body = eqn.params["jaxpr"].jaxpr
    consts, carried = eqn.params["num_consts"], eqn.params["num_carry"]
    roles = [frozenset("s")] * consts
    # A state that the body hands on as it is stays the same too: NNX carries the weights.
    states = body.invars[consts : consts + carried]
    roles += [frozenset("s" if before is after else "c") for before, after in zip(states, body.outvars)]
    roles += [frozenset()] * (len(body.invars) - len(roles))
    return _multiplies(body, roles)[0]


def _multiplies(jaxpr: core.Jaxpr, roles: list[frozenset]) -> tuple[bool, list[frozenset]]:
    """Whether a product is of what changes ("c") and what stays ("s"), and of which kinds the outputs are made."""
    known = dict(zip(jaxpr.invars, roles))
    found = False

    def role(atom: Any) -> frozenset:
        return frozenset() if isinstance(atom, core.Literal) else known.get(atom, frozenset())

    for eqn in jaxpr.eqns:
        of = [role(atom) for atom in eqn.invars]
        out = [frozenset().union(*of)] * len(eqn.outvars)
        if eqn.primitive.name == "dot_general":
            found |= any("c" in a and b == {"s"} for a, b in (of, of[::-1]))
        inner = [program for program in inner_programs(eqn) if len(program.invars) == len(of)]
        if inner and eqn.primitive.name != "scan":
            hit, kinds = _multiplies(inner[0], of)
            found |= hit
            out = kinds if len(kinds) == len(out) else out
        known.update(zip(eqn.outvars, out))
    return found, [role(atom) for atom in jaxpr.outvars]
