"""What a config may name: parts, recipes, data sets and models, with their options and defaults."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxfed import checks, part
from jaxfed.algorithms import RECIPES, accepted_options, fedavg
from jaxfed.data.datasets import DATASETS
from jaxfed.data.partition import PARTITIONS
from jaxfed.part import Part

_PARTS = {
    "modules": "module",
    "regularizers": "regularizer",
    "schedules": "schedule",
    "aggregators": "aggregator",
    "selectors": "selector",
    "batches": "batches",
    "gradients": "gradient",
    "measures": "measure",
    "availability": "availability",
}
_FUNCTIONS = {"algorithms": RECIPES, "datasets": DATASETS, "partitions": PARTITIONS}
KINDS = (*list(_PARTS)[:4], *_FUNCTIONS, "models", *list(_PARTS)[4:])
"""What can be listed, in the order of ``jaxfed list``."""

REQUIRED = "required"
"""What stands for the default of an option that has none."""
_AS_GIVEN = "as given"
# What the run gives to partitions and models.
_GIVEN = ("labels", "sample")


class Entry(NamedTuple):
    """Something with a name.

    Attributes:
        name: As a config writes it.
        summary: What it is, in a line.
        options: ``{name: default}`` as texts.
    """

    name: str
    summary: str
    options: dict[str, str]


def entries(kind: str) -> list[Entry]:
    """All of a kind, those of plug-ins included.

    Raises:
        ValueError: If there is no such kind.

    Example:
        >>> next(entry for entry in entries("modules") if entry.name == "ewma").options["beta"]
        '0.9'
    """
    checks.known_name("kind of parts", kind, KINDS)
    if kind in _PARTS:
        return [_of_part(name, cls) for name, cls in part.registered(_PARTS[kind]).items() if name != "function"]
    functions = _models() if kind == "models" else _FUNCTIONS[kind]
    return [Entry(name, _summary(function), _options_of(function)) for name, function in functions.items()]


def _models() -> dict[str, Callable]:
    # Flax takes long to import, and the other lists need none.
    from jaxfed.models.reference import MODELS

    return MODELS


def _of_part(name: str, cls: type[Part]) -> Entry:
    defaults = {f.name: _default_of(f) for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    # The constructor decides: an optax factory takes more options than it has fields.
    options = {option: defaults.get(option, _AS_GIVEN) for option in inspect.signature(cls).parameters}
    presets = f" Presets: {', '.join(f'{name}:{preset}' for preset in cls.presets)}." if cls.presets else ""
    return Entry(name, _summary(cls) + presets, _required_first(options))


def _default_of(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return _text(field.default_factory())
    return REQUIRED if field.default is dataclasses.MISSING else _text(field.default)


def _options_of(function: Callable) -> dict[str, str]:
    parameters = dict(inspect.signature(function).parameters)
    # A recipe's **options are those of fedavg.
    if function in RECIPES.values():
        shared = inspect.signature(fedavg).parameters
        parameters = {name: parameters.get(name) or shared[name] for name in accepted_options(function)}
    defaults = {name: REQUIRED if p.default is p.empty else _text(p.default) for name, p in parameters.items()}
    return _required_first({name: default for name, default in defaults.items() if name not in _GIVEN})


def _required_first(options: dict[str, str]) -> dict[str, str]:
    return dict(sorted(options.items(), key=lambda option: option[1] != REQUIRED))


def _text(value: Any) -> str:
    if isinstance(value, Part):
        return f'"{value.name}"'
    if value is None or isinstance(value, bool):
        return {None: '"none"', True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f'"{value}"'
    return repr(list(value)) if isinstance(value, (tuple, list)) else f"{value:g}" if isinstance(value, float) else str(value)


def _summary(named: Any) -> str:
    text = (inspect.getdoc(named) or "").split("\n\n")[0].replace("``", "")
    return " ".join(re.sub(r":\w+:`~?([^`]*)`", r"\1", text).split())
