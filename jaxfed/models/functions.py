"""A ``Model`` from plain functions, and the four functions of a Model over any network.

A network is a hashable object with ``init(key) -> (params, stats)``, ``evaluate(params, stats, inputs, mask) -> outputs`` and
``train(params, stats, inputs, mask, key) -> (outputs, stats)``. The functions made here are equal if their network and task are,
so that a Model that is made anew does not retrace.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxfed import checks, trees
from jaxfed.base import Model
from jaxfed.client import gradients
from jaxfed.messages import Batch, Params, Stats
from jaxfed.models.losses import METRICS, Loss

Rows = dict[str, jax.ShapeDtypeStruct]
"""Shape and dtype of one row of the data, by key."""


def from_functions(init: Callable, loss: Callable, predict: Callable) -> Model:
    """A Model from plain functions of the weights: for models without statistics, in whatever library they are written.

    Args:
        init: ``key -> params``.
        loss: ``(params, batch, key) -> values [B]``, or ``(values, {name: [B]})`` with further metrics; the key is None in
            evaluation.
        predict: ``(params, batch) -> outputs [B, ...]``.

    Returns:
        A Model whose ``stats`` are ``{}``.

    Raises:
        TypeError: If one of them is not a function.

    Example:
        >>> def init(key):
        ...     return {"w": jax.random.normal(key, (3,))}
        >>> def predict(params, batch):
        ...     return batch["x"] @ params["w"]
        >>> def loss(params, batch, key):
        ...     return (predict(params, batch) - batch["y"]) ** 2
        >>> model = from_functions(init, loss, predict)
        >>> params, stats = model.init(jax.random.key(0))
        >>> model.predict(params, stats, {"x": jnp.ones((5, 3))}).shape
        (5,)
    """
    for name, function in (("init", init), ("predict", predict)):
        if not callable(function):
            raise TypeError(f"from_functions: expected a function {name}, got {checks.describe(function)}.")
    lifted = gradients.as_model("from_functions: loss", loss)
    return lifted.replace(init=Partial(_without_stats, Partial(init)), predict=Partial(_plain_predict, Partial(predict)))


def _without_stats(init: Callable, key: jax.Array) -> tuple[Params, Stats]:
    return init(key), {}


def _plain_predict(predict: Callable, params: Params, stats: Stats, batch: Batch) -> jax.Array:
    del stats
    return predict(params, batch)


@dataclasses.dataclass(frozen=True)
class Task:
    """What a network is trained for: where its inputs and labels are, its loss and what is measured beside it."""

    loss: Loss
    metrics: tuple[tuple[str, Loss], ...]
    input_key: str
    label_key: str | None

    @classmethod
    def of(cls, loss: Loss, metrics: Mapping[str, Loss] | None, input_key: str, label_key: str | None) -> "Task":
        """A task; ``metrics=None`` takes those that go with the loss."""
        for name, function in (("loss", loss), *(metrics or {}).items()):
            if not callable(function):
                expected = "a function (outputs, batch) -> values [B]"
                raise TypeError(f"{name}: expected {expected}, got {checks.describe(function)}.")
        metrics = METRICS.get(loss, {}) if metrics is None else metrics
        return cls(loss, tuple(metrics.items()), input_key, label_key)

    def inputs(self, batch: Batch) -> jax.Array:
        """What the network is called with."""
        return _take("The batch", batch, self.input_key)

    def labelled(self, batch: Batch) -> Batch:
        """The batch with the labels at ``"y"``."""
        return batch if self.label_key is None else {**batch, "y": _take("The batch", batch, self.label_key)}


@dataclasses.dataclass(frozen=True)
class _Init:
    network: Any

    def __call__(self, key: jax.Array) -> tuple[Params, Stats]:
        return self.network.init(key)


@dataclasses.dataclass(frozen=True)
class _Predict:
    network: Any
    task: Task

    def __call__(self, params: Params, stats: Stats, batch: Batch) -> jax.Array:
        return self.network.evaluate(params, stats, self.task.inputs(batch), batch.get("mask"))


@dataclasses.dataclass(frozen=True)
class _Loss:
    network: Any
    task: Task

    def __call__(self, params: Params, stats: Stats, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Stats]:
        if key is None:
            outputs = self.network.evaluate(params, stats, self.task.inputs(batch), batch.get("mask"))
            return self.task.loss(outputs, self.task.labelled(batch)), stats
        anyone = batch["mask"].any()
        # A batch without a real row counts them all, so that nothing becomes NaN, and its statistics are dropped.
        mask = batch["mask"] | ~anyone
        outputs, new_stats = self.network.train(params, stats, self.task.inputs(batch), mask, key)
        return self.task.loss(outputs, self.task.labelled(batch)), trees.select(anyone, new_stats, stats)


@dataclasses.dataclass(frozen=True)
class _Metrics:
    network: Any
    task: Task

    def __call__(self, params: Params, stats: Stats, batch: Batch) -> dict[str, jax.Array]:
        outputs = self.network.evaluate(params, stats, self.task.inputs(batch), batch.get("mask"))
        return _Measure(self.task)(outputs, batch)


@dataclasses.dataclass(frozen=True)
class _Measure:
    task: Task

    def __call__(self, outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        functions = {"loss": self.task.loss, **dict(self.task.metrics)}
        return {name: function(outputs, self.task.labelled(batch)) for name, function in functions.items()}


def as_model(network: Any, task: Task, rows: Rows) -> Model:
    """The Model of a network and a task, tried on the shapes of two rows before it is returned.

    Raises:
        TypeError: If the labels are of the wrong dtype.
        ValueError: If there is nothing to train, or the loss does not give one value for each example.
    """
    # Objects rather than bound methods, which compare by identity: the Model of an equal network must hit the same programs.
    model = Model(_Init(network), _Loss(network, task), _Predict(network, task), _Metrics(network, task), _Measure(task))
    batch = {key: jax.ShapeDtypeStruct((2, *row.shape), row.dtype) for key, row in rows.items()}
    batch["mask"] = jax.ShapeDtypeStruct((2,), jnp.dtype(bool))
    key = jax.random.key(0)  # of shape alone: nothing is drawn here
    params, stats = jax.eval_shape(model.init, key)
    if not jax.tree.leaves(params):
        raise ValueError("The module has no weights to train. Check that it has layers, and that it was made for these inputs.")
    values, _ = jax.eval_shape(model.loss, params, stats, batch, key)
    if values.shape != (2,):
        remedy = "Return the loss of every example, not their mean."
        raise ValueError(f"The loss must give values [B], got shape {values.shape} for a batch of 2. {remedy}")
    return model


def row_shapes(sample: Mapping[str, Any], *keys: str | None) -> Rows:
    """Shape and dtype of one row of every array of a sample, which must hold ``keys``.

    Raises:
        TypeError: If the sample is no mapping.
        ValueError: If a key is missing, or an array has no rows.
    """
    checks.instance("sample", sample, Mapping, 'Pass arrays by key: {"x": ..., "y": ...}.')
    for key in keys:
        if key is not None:
            _take("The sample", sample, key)
    for key, array in sample.items():
        if jnp.ndim(array) == 0 or len(array) == 0:
            raise ValueError(f"sample[{key!r}]: expected at least one row, got shape {jnp.shape(array)}.")
    return {key: jax.ShapeDtypeStruct(jnp.shape(array)[1:], jnp.result_type(array)) for key, array in sample.items()}


def _take(where: str, arrays: Mapping[str, Any], key: str) -> Any:
    if key not in arrays:
        remedy = "Name the right one with input_key= or label_key= (label_key=None: no labels)."
        raise ValueError(f"{where} has no key {key!r}. Its keys: {', '.join(arrays) or 'none'}. {remedy}")
    return arrays[key]
