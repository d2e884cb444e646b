"""Any optax transformation as an OptiModule."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxfed import checks, part
from jaxfed.base import OptiModule
from jaxfed.messages import Params
from jaxfed.optimizer.rates import as_rate
from jaxfed.part import Part

# Where a `learning_rate` parameter does not tell whether a factory's updates are to be added.
_DESCENDS = {"scale_by_rprop": False, "polyak_sgd": True, "contrib.scale_by_cocob": True}


class FromOptax(OptiModule):
    """An optax transformation, built from a factory and its arguments.

    Arguments that are floats are leaves (they can be swept, and a change does not recompile), and so are our schedules, also
    given as ``(name, {options})``; ints, bools, strings and functions are part of the program.

    An Optimizer subtracts its modules' updates, but a complete optimizer of optax (``optax.adam``, not ``scale_by_adam``) returns
    updates to be added. The rule is: a factory with a parameter ``learning_rate`` descends, and its updates are negated, so that
    ``Optimizer(lrate=1.0, modules=[FromOptax("adam", learning_rate=0.1)])`` steps exactly as ``optax.adam(0.1)``. Everything
    else passes as it is. A ready-made transformation is tried on one gradient: if it steps against it, ``descent`` must be given,
    as in ``FromOptax(optax.adam(0.1), descent=True)``; an Optimizer that climbs would be a silent mistake.

    Args:
        factory: The name of a factory in optax (``"adam"``, ``"contrib.prodigy"``), a function that returns a transformation, or
            a ready-made transformation; only the first can be written to a config.
        descent: Whether the updates are to be added; None for the rule above.
        options: The factory's arguments.

    Raises:
        ValueError: If optax has no such factory, the factory no such argument, a required one is missing, or a ready-made
            transformation steps against the gradient and ``descent`` is not given.
        TypeError: If the factory is something else.

    Example:
        >>> import jax.numpy as jnp
        >>> module = FromOptax("sgd", learning_rate=0.1)
        >>> updates, _ = module.update(jnp.ones(2), module.init(jnp.zeros(2)))
        >>> print(updates)
        [0.1 0.1]
        >>> module.get_config()
        {'factory': 'sgd', 'descent': True, 'learning_rate': 0.1}
    """

    name = "optax"
    factory: Any = part.static()
    descent: bool = part.static()
    numbers: dict[str, Any] = part.field(lambda where, value: value)
    settings: tuple = part.static()

    def __init__(self, factory: Any, descent: bool | None = None, **options: Any):
        descends = _check_factory(factory, options)
        if descent is None and _is_ready(factory) and _goes_downhill(factory):
            raise ValueError(
                f"FromOptax: {checks.describe(factory)} steps against the gradient by itself, and an Optimizer subtracts what "
                "its modules give. Say FromOptax(transformation, descent=True), with Optimizer(lrate=1.0) to step as it does."
            )
        numbers = {name: _as_leaf(f"FromOptax.{name}", value) for name, value in options.items() if _is_leaf(value)}
        settings = {name: _as_setting(value) for name, value in options.items() if name not in numbers}
        descent = descends if descent is None else checks.choice("FromOptax.descent", descent, (False, True))
        fields = {"factory": factory, "descent": descent, "numbers": numbers, "settings": tuple(settings.items())}
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    @property
    def options(self) -> dict[str, Any]:
        """The factory's arguments."""
        return {**self.numbers, **dict(self.settings)}

    def init(self, params: Params) -> Any:
        """The transformation's state."""
        return self._transformation().init(params)

    def update(self, updates: Params, state: Any, params: Params | None = None, **extra: Any) -> tuple[Params, Any]:
        """The transformation's updates; ``extra`` goes to transformations that take extra arguments. Dtypes are kept."""
        moved, new_state = self._transformation().update(updates, state, params, **extra)
        moved = jax.tree.map(lambda new, old: _like(-new if self.descent else new, old), moved, updates)
        return moved, jax.tree.map(_like, new_state, state)

    def replace(self, **changes: Any) -> Self:
        """A copy with some arguments changed."""
        return type(self)(**{"factory": self.factory, "descent": self.descent, **self.options, **changes})

    def get_config(self) -> dict[str, Any]:
        """The factory's name and its arguments.

        Raises:
            ValueError: If the factory or an argument is a function, or the transformation is ready-made.
        """
        if not isinstance(self.factory, str):
            raise ValueError(
                f"FromOptax: {checks.describe(self.factory)} cannot be written to a config. Name a factory of optax instead, "
                "as in FromOptax('adam', learning_rate=0.1), or write an OptiModule with a name."
            )
        config = super().get_config()
        return {"factory": self.factory, "descent": self.descent, **config["numbers"], **dict(config["settings"])}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Builds the module from ``factory`` and its arguments by name."""
        if not isinstance(config, Mapping) or not isinstance(config.get("factory"), str):
            raise ValueError(f"FromOptax: expected {{'factory': name, ...}}, got {checks.describe(config)}.")
        return cls(**config)

    def _transformation(self) -> optax.GradientTransformationExtraArgs:
        made = self.factory if _is_ready(self.factory) else _resolve(self.factory)(**self.options)
        if not _is_ready(made):
            raise TypeError(f"FromOptax: expected a factory of optax transformations, got one of {checks.describe(made)}.")
        return optax.with_extra_args_support(made)


def wrap_optax(where: str, value: Any) -> FromOptax:
    """A module from anything that has ``init`` and ``update``, else TypeError with the remedy.

    >>> wrap_optax("modules[0]", optax.clip)
    Traceback (most recent call last):
    ...
    TypeError: modules[0]: expected an OptiModule, ... got <function clip at ...> (function). Call it first, or use FromOptax.
    """
    if _is_ready(value):
        return FromOptax(value)
    remedy = " Call it first, or use FromOptax." if callable(value) else ""
    expected = "an OptiModule, an optax transformation, a name or (name, {options})"
    raise TypeError(f"{where}: expected {expected}, got {checks.describe(value)}.{remedy}")


def _is_ready(value: Any) -> bool:
    methods = (getattr(value, name, None) for name in ("init", "update"))
    return not isinstance(value, type) and all(callable(method) for method in methods)


@functools.cache
def _factories() -> dict[str, Callable[..., Any]]:
    """The public factories of optax by name: all that a config can name."""
    spaces = {"": vars(optax), "contrib.": vars(contrib)}
    return {prefix + name: value for prefix, space in spaces.items() for name, value in space.items() if _makes(name, value)}


def _makes(name: str, value: Any) -> bool:
    returns = getattr(value, "__annotations__", {}).get("return")
    return not name.startswith("_") and inspect.isfunction(value) and "GradientTransformation" in str(returns)


def _resolve(factory: Any) -> Callable[..., Any]:
    """The function behind a factory's name."""
    if isinstance(factory, str):
        checks.known_name("factory of optax", factory, _factories())
        return _factories()[factory]
    if not callable(factory):
        expected = "the name of a factory of optax, a function that returns a transformation, or a transformation"
        raise TypeError(f"FromOptax.factory: expected {expected}, got {checks.describe(factory)}.")
    return factory


def _check_factory(factory: Any, options: Mapping[str, Any]) -> bool:
    """Checks a factory and the names of its options; returns whether its updates are to be added."""
    if _is_ready(factory):
        checks.known_options("A ready-made transformation", options, ())
        return False
    parameters = inspect.signature(_resolve(factory)).parameters
    name = factory if isinstance(factory, str) else getattr(factory, "__name__", "")
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        checks.known_options(name, options, parameters)
    required = [n for n, p in parameters.items() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if missing := [n for n in required if n not in options]:
        raise ValueError(f"{name} needs {', '.join(missing)}.")
    return _DESCENDS.get(name, "learning_rate" in parameters)


def _goes_downhill(transformation: Any) -> bool:
    """Whether the first update on a plain gradient points against it."""
    weights, gradient = jnp.ones(2), jnp.full(2, 1e3)
    try:
        updates, _ = transformation.update(gradient, transformation.init(weights), weights)
        return bool(jnp.vdot(updates, gradient) < 0)
    except Exception:  # it needs arguments that only its user has, such as the loss
        return False


def _is_leaf(value: Any) -> bool:
    is_spec = isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[1], Mapping)
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", ())
    is_numbers = dtype is not None and (len(shape) > 0 or jnp.issubdtype(dtype, jnp.floating))
    return is_spec or is_numbers or isinstance(value, (float, jax.Array, Part))


def _as_leaf(where: str, value: Any) -> Any:
    if isinstance(value, (list, tuple, Part)):
        return as_rate(where, value)
    return checks.number(where, value, checks.Bounds())


def _as_setting(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return value.item() if hasattr(value, "dtype") else value


def _like(new: Any, old: Any) -> Any:
    dtype = jnp.result_type(old)
    return new if jnp.result_type(new) == dtype else jnp.asarray(new, dtype)
