"""The reader of configs: tables of named keys as frozen dataclasses, whose every error says the path of the key."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self, dataclass_transform

from jaxfed import checks
from jaxfed.data.rows import scalar

Check = Callable[[str, Any], Any]
"""``check(path, value)`` returns what is stored, or raises TypeError or ValueError that begins with the path."""


def key(check: Check, default: Any = dataclasses.MISSING) -> Any:
    """A key of a section."""
    return dataclasses.field(default=default, metadata={"check": check})


def subsection(section: "type[Section]", default: Any = dataclasses.MISSING) -> Any:
    """A key that holds another section; with a default of None it may be absent."""
    return key(lambda _, value: None if value is None and default is None else section.of(value), default)


def count(**limits: float) -> Check:
    """Integers within limits: ``at_least``, ``at_most``, ..."""
    return lambda where, value: scalar(checks.count, where, value, **limits)


def number(**limits: float) -> Check:
    """Finite numbers within limits."""
    return lambda where, value: scalar(checks.number, where, value, **limits)


def fraction(where: str, value: Any) -> float:
    """A number from 0 to 1, without 1."""
    return number(at_least=0, below=1)(where, value)


def string(where: str, value: Any) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        raise TypeError(f"{where}: expected a text, got {checks.describe(value)}.")
    return value


def boolean(where: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{where}: expected true or false, got {checks.describe(value)}.")
    return value


def optional(check: Check) -> Check:
    """None, or what ``check`` allows."""
    return lambda where, value: None if value is None else check(where, value)


def spec(where: str, value: Any) -> Any:
    """The name of a part, or ``[name, {options}]``."""
    value = plain(where, value)
    is_pair = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], dict)
    if not (isinstance(value, str) or is_pair):
        raise TypeError(f'{where}: expected a name or ["name", {{options}}], got {checks.describe(value)}.')
    return value


def free(where: str, value: Any) -> dict[str, Any]:
    """The keys that belong to a part, as plain data."""
    return plain(where.removesuffix(".options"), {} if value is None else value)


def plain(where: str, value: Any) -> Any:
    """A value made of None, bools, finite numbers, texts, lists and tables; anything else is refused by its path.

    >>> plain("algorithm.lrate", ("cosine-annealing", {"base": 0.1}))
    ['cosine-annealing', {'base': 0.1}]
    """
    if isinstance(value, Mapping):
        for name in value:
            string(f"{where}, name of a key", name)
        return {name: plain(f"{where}.{name}", one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(f"{where}[{i}]", one) for i, one in enumerate(value)]
    # JSON has no word for NaN and infinities, so they could not be written back.
    if isinstance(value, float):
        return checks.number(where, value, checks.Bounds())
    if value is not None and not isinstance(value, (bool, int, str)):
        raise TypeError(f"{where}: expected a number, a text, a list or a table, got {checks.describe(value)}.")
    return value


@dataclass_transform(frozen_default=True, field_specifiers=(key, subsection))
class Section:
    """A table of the config. Subclasses are frozen dataclasses; one with a field ``options`` takes keys of any name for a part.

    Example:
        >>> class Clock(Section, path="clock"):
        ...     ticks: int = key(count(at_least=1))
        >>> Clock.of({"ticks": 0})
        Traceback (most recent call last):
        ...
        ValueError: clock.ticks: expected an integer at least 1, got 0.
    """

    path: ClassVar[str] = ""

    def __init_subclass__(cls, path: str = ""):
        cls.path = path
        dataclasses.dataclass(frozen=True)(cls)

    def __post_init__(self):
        for field in self._fields():
            where = f"{self.path}.{field.name}".removeprefix(".")
            object.__setattr__(self, field.name, field.metadata["check"](where, getattr(self, field.name)))
        for name in {field.name for field in self._fields()}.intersection(getattr(self, "options", ())):
            raise ValueError(f"{self.path}.{name}: expected options of the part, got a key of the section.")

    @classmethod
    def of(cls, value: Any) -> Self:
        """Reads a table, or returns a section as it is.

        Raises:
            TypeError, ValueError: With the path of the key.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise TypeError(f"{cls.path or 'The config'}: expected a table, got {checks.describe(value)}.")
        fields = [f for f in cls._fields() if f.name != "options"]
        own = {f.name: value[f.name] for f in fields if f.name in value}
        rest = {name: one for name, one in value.items() if name not in own}
        if len(fields) == len(cls._fields()):
            known_keys(cls.path, rest, [f.name for f in fields])
        elif rest:
            own["options"] = rest
        for f in fields:
            if f.default is f.default_factory is dataclasses.MISSING and f.name not in own:
                where = f"{cls.path}.{f.name}".removeprefix(".")
                raise ValueError(f"{where} is missing. {(cls.__doc__ or '').splitlines()[0]}")
        return cls(**own)

    def to_dict(self) -> dict[str, Any]:
        """The table as plain data; keys of its own that are None are left out."""
        own = {f.name: getattr(self, f.name) for f in self._fields() if f.name != "options"}
        tables = {name: x.to_dict() if isinstance(x, Section) else x for name, x in own.items() if x is not None}
        return tables | getattr(self, "options", {})

    @classmethod
    def _fields(cls) -> tuple[dataclasses.Field, ...]:
        return dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]


def known_keys(path: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError that names the first unknown key with its path."""
    known = tuple(known)
    for name in given:
        if name not in known:
            where = f"{path}.{name}".removeprefix(".")
            raise ValueError(f"{where}: unknown key.{checks.closest(name, known)} Known here: {', '.join(known) or 'none'}.")


@contextlib.contextmanager
def located(path: str) -> Iterator[None]:
    """Puts a key's path in front of errors about its value.

    >>> import jaxfed
    >>> with located("algorithm.client.modules[0]"):
    ...     jaxfed.Adam(beta_1=2)
    Traceback (most recent call last):
    ...
    ValueError: algorithm.client.modules[0].beta_1: expected a finite number at least 0 and below 1, got 2.
    """
    try:
        yield
    except (TypeError, ValueError, OSError) as error:
        kind = next(kind for kind in (TypeError, OSError, ValueError) if isinstance(error, kind))
        message = str(error)
        if not message.startswith(path):
            # "Adam.beta_1: ..." names the class; the path says where in the config the part stands.
            message = re.sub(r"^[A-Za-z_]\w*(?=\.[a-z_]\w*(\[\w+\])?: )", path, message)
        raise kind(message if message.startswith(path) else f"{path}: {message}") from error
