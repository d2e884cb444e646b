"""Hyper-parameters by name: which numbers of an algorithm can vary within one compiled program, and settings of them."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from jaxfed import checks
from jaxfed.part import Part

SEED = "seed"
"""The name of the one axis that is no hyper-parameter: the number that the run's key is made of."""

Setting = dict[str, Any]
"""A value for each name, as the user wrote the names."""


class Field(NamedTuple):
    """A field of a part that holds one number, or one that is static.

    Attributes:
        words: For each level of the name, the spellings that are accepted; the first is the usual one.
        keys: Where it stands in the tree.
        number: Whether it can vary; else it belongs to the program.
    """

    words: tuple[tuple[str, ...], ...]
    keys: tuple
    number: bool

    @property
    def name(self) -> str:
        """``client.optimizer.lrate``."""
        return ".".join(words[0] for words in self.words)

    def fits(self, words: list[str]) -> bool:
        """Whether a name means this field: its words come in this order, others may be left out, but not the last."""
        levels = iter(self.words)
        return words[-1] in self.words[-1] and all(any(word in level for level in levels) for word in words)


def fields_of(tree: Any) -> list[Field]:
    """All fields of the parts in a tree.

    >>> import jaxfed
    >>> [field.name for field in fields_of(jaxfed.Optimizer(0.1, modules=["momentum"])) if field.number]
    ['lrate', 'w_decay', 'modules.momentum.beta']
    """
    return list(_walk(tree, (), ()))


def find(tree: Any, name: str) -> Field:
    """The number that a name means.

    Args:
        tree: Parts.
        name: Names of fields joined by dots, parts in a list by their own name or position; what is not needed to tell it from
            others may be left out: ``client.lrate`` for ``client.optimizer.lrate``.

    Raises:
        ValueError: If the name fits no number, or several, or something that belongs to the program.
    """
    words, fields = name.split("."), fields_of(tree)
    fitting = [field for field in fields if field.fits(words)]
    numbers = [field for field in fitting if field.number]
    # A whole name may be part of a longer one.
    exact = [field for field in numbers if len(field.words) == len(words)]
    if len(numbers) == 1 or len(exact) == 1:
        return (exact or numbers)[0]
    if numbers:
        raise ValueError(f"over: {name!r} may mean {checks.listing(f.name for f in numbers)}. Say which.")
    if fitting:
        what = f"over: {fitting[0].name} is a name, a switch or a size: it belongs to the compiled program"
        raise ValueError(f"{what}, and cannot vary within one. Run these settings separately.")
    known = [field.name for field in fields if field.number]
    raise ValueError(
        f"over: no hyper-parameter is called {name!r}.{checks.closest(name, known)} Known: {', '.join(known)}, {SEED}."
    )


def replace(tree: Any, values: Mapping[Field, Any]) -> Any:
    """The tree with other numbers, unchecked: values may be arrays and tracers."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    by_keys = {field.keys: value for field, value in values.items()}
    return jax.tree.unflatten(structure, [by_keys.get(tuple(path), leaf) for path, leaf in leaves])


def checked(tree: Any, values: Mapping[str, Any]) -> dict[Field, Any]:
    """Numbers by field as the parts store them.

    Raises:
        TypeError, ValueError: What the part's constructor says, with the name.
    """
    fields = {name: find(tree, name) for name in values}
    for name, field in fields.items():
        if twice := [other for other, same in fields.items() if same == field and other != name]:
            raise ValueError(f"over: {name!r} and {twice[0]!r} are both {field.name}. Name it once.")
    for name, value in values.items():
        if isinstance(value, (bool, str)) or np.ndim(value) or value is None:
            raise TypeError(f"over: {name}: expected numbers, got {checks.describe(value)}. Run other choices separately.")
    new = replace(tree, {field: values[name] for name, field in fields.items()})
    stored = {}
    for name, field in fields.items():
        try:
            stored[field] = _stored(new, field.keys)
        except (TypeError, ValueError) as error:
            raise type(error)(f"over: {name}: {error}") from error
    return stored


def settings_of(over: Mapping[Any, Iterable[Any]]) -> list[Setting]:
    """The product of all axes, the last one fastest; a tuple of names is one axis of tuples of values.

    Raises:
        TypeError, ValueError: For an axis without values, a name twice, or tuples of another length.

    >>> settings_of({("lrate", "mu"): [(0.1, 1.0), (0.2, 0.5)], "seed": range(2)})[1:3]
    [{'lrate': 0.1, 'mu': 1.0, 'seed': 1}, {'lrate': 0.2, 'mu': 0.5, 'seed': 0}]
    """
    checks.instance("over", over, Mapping, "Give {name: values}.")
    axes = [_axis(names, values) for names, values in over.items()]
    names = [name for axis in axes for name in axis[0]]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"over: expected names that differ, got {names}.")
    return [dict(itertools.chain.from_iterable(row.items() for row in rows)) for rows in itertools.product(*axes)]


def _axis(names: Any, values: Any) -> list[Setting]:
    zipped = isinstance(names, tuple)
    names = names if zipped else (names,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"over: expected names as texts, got {checks.listing(names)}.")
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"over: {'/'.join(names)}: expected a list of values, got {checks.describe(values)}.")
    rows = [tuple(value) if zipped else (value,) for value in values]
    for row in rows:
        if len(row) != len(names):
            raise ValueError(f"over: {'/'.join(names)}: expected {len(names)} values side by side, got {row}.")
    if not rows:
        raise ValueError(f"over: {'/'.join(names)}: expected at least one value, got none.")
    return [dict(zip(names, map(_plain, row))) for row in rows]


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, (np.generic, np.ndarray, jax.Array)) and np.ndim(value) == 0 else value


def _walk(value: Any, words: tuple, keys: tuple) -> Iterator[Field]:
    if isinstance(value, Part):
        aliases = type(value).aliases
        for field in dataclasses.fields(value):  # pyright: ignore[reportArgumentType]
            spellings = (*words, (field.name, *(alias for alias, meant in aliases.items() if meant == field.name)))
            if field.metadata["static"]:
                yield Field(spellings, (), False)
            else:
                yield from _walk(getattr(value, field.name), spellings, (*keys, GetAttrKey(field.name)))
    elif isinstance(value, (tuple, list)):
        for i, one in enumerate(value):
            own = (one.name,) if isinstance(one, Part) and one.name else ()
            yield from _walk(one, (*words, (*own, str(i))), (*keys, SequenceKey(i)))
    elif isinstance(value, Mapping):
        for name, one in value.items():
            # Something without a name of its own: the algorithm beside the selector.
            yield from _walk(one, (*words, (str(name),)) if name else words, (*keys, DictKey(name)))
    elif not isinstance(value, (bool, str)) and not callable(value) and value is not None and np.ndim(value) == 0:
        yield Field(words, keys, True)


def _stored(tree: Any, keys: tuple) -> Any:
    """The number at ``keys`` after the constructor of its part has seen it."""
    last = max(i for i, key in enumerate(keys) if isinstance(key, GetAttrKey))
    owner = tree
    for key in keys[:last]:
        owner = _child(owner, key)
    value = owner.replace()
    for key in keys[last:]:
        value = _child(value, key)
    return value


def _child(value: Any, key: Any) -> Any:
    if isinstance(key, GetAttrKey):
        return getattr(value, key.name)
    return value[key.idx if isinstance(key, SequenceKey) else key.key]
