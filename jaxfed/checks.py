"""Every error text about the values of hyper-parameters: what was expected, what came, what to do.

Each check returns the value in the form that the library stores, or raises before anything runs.
"""

import difflib
from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

T = TypeVar("T")


class Bounds:
    """An interval of allowed numbers, each end open, closed or absent.

    >>> print(Bounds(at_least=0, below=1))
    at least 0 and below 1
    """

    def __init__(
        self,
        at_least: float | None = None,
        above: float | None = None,
        at_most: float | None = None,
        below: float | None = None,
    ):
        self.limits = {"at least": at_least, "above": above, "at most": at_most, "below": below}

    def __str__(self) -> str:
        given = [(word, limit) for word, limit in self.limits.items() if limit is not None]
        return " and ".join(f"{word} {limit if isinstance(limit, int) else f'{limit:g}'}" for word, limit in given)

    def hold(self, values: np.ndarray) -> bool:
        """Whether all values are finite and lie inside."""
        tests = {"at least": np.greater_equal, "above": np.greater, "at most": np.less_equal, "below": np.less}
        inside = (tests[word](values, limit).all() for word, limit in self.limits.items() if limit is not None)
        return bool(np.isfinite(values).all()) and all(inside)


def number(where: str, value: Any, bounds: Bounds) -> Any:
    """A number hyper-parameter: a Python float, a float array of swept values, or a tracer as it is.

    Raises:
        TypeError: For anything that is not a real number (a bool, a string, None).
        ValueError: For NaN, infinities and numbers outside ``bounds``.

    >>> number("Adam.beta_1", 0, Bounds(at_least=0, below=1))
    0.0
    """
    if is_traced(value):
        return value
    values = _real(where, value, "a number")
    if not bounds.hold(values):
        limits = f" {bounds}" if str(bounds) else ""
        raise ValueError(f"{where}: expected a finite number{limits}, got {value!r}.")
    return float(values) if values.ndim == 0 else jnp.asarray(values, float)


def count(where: str, value: Any, bounds: Bounds) -> Any:
    """An integer hyper-parameter that is data (it sizes no array): a Python int, an array of swept values or a tracer.

    Raises:
        TypeError: For anything that is not an integer. A whole float such as 2.0 passes.
        ValueError: For integers outside ``bounds``.
    """
    if is_traced(value):
        return value
    values = _real(where, value, "an integer")
    if not bounds.hold(values):
        raise ValueError(f"{where}: expected an integer {bounds}, got {value!r}.")
    if (values != np.round(values)).any():
        raise TypeError(f"{where}: expected an integer, got {value!r}.")
    # From the value itself: in float64 an integer above 2**53 has lost its last digits.
    return int(np.asarray(value)) if values.ndim == 0 else jnp.asarray(value, int)


def by_client(where: str, value: Any, bounds: Bounds, ndim: int = 1) -> Any:
    """A number for each client ``[N]``, or a row of numbers ``[N, ...]``, as a float array.

    Raises:
        TypeError: For anything that is not real numbers.
        ValueError: For another number of axes, NaN, infinities and numbers outside ``bounds``.

    >>> by_client("Weighted.weights", 1.0, Bounds(at_least=0))
    Traceback (most recent call last):
    ...
    ValueError: Weighted.weights: expected an array with 1 axis, the first of it clients, got shape ().
    """
    if is_traced(value):
        return value
    values = _real(where, value, "a number for each client")
    if values.ndim != ndim:
        axes = "1 axis" if ndim == 1 else f"{ndim} axes"
        raise ValueError(f"{where}: expected an array with {axes}, the first of it clients, got shape {values.shape}.")
    if not bounds.hold(values):
        raise ValueError(f"{where}: expected finite numbers {bounds}, got {describe(value)}.")
    return jnp.asarray(values, float)


def a_row_for_each(where: str, value: Any, population: int) -> None:
    """Raises ValueError unless an array's first axis is the population."""
    if len(value) != population:
        raise ValueError(f"{where}: expected a row for each of {population} clients, got {len(value)}.")


def is_traced(value: Any) -> bool:
    """Whether a value is known only inside a compiled program."""
    return isinstance(value, Tracer)


def _real(where: str, value: Any, expected: str) -> np.ndarray:
    try:
        if isinstance(value, (bool, str)) or value is None:
            raise TypeError
        values = np.asarray(value)
    except TypeError:
        raise TypeError(f"{where}: expected {expected}, got {describe(value)}.") from None
    # ml_dtypes (bfloat16) are of kind "V" for NumPy; jnp knows them as floating.
    if values.dtype == bool or not (jnp.issubdtype(values.dtype, jnp.floating) or values.dtype.kind in "iu"):
        raise TypeError(f"{where}: expected {expected}, got {describe(value)}.")
    return values.astype(np.float64)


def choice(where: str, value: Any, choices: Iterable[Any]) -> Any:
    """One of a few values.

    >>> choice("Mean.by", "example", ("examples", "steps", "uniform"))
    Traceback (most recent call last):
    ...
    ValueError: Mean.by: expected one of 'examples', 'steps', 'uniform', got 'example'. Did you mean 'examples'?
    """
    choices = tuple(choices)
    if not any(value == c and type(value) is type(c) for c in choices):
        raise ValueError(f"{where}: expected one of {listing(choices)}, got {value!r}.{closest(value, choices)}")
    return value


def known_name(what: str, name: Any, known: Iterable[str]) -> None:
    """Raises ValueError unless ``name`` is one of the ``known`` names of ``what``."""
    known = sorted(known)
    if name not in known:
        raise ValueError(f"No {what} is called {name!r}.{closest(name, known)} Known: {', '.join(known) or 'none'}.")


def known_options(owner: str, options: Iterable[str], accepted: Iterable[str]) -> None:
    """Raises ValueError that names each option that ``owner`` does not accept."""
    accepted = tuple(accepted)
    for option in options:
        if option not in accepted:
            names = ", ".join(accepted) or "no options"
            raise ValueError(f"{owner} has no option {option!r}.{closest(option, accepted)} It accepts: {names}.")


def instance(where: str, value: Any, expected: type[T], remedy: str = "") -> T:
    """An instance of a type, returned as it is; else TypeError with the remedy."""
    if isinstance(value, expected):
        return value
    raise TypeError(f"{where}: expected {expected.__name__}, got {describe(value)}.{' ' + remedy if remedy else ''}")


def leaf_name(path: Any) -> str:
    """The name of a leaf as users write it: ``dense/kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def describe(value: Any) -> str:
    """A short text for a value in an error: its repr and its type.

    >>> describe("fast")
    "'fast' (str)"
    """
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def listing(values: Iterable[Any]) -> str:
    """Values in a row for an error text."""
    return ", ".join(repr(v) for v in values)


def closest(value: Any, known: Iterable[Any]) -> str:
    """`` Did you mean 'x'?`` where a known name is near, else an empty text."""
    near = difflib.get_close_matches(str(value), [str(k) for k in known], n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def prng_key(key: Any) -> jax.Array:
    """A typed PRNG key as it is.

    Raises:
        TypeError: For anything else.
    """
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim:
        raise TypeError(f"key: expected one PRNG key, got {describe(key)}. Make it with jax.random.key(seed).")
    return key


def trainable(params: Any) -> Any:
    """Weights as arrays.

    Raises:
        TypeError: If a leaf is no floating number.
        ValueError: If there is none, or one is not finite.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("params: expected a tree with at least one array, got none.")
    for path, leaf in leaves:
        where = f"params, leaf {leaf_name(path) or '(the whole)'}"
        is_number = isinstance(leaf, float) or hasattr(leaf, "dtype")
        if not is_number or not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(f"{where}: expected floating numbers, got {describe(leaf)}. Statistics go into stats=.")
        if not np.isfinite(np.asarray(leaf)).all():
            raise ValueError(f"{where}: expected finite numbers, got NaN or inf.")
    # An explicit dtype takes the weak type of a Python float away, which the first round would, at the price of a second trace.
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), params)
