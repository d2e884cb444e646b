"""A ``Model`` from a Flax module, Linen or NNX, or from plain functions.

The weights of either kind of module become plain nested dicts of arrays, so that every part, checkpoint and message sees the
same tree. What a module keeps beside its weights (the running means of a batch norm) becomes ``stats``: it travels with the
weights, is averaged with the clients' weights, and bypasses the server's optimizer; integers keep the server's value.

Padded rows do not count in batch norms, and a batch without a single real row leaves the statistics as they were.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import core, nnx
from flax import linen as nn

from jaxfed import checks, trees
from jaxfed.base import Model
from jaxfed.messages import Params, Stats
from jaxfed.models.functions import Task, as_model, from_functions, row_shapes
from jaxfed.models.losses import Loss, binary_cross_entropy, cross_entropy, squared_error

__all__ = ["binary_cross_entropy", "cross_entropy", "from_functions", "from_linen", "from_nnx", "squared_error"]

_WHEN_TRAINING = {"train": True, "training": True, "is_training": True, "deterministic": False, "use_running_average": False}


def from_linen(
    module: nn.Module,
    sample: Mapping[str, Any],
    *,
    loss: Loss = cross_entropy,
    metrics: Mapping[str, Loss] | None = None,
    input_key: str = "x",
    label_key: str | None = "y",
    train_argument: str | None = None,
) -> Model:
    """A Model from a Linen module that is called with one array, ``module(batch[input_key])``.

    A ``mask`` argument of the module's ``__call__`` gets ``batch["mask"]`` ``[B]``. Batch norms inside the module get it in any
    case, unless they are called with a ``mask`` of their own. One key seeds all random streams of the module, anew at every step.

    Args:
        module: The module, an instance.
        sample: Rows of the data by key, ``[1 or more, ...]`` each; only shapes and dtypes are read.
        loss: ``(outputs, batch) -> values [B]``, a module-level function; it finds the labels at ``batch["y"]``.
        metrics: Further values of every example by name, functions like ``loss``; by default those that go with it.
        input_key: The key of the inputs.
        label_key: The key of the labels; None if the loss needs none.
        train_argument: The argument of ``__call__`` that turns dropout and batch norm on or off; by default every one of
            ``train``, ``training``, ``is_training``, ``deterministic`` and ``use_running_average`` that it has.

    Returns:
        A Model whose ``stats`` are the module's collections other than ``params``.

    Raises:
        TypeError: If ``module`` is not an instance of a Linen module, or labels are of the wrong dtype.
        ValueError: If the sample, the module and the loss do not fit together.

    Example:
        >>> model = from_linen(nn.Dense(3), {"x": jnp.ones((1, 4)), "y": jnp.zeros(1, int)})
        >>> params, stats = model.init(jax.random.key(0))
        >>> print(trees.names(params), stats)
        ['bias', 'kernel'] {}
        >>> batch = {"x": jnp.zeros((2, 4)), "y": jnp.array([0, 2]), "mask": jnp.ones(2, bool)}
        >>> values, stats = model.loss(params, stats, batch, jax.random.key(1))
        >>> print(values)
        [1.0986123 1.0986123]
    """
    remedy = "NNX modules are for from_nnx." if isinstance(module, nnx.Module) else "Pass an instance: MyModule(...)."
    checks.instance("from_linen: module", module, nn.Module, remedy)
    rows = row_shapes(sample, input_key, label_key)
    flags = _Flags.of(module, train_argument)
    return as_model(_Linen(module, flags, rows[input_key]), Task.of(loss, metrics, input_key, label_key), rows)


def from_nnx(
    module: nnx.Module | Callable[..., nnx.Module],
    sample: Mapping[str, Any],
    *,
    loss: Loss = cross_entropy,
    metrics: Mapping[str, Loss] | None = None,
    input_key: str = "x",
    label_key: str | None = "y",
    train_argument: str | None = None,
) -> Model:
    """A Model from an NNX module that is called with one array, ``module(batch[input_key])``.

    A ``mask`` argument of the module's ``__call__`` gets ``batch["mask"]`` ``[B]``; a module with batch norms must have one and
    hand it on (``norm(x, mask=mask[:, None])``), so that padded rows do not count. The states of random streams are no
    statistics: they are set from the key at every step.

    Args:
        module: A function that makes the module from ``rngs``, such as ``functools.partial(MyModule, 784, 10)``, so that ``init``
            draws new weights from its key; or an instance, whose weights ``init`` then returns whatever the key. Models of
            the same function share compiled programs; an instance, or a ``partial`` made anew, compiles anew.
        sample: Rows of the data by key, ``[1 or more, ...]`` each; only shapes and dtypes are read.
        loss: ``(outputs, batch) -> values [B]``, a module-level function; it finds the labels at ``batch["y"]``.
        metrics: Further values of every example by name, functions like ``loss``; by default those that go with it.
        input_key: The key of the inputs.
        label_key: The key of the labels; None if the loss needs none.
        train_argument: As for :func:`from_linen`; ``module.train()`` and ``module.eval()`` are called in any case.

    Returns:
        A Model whose ``params`` are the module's ``nnx.Param`` and whose ``stats`` are its other variables.

    Raises:
        TypeError: If ``module`` makes no NNX module, or labels are of the wrong dtype.
        ValueError: If the sample, the module and the loss do not fit together.

    Example:
        >>> from functools import partial
        >>> model = from_nnx(partial(nnx.Linear, 4, 3), {"x": jnp.ones((1, 4)), "y": jnp.zeros(1, int)})
        >>> params, stats = model.init(jax.random.key(0))
        >>> print(trees.names(params), stats)
        ['bias', 'kernel'] {}
    """
    rows = row_shapes(sample, input_key, label_key)
    return as_model(_NNX.of(module, train_argument), Task.of(loss, metrics, input_key, label_key), rows)


@dataclasses.dataclass(frozen=True)
class _Flags:
    """What a module's ``__call__`` wants to know beside its inputs."""

    training: tuple[str, ...]
    mask: bool

    @classmethod
    def of(cls, module: Any, train_argument: str | None) -> "_Flags":
        parameters = inspect.signature(type(module).__call__).parameters
        if train_argument is None:
            return cls(tuple(name for name in _WHEN_TRAINING if name in parameters), "mask" in parameters)
        checks.choice("train_argument", train_argument, _WHEN_TRAINING)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if train_argument not in parameters and not takes_any:
            known = ", ".join(name for name in parameters if name != "self")
            raise ValueError(f"{type(module).__name__}.__call__ has no argument {train_argument!r}. It takes: {known}.")
        return cls((train_argument,), "mask" in parameters)

    def __call__(self, training: bool, mask: jax.Array | None) -> dict[str, Any]:
        """The keyword arguments of a call."""
        flags = {name: _WHEN_TRAINING[name] == training for name in self.training}
        return flags | ({"mask": mask} if self.mask else {})


@dataclasses.dataclass(frozen=True)
class _Linen:
    """A Linen module as pure functions. Equal modules give equal networks, so a Model that is made anew does not retrace."""

    module: nn.Module
    flags: _Flags
    row: jax.ShapeDtypeStruct

    def init(self, key: jax.Array) -> tuple[Params, Stats]:
        # A row of zeros and not the sample's: the network stays hashable, and initializers read shapes only.
        inputs = jnp.zeros((1, *self.row.shape), self.row.dtype)
        variables = self.module.init(key, inputs, **self.flags(False, jnp.ones(1, bool)))
        variables = dict(core.unfreeze(nn.meta.unbox(variables)))
        return variables.pop("params", {}), variables

    def evaluate(self, params: Params, stats: Stats, inputs: jax.Array, mask: jax.Array | None) -> jax.Array:
        return self.module.apply({"params": params, **stats}, inputs, **self.flags(False, mask))  # type: ignore[return-value]

    def train(self, params: Params, stats: Stats, inputs: jax.Array, mask: jax.Array, key: jax.Array) -> tuple[jax.Array, Stats]:
        # Streams without a key of their own draw from "params", each at its own place and count.
        with nn.intercept_methods(partial(_mask_batch_norm, mask)):
            return self.module.apply(  # type: ignore[return-value]
                {"params": params, **stats}, inputs, **self.flags(True, mask), mutable=list(stats), rngs={"params": key}
            )


def _mask_batch_norm(mask: jax.Array, call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__" and "mask" not in kwargs:
        x = args[0] if args else kwargs["x"]
        if x.shape[0] != mask.shape[0]:
            raise ValueError(
                f"BatchNorm {context.module.name!r} gets {x.shape} for a batch of {mask.shape[0]} rows, so it is unclear which "
                "entries belong to padded rows. Call it with a mask of your own (mask=None counts all)."
            )
        kwargs = kwargs | {"mask": mask.reshape(-1, *(1,) * (x.ndim - 1))}
    return call(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class _Streams:
    """The shapes of a module's random streams, from which fresh ones are made."""

    keys: Any
    counts: Any
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, keys: Any, counts: Any) -> "_Streams":
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(keys))
        return cls(jax.tree.structure(keys), jax.tree.structure(counts), shapes)

    def seeded(self, key: jax.Array) -> tuple[Any, Any]:
        """Streams with keys of their own, at count 0."""
        keys = [jax.random.split(jax.random.fold_in(key, i), shape) for i, shape in enumerate(self.shapes)]
        counts = [jnp.zeros(shape, jnp.uint32) for shape in self.shapes]
        return self.keys.unflatten(keys), self.counts.unflatten(counts)


@dataclasses.dataclass(frozen=True)
class _NNX:
    """An NNX module as pure functions: its graph in evaluation and in training, and where its weights come from."""

    weights: Callable[[jax.Array], tuple[Params, Stats]]
    flags: _Flags
    streams: _Streams
    evaluating: Any
    training: Any

    @classmethod
    def of(cls, module: Any, train_argument: str | None) -> "_NNX":
        if isinstance(module, nnx.Module):
            weights, built = _Stored(module), nnx.clone(module)
        else:
            weights, built = _Drawn(module), nnx.eval_shape(lambda: _build(module, 0))
        flags = _Flags.of(built, train_argument)
        if not flags.mask and jax.tree.leaves(nnx.state(built, nnx.BatchStat)):
            name, remedy = type(built).__name__, "Let it take mask=None and hand it on: norm(x, mask=mask[:, None])."
            raise ValueError(f"{name} has batch norms but its __call__ takes no mask, so padded rows would count. {remedy}")
        # train() and eval() set fields of the graph and leave the arrays alone, so one tree of weights serves both.
        graphs = []
        for set_mode in (built.eval, built.train):
            set_mode()
            graph, _, keys, counts, _ = _split(built)
            graphs.append(graph)
        return cls(weights, flags, _Streams.of(keys, counts), *graphs)

    def init(self, key: jax.Array) -> tuple[Params, Stats]:
        return self.weights(key)

    def evaluate(self, params: Params, stats: Stats, inputs: jax.Array, mask: jax.Array | None) -> jax.Array:
        streams = self.streams.seeded(jax.random.key(0))  # present in the graph, and silent in evaluation
        module = nnx.merge(self.evaluating, params, *streams, stats, copy=True)
        return module(inputs, **self.flags(False, mask))

    def train(self, params: Params, stats: Stats, inputs: jax.Array, mask: jax.Array, key: jax.Array) -> tuple[jax.Array, Stats]:
        # Without copy=True a vmap over clients that share their statistics would mutate them from another trace.
        module = nnx.merge(self.training, params, *self.streams.seeded(key), stats, copy=True)
        outputs = module(inputs, **self.flags(True, mask))
        return outputs, _split(module)[-1]


def _split(module: nnx.Module) -> tuple[Any, Params, Any, Any, Stats]:
    """The graph, weights, stream keys, stream counts and other variables of a module, as plain nested dicts."""
    graph, *states = nnx.split(module, nnx.Param, nnx.RngKey, nnx.RngCount, ...)
    params, keys, counts, stats = map(nnx.to_pure_dict, states)
    return graph, params, keys, counts, stats


def _build(make: Callable[..., nnx.Module], seed: Any) -> nnx.Module:
    remedy = "Pass a function that makes the module from rngs: functools.partial(MyModule, ...)."
    if not callable(make):
        raise TypeError(f"from_nnx: expected an NNX module or a function, got {checks.describe(make)}. {remedy}")
    return checks.instance("from_nnx: module", make(rngs=nnx.Rngs(seed)), nnx.Module, remedy)


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """New weights from a key."""

    make: Callable[..., nnx.Module]

    def __call__(self, key: jax.Array) -> tuple[Params, Stats]:
        _, params, _, _, stats = _split(_build(self.make, key))
        return params, stats


class _Stored:
    """The weights of an instance, whatever the key."""

    def __init__(self, module: nnx.Module):
        _, self.params, _, _, self.stats = _split(nnx.clone(module))

    def __call__(self, key: jax.Array) -> tuple[Params, Stats]:
        del key
        return trees.copy((self.params, self.stats))
