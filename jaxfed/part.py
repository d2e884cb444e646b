"""Part: a bundle of hyper-parameters and pure functions, which is a pytree, has a name and a config.

Number hyper-parameters, rates and nested Parts are leaves, so that a changed number never recompiles and whole runs can be
``vmap``ped over them. Bools, strings and whatever sizes an array are :func:`static`. The laws, each with its reason:

* Unflattening runs no constructor: leaves may be tracers, None or shapes.
* The constructor is the only door. It turns ints, NumPy and 0-d JAX numbers into Python floats (weakly typed: one trace, and
  the dtype of the parameters is kept), lists into tuples, names into Parts, and checks values (swept arrays by element, tracers
  never).
* Equality is the same treedef and equal leaves. Parts are not hashable and never static.
* No Python ``if`` on a leaf.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, dataclass_transform

import jax
import numpy as np

from jaxfed import checks

_REGISTRY: dict[str, dict[str, type["Part"]]] = {}
_KINDS: dict[str, type["Part"]] = {}
Convert = Callable[[str, Any], Any]


def field(convert: Convert, default: Any = dataclasses.MISSING, is_static: bool = False, kw_only: bool = False) -> Any:
    """A field with a rule of its own: ``convert(where, value)`` checks a value and returns what is stored."""
    options: dict[str, Any] = {"metadata": {"convert": convert, "static": is_static}, "kw_only": kw_only}
    if isinstance(default, Part):  # immutable, but unhashable, which dataclasses take for mutable
        return dataclasses.field(default_factory=lambda: default, **options)
    return dataclasses.field(default=default, **options)


def number(
    *,
    default: Any = dataclasses.MISSING,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A field that holds a number: a leaf, checked against the bounds."""
    bounds = checks.Bounds(at_least, above, at_most, below)
    return field(lambda where, value: checks.number(where, value, bounds), default)


def count(*, default: Any = dataclasses.MISSING, at_least: int = 0) -> Any:
    """A field that holds an integer which sizes no array (local steps, epochs): a leaf."""
    bounds = checks.Bounds(at_least=at_least)
    return field(lambda where, value: checks.count(where, value, bounds), default)


def by_client(
    *, default: Any = dataclasses.MISSING, ndim: int = 1, at_least: float | None = None, above: float | None = None
) -> Any:
    """A field that holds a number for each client ``[N]``, or an array of ``ndim`` axes: a leaf; None if that is the default."""
    bounds = checks.Bounds(at_least=at_least, above=above)

    def convert(where: str, value: Any) -> Any:
        return None if default is None and value is None else checks.by_client(where, value, bounds, ndim)

    return field(convert, default)


def static(*, default: Any = dataclasses.MISSING, choices: tuple[Any, ...] | None = None) -> Any:
    """A field that is part of the compiled program: a bool, a string, an int that sizes an array, or None.

    One whose default is a bool takes bools only: the string ``"false"`` would count as true.
    """
    choices = (False, True) if choices is None and isinstance(default, bool) else choices

    def convert(where: str, value: Any) -> Any:
        value = _as_static(where, value)
        return value if choices is None else checks.choice(where, value, choices)

    return field(convert, default, is_static=True)


def size(*, default: Any = dataclasses.MISSING, at_least: int = 1, optional: bool = False) -> Any:
    """A static field that holds an integer which sizes an array (a batch size); with ``optional``, None too."""
    bounds = checks.Bounds(at_least=at_least)

    def convert(where: str, value: Any) -> Any:
        return None if optional and value is None else int(checks.count(where, value, bounds))

    return field(convert, default, is_static=True)


def part(kind: str, *, default: Any = dataclasses.MISSING, optional: bool = False) -> Any:
    """A field that holds one Part of a kind, given as an instance, a name or ``(name, {hyper-parameters})``; or None."""
    return field(lambda where, value: None if optional and value is None else build(kind, value, where), default)


def parts(kind: str, *, default: Any = (), wrap: Callable | None = None) -> Any:
    """A field that holds a tuple of Parts of a kind."""

    def convert(where: str, value: Any) -> tuple:
        one = isinstance(value, (str, Part)) or (_is_spec(value) and isinstance(value[1], Mapping))
        if one or not isinstance(value, (list, tuple)):
            raise TypeError(f"{where}: expected a list of {kind}s, got {checks.describe(value)}. Put it in [ ].")
        return tuple(build(kind, item, f"{where}[{i}]", wrap) for i, item in enumerate(value))

    return field(convert, default)


def function(*, default: Any = dataclasses.MISSING, optional: bool = False) -> Any:
    """A field that holds a function: plain, or a ``jax.tree_util.Partial`` whose bound arrays are leaves; or None."""
    return field(lambda where, value: None if optional and value is None else as_function(where, value), default)


def as_function(where: str, value: Any) -> jax.tree_util.Partial:
    """A callable as a ``Partial``, a pytree without leaves unless arrays are bound to it."""
    if isinstance(value, jax.tree_util.Partial):
        return value
    if not callable(value):
        raise TypeError(f"{where}: expected a function, got {checks.describe(value)}.")
    return jax.tree_util.Partial(value)


def _as_static(where: str, value: Any) -> Any:
    value = tuple(value) if isinstance(value, list) else value
    try:
        hash(value)
    except TypeError:
        remedy = "Arrays belong in a field without static()."
        raise TypeError(f"{where}: expected a hashable value, got {checks.describe(value)}. {remedy}") from None
    return value


def _as_leaf(where: str, value: Any) -> Any:
    """The rule for a field of a plug-in that says nothing: numbers become floats, functions Partials, Parts stay."""
    if value is None or isinstance(value, Part):
        return value
    if isinstance(value, (bool, str)):
        remedy = "Declare the field as static() if the program depends on it."
        raise TypeError(f"{where}: expected a number, got {checks.describe(value)}. {remedy}")
    return as_function(where, value) if callable(value) else checks.number(where, value, checks.Bounds())


@dataclass_transform(
    frozen_default=True, eq_default=False, field_specifiers=(field, number, count, by_client, static, size, part, parts, function)
)
class Part:
    """The base of every building block. Subclasses are frozen dataclasses and pytrees without any decorator.

    A subclass that has a ``name`` of its own is registered under it (``register=False`` opts out), so that a config or a list of
    modules can name it. A second class of the same name is an error; defining the same class again (in a notebook) replaces it.

    Example:
        >>> class Halve(Part, register=False):
        ...     factor: float = number(default=0.5, above=0)
        ...     def __call__(self, x):
        ...         return self.factor * x
        >>> Halve(0.25)(8.0), Halve() == Halve(0.5)
        (2.0, True)
        >>> jax.tree.leaves(Halve(0.25))
        [0.25]
    """

    name: ClassVar[str] = ""
    kind: ClassVar[str] = "part"
    aliases: ClassVar[Mapping[str, str]] = {}
    presets: ClassVar[tuple[str, ...]] = ()
    __hash__: ClassVar[None]  # type: ignore[assignment]

    def __init_subclass__(cls, *, kind: str | None = None, register: bool = True, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        _declare_fields(cls)
        dataclasses.dataclass(frozen=True, eq=False)(cls)
        if cls.aliases:
            _accept_aliases(cls)
        leaves, statics = _field_names(cls)
        jax.tree_util.register_pytree_with_keys(
            cls,
            lambda p: (
                [(jax.tree_util.GetAttrKey(n), getattr(p, n)) for n in leaves],
                tuple(getattr(p, n) for n in statics),
            ),
            lambda aux, children: _restore(cls, (*zip(leaves, children), *zip(statics, aux))),
            lambda p: ([getattr(p, n) for n in leaves], tuple(getattr(p, n) for n in statics)),
        )
        if kind is not None:
            cls.kind, _KINDS[kind] = kind, cls
            _REGISTRY.setdefault(kind, {})
        elif register and "name" in cls.__dict__:
            _register(cls)

    def __post_init__(self):
        for f in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            where = f"{type(self).__name__}.{f.name}"
            object.__setattr__(self, f.name, f.metadata["convert"](where, getattr(self, f.name)))
        self.check()

    def check(self) -> None:
        """Checks what concerns several fields; runs in the constructor only. Override and raise ValueError."""

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked like a new one."""
        checks.known_options(type(self).__name__, changes, _names(type(self)))
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType]

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return False
        (mine, tree), (theirs, other_tree) = jax.tree.flatten(self), jax.tree.flatten(other)
        return tree == other_tree and all(np.array_equal(a, b) for a, b in zip(mine, theirs))

    def get_config(self) -> dict[str, Any]:
        """The hyper-parameters as plain data (numbers, strings, lists, dicts); :meth:`from_config` builds an equal Part."""
        where = type(self).__name__
        return {name: _encode(f"{where}.{name}", getattr(self, name)) for name in _names(type(self))}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Builds the Part from its hyper-parameters by name.

        Raises:
            ValueError: If an option is unknown or a required one is missing.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"{cls.__name__}: expected its options by name, got {checks.describe(config)}.")
        checks.known_options(cls.name or cls.__name__, config, (*_names(cls), *cls.aliases))
        required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]  # pyright: ignore
        given = {cls.aliases.get(key, key) for key in config}
        if missing := [name for name in required if name not in given]:
            raise ValueError(f"{cls.name or cls.__name__} needs {', '.join(missing)}.")
        return cls(**config)


def build(kind: str, value: Any, where: str = "", wrap: Callable | None = None) -> Any:
    """A Part of a kind from an instance, a name, or ``(name, {hyper-parameters})``; else ``wrap(value)`` decides.

    >>> import jaxfed
    >>> build("regularizer", ("ridge", {"alpha": 0.5}))
    Ridge(alpha=0.5)
    """
    base = _KINDS[kind]
    where = where or kind
    if isinstance(value, base):
        return value
    if isinstance(value, str):
        value = (value, {})
    if _is_spec(value):
        return _from_name(kind, *value)
    if isinstance(value, type) and issubclass(value, base):
        raise TypeError(f"{where}: got the class {value.__name__}; pass an instance: {value.__name__}(...).")
    if wrap is not None:
        return wrap(where, value)
    expected = f"a {base.__name__}, a name or (name, {{options}})"
    raise TypeError(f"{where}: expected {expected}, got {checks.describe(value)}.")


def _from_name(kind: str, name: str, config: Mapping[str, Any]) -> Part:
    """``"adam"`` is a registered class; ``"adam:paper"`` one of its presets, a classmethod that returns a plain Part."""
    name, _, preset = name.partition(":")
    checks.known_name(kind, name, _REGISTRY[kind])
    cls = _REGISTRY[kind][name]
    if not preset:
        return cls.from_config(config)
    checks.known_name(f"preset of {name!r}", preset, cls.presets)
    make = getattr(cls, preset)
    checks.known_options(f"{name}:{preset}", config, inspect.signature(make).parameters)
    return make(**config)


def spec(value: Part) -> list:
    """``[name, {hyper-parameters}]`` of a registered Part: what :func:`build` reads, as plain data."""
    if _REGISTRY.get(value.kind, {}).get(value.name) is not type(value):
        raise ValueError(f"{type(value).__name__} has no registered name, so no config can hold it. Give the class a name.")
    return [value.name, value.get_config()]


def registered(kind: str) -> dict[str, type[Part]]:
    """The registered classes of a kind by name, third-party ones included."""
    return dict(sorted(_REGISTRY[kind].items()))


def _is_spec(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[0], str)


def _encode(where: str, value: Any) -> Any:
    if isinstance(value, Part):
        return spec(value)
    if isinstance(value, (list, tuple)):
        return [_encode(where, v) for v in value]
    if isinstance(value, Mapping):
        return {k: _encode(f"{where}.{k}", v) for k, v in value.items()}
    if isinstance(value, (np.ndarray, jax.Array)):
        return value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{where}: {checks.describe(value)} cannot be written to a config; only data and named parts can.")


def _declare_fields(cls: type) -> None:
    """Gives every annotated name of a class body a field that says how it is converted."""
    annotations = cls.__annotations__
    annotations.pop("name", None)  # `name: str = "x"` in a plug-in means the class's name, not a hyper-parameter
    for name, annotation in annotations.items():
        default = cls.__dict__.get(name, dataclasses.MISSING)
        if isinstance(default, dataclasses.Field) or "ClassVar" in str(annotation):
            continue
        is_static = annotation in (bool, str, "bool", "str")
        setattr(cls, name, static(default=default) if is_static else field(_as_leaf, default))


def _accept_aliases(cls: type[Part]) -> None:
    init = cls.__init__

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{cls.aliases.get(key, key): value for key, value in kwargs.items()})

    __init__.__wrapped__ = init  # type: ignore[attr-defined]
    cls.__init__ = __init__  # type: ignore[method-assign]


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _field_names(cls: type) -> tuple[list[str], list[str]]:
    fields = dataclasses.fields(cls)
    return [f.name for f in fields if not f.metadata["static"]], [f.name for f in fields if f.metadata["static"]]


def _restore(cls: type, values: tuple) -> Any:
    instance = object.__new__(cls)
    for name, value in values:
        object.__setattr__(instance, name, value)
    return instance


def _register(cls: type[Part]) -> None:
    known = _REGISTRY[cls.kind].get(cls.name)
    same = known is not None and (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)
    if known is not None and not same:
        place = f"{known.__module__}.{known.__qualname__}"
        raise ValueError(f"A {cls.kind} called {cls.name!r} exists already: {place}. Choose another name or register=False.")
    _REGISTRY[cls.kind][cls.name] = cls
