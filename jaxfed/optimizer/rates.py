"""What a rate may be: a number, a schedule, or rates by label of leaf; and :func:`rates`, which reads them all alike."""

import dataclasses
import fnmatch
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, dataclass_transform

import jax
from jax.typing import ArrayLike

from jaxfed import checks, part, trees
from jaxfed.part import Part

_NON_NEGATIVE = checks.Bounds(at_least=0)


def rate(*, default: Any = dataclasses.MISSING, by_label: bool = True) -> Any:
    """A field that holds a rate: a number of at least 0, a schedule, or with ``by_label`` rates by label of leaf."""
    return part.field(as_rate if by_label else _as_one_rate, default)


def as_rate(where: str, value: Any) -> Any:
    """A rate as it is stored: a float, a :class:`Schedule` or a :class:`ByLabel`.

    Args:
        where: The name of the field, for errors.
        value: A number, a Schedule, its name or ``(name, {options})``, a function of the step, or ``{label: rate}``.

    Raises:
        TypeError: For anything else.
        ValueError: For numbers that are negative or not finite, and for unknown names and options.
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, Mapping):
        return ByLabel(value)
    if isinstance(value, str) or (isinstance(value, (list, tuple)) and value and isinstance(value[0], str)):
        return part.build("schedule", value, where)
    if callable(value):
        return FromSchedule(value)
    if value is None or isinstance(value, bool):
        expected = "a number, a schedule, (name, {options}), a function of the step or {label: rate}"
        raise TypeError(f"{where}: expected {expected}, got {checks.describe(value)}.")
    return checks.number(where, value, _NON_NEGATIVE)


def _as_one_rate(where: str, value: Any) -> Any:
    value = as_rate(where, value)
    if isinstance(value, ByLabel):
        raise TypeError(f"{where}: rates by label cannot be wrapped. Wrap each label's rate instead: {{label: Warmup(...)}}.")
    return value


def at(value: Any, step: ArrayLike, round: ArrayLike = 0) -> Any:
    """The rate of this step: a number as it is, a schedule's value."""
    return value(step, round) if isinstance(value, Schedule) else value


def rates(value: Any, step: ArrayLike, round: ArrayLike, tree: Any) -> Any:
    """One rate for each leaf of a tree.

    Args:
        value: What a :func:`rate` field holds.
        step: The number of the step, from 0.
        round: The number of the round, from 0.
        tree: Any tree of the parameters' structure.

    Returns:
        A tree of that structure with scalar leaves.

    Example:
        >>> rates(0.5, step=0, round=0, tree={"bias": 7, "kernel": 7})
        {'bias': 0.5, 'kernel': 0.5}
    """
    if isinstance(value, ByLabel):
        return value.per_leaf(step, round, tree)
    now = at(value, step, round)
    return jax.tree.map(lambda _: now, tree)


@dataclass_transform(
    frozen_default=True,
    eq_default=False,
    field_specifiers=(rate, part.field, part.number, part.count, part.static, part.function),
)
class Schedule(Part, kind="schedule"):
    """A rate as a traced function of the step and the round; also an ``optax.Schedule``.

    Which clock counts is a schedule's own affair: most have ``step_level``, True for the step, False for the round.

    Example:
        >>> class Alternate(Schedule, register=False):
        ...     base: float = part.number(at_least=0)
        ...     def __call__(self, step, round=0):
        ...         return self.base * (step % 2)
        >>> Alternate(0.5)(3)
        0.5
    """

    def __call__(self, step: ArrayLike, round: ArrayLike = 0) -> Any:
        """The rate, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} defines no __call__(step, round).")


class Constant(Schedule):
    """The same rate always, for where a schedule must stand."""

    name = "constant"
    rate: float = part.number(at_least=0)

    def __call__(self, step: ArrayLike, round: ArrayLike = 0) -> Any:
        """``rate``."""
        return self.rate


class FromSchedule(Schedule):
    """Any function of one count, such as an ``optax.Schedule``. It has no config.

    >>> import optax
    >>> print(FromSchedule(optax.linear_schedule(1.0, 0.0, 4))(1))
    0.75
    """

    name = "function"
    schedule: Callable[[ArrayLike], Any] = part.function()
    step_level: bool = part.static(default=True)

    def __call__(self, step: ArrayLike, round: ArrayLike = 0) -> Any:
        """``schedule(u)``, where ``u`` is the step or the round."""
        return self.schedule(step if self.step_level else round)

    def get_config(self) -> dict[str, Any]:
        """Raises ValueError: a function is not data."""
        raise ValueError("FromSchedule: a function cannot be written to a config. Use a schedule that has a name.")


def _as_rates(where: str, value: Any) -> OrderedDict:
    if not isinstance(value, Mapping) or not value or not all(isinstance(label, str) for label in value):
        raise TypeError(f"{where}: expected {{label: rate}}, got {checks.describe(value)}.")
    # A plain dict would be sorted by every jax.tree.map, and the first match must stay the first.
    return OrderedDict((label, _as_one_rate(f"{where}[{label!r}]", one)) for label, one in value.items())


class ByLabel(Schedule):
    """One rate for each group of leaves.

    A label is a leaf's name (``dense/kernel``) or a pattern over names (``*/bias``; ``*`` crosses slashes); the first label that
    fits decides. Or ``labels`` gives each leaf its label, as in ``optax.multi_transform``.

    Args:
        rates: ``{label: rate}``, each a number, a schedule or its spec.
        labels: None, or a function ``params -> tree of labels`` (a prefix of the parameters' tree is enough).

    Example:
        >>> ByLabel({"*/bias": 0.0, "*": 0.1}).per_leaf(0, 0, {"dense": {"bias": 1, "kernel": 2}})
        {'dense': {'bias': 0.0, 'kernel': 0.1}}
    """

    name = "by-label"
    rates: Mapping[str, Any] = part.field(_as_rates)
    labels: Callable[[Any], Any] | None = part.static(default=None)

    def __call__(self, step: ArrayLike, round: ArrayLike = 0) -> Any:
        """Raises TypeError: there is no one rate. See :meth:`per_leaf`."""
        raise TypeError("ByLabel has one rate for each leaf, not one for all: use per_leaf(step, round, tree).")

    def per_leaf(self, step: ArrayLike, round: ArrayLike, tree: Any) -> Any:
        """A tree like ``tree`` of scalar rates.

        Raises:
            ValueError: If a leaf has no label or a label no leaf.
        """
        labels = trees.map_with_names(self._match, tree) if self.labels is None else jax.tree.broadcast(self.labels(tree), tree)
        used = set(jax.tree.leaves(labels))
        if used != set(self.rates):
            raise ValueError(_mismatch(used, list(self.rates), trees.names(tree)))
        now = {label: at(value, step, round) for label, value in self.rates.items()}
        return jax.tree.map(lambda label: now[label], labels)

    def _match(self, leaf: str, _: Any) -> str:
        fits = (label for label in self.rates if leaf == label or fnmatch.fnmatchcase(leaf, label))
        return next(fits, leaf)


def _mismatch(used: set[str], known: list[str], leaves: list[str]) -> str:
    absent = [label for label in sorted(used) if label not in known]
    problem = f"no rate for {checks.listing(absent)}" if absent else ""
    idle = [label for label in known if label not in used]
    problem = problem or f"{checks.listing(idle)} decides no leaf (the first label that fits does)"
    return f"ByLabel: {problem}. Labels: {checks.listing(known)}. Leaves: {checks.listing(leaves)}."
