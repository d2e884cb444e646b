"""Losses and metrics of every example, from a model's outputs and its batch; the labels are ``batch["y"]``.

All have the form ``(outputs [B, ...], batch) -> values [B]``; where an example has many labels (a sequence, an image), their mean
is the example's value. Padded rows are not this module's concern: their values are left out later.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxfed.messages import Batch

Loss = Callable[[jax.Array, Batch], jax.Array]


def cross_entropy(logits: jax.Array, batch: Batch) -> jax.Array:
    """``-log softmax(logits)[y]``.

    Args:
        logits: ``[B, ..., classes]``.
        batch: Holds ``"y"`` ``[B, ...]``, integers from 0 to classes - 1.

    Returns:
        Values ``[B]``, in nats.

    Raises:
        TypeError: If the labels are not integers.
        ValueError: If the labels are not shaped like the logits without their last axis.

    Example:
        >>> print(cross_entropy(jnp.zeros((1, 4)), {"y": jnp.array([2])}))
        [1.3862944]
    """
    labels = _class_labels(logits, batch)
    return _per_example(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


def binary_cross_entropy(logits: jax.Array, batch: Batch) -> jax.Array:
    """``-y log sigmoid(logit) - (1 - y) log sigmoid(-logit)``.

    Args:
        logits: ``[B]`` or ``[B, 1]`` (or ``[B, k]`` for k labels that do not exclude each other).
        batch: Holds ``"y"`` ``[B]`` or ``[B, k]``, from 0 to 1, of any dtype.

    Returns:
        Values ``[B]``, in nats.

    Raises:
        ValueError: If logits and labels differ in shape.

    Example:
        >>> print(binary_cross_entropy(jnp.zeros((2, 1)), {"y": jnp.array([0, 1])}))
        [0.6931472 0.6931472]
    """
    logits, labels = _aligned(logits, batch)
    return _per_example(optax.losses.sigmoid_binary_cross_entropy(logits, labels.astype(logits.dtype)))


def squared_error(outputs: jax.Array, batch: Batch) -> jax.Array:
    """``(output - y)^2``, without a factor of one half.

    Args:
        outputs: ``[B]``, ``[B, 1]`` or ``[B, ...]``.
        batch: Holds ``"y"``, shaped alike.

    Returns:
        Values ``[B]``.

    Raises:
        ValueError: If outputs and labels differ in shape.

    Example:
        >>> print(squared_error(jnp.array([[1.0], [3.0]]), {"y": jnp.array([1.0, 5.0])}))
        [0. 4.]
    """
    outputs, labels = _aligned(outputs, batch)
    return _per_example(optax.losses.squared_error(outputs, labels.astype(outputs.dtype)))


def accuracy(logits: jax.Array, batch: Batch) -> jax.Array:
    """1 where the largest logit is the label's, else 0.

    >>> print(accuracy(jnp.array([[0.0, 1.0], [0.0, 1.0]]), {"y": jnp.array([1, 0])}))
    [1. 0.]
    """
    return _per_example(jnp.argmax(logits, axis=-1) == _class_labels(logits, batch))


def binary_accuracy(logits: jax.Array, batch: Batch) -> jax.Array:
    """1 where the logit's sign is the label's (above 0 for labels above one half), else 0.

    >>> print(binary_accuracy(jnp.array([2.0, 0.5]), {"y": jnp.array([1, 0])}))
    [1. 0.]
    """
    logits, labels = _aligned(logits, batch)
    return _per_example((logits > 0) == (labels > 0.5))


METRICS: dict[Loss, dict[str, Loss]] = {
    cross_entropy: {"accuracy": accuracy},
    binary_cross_entropy: {"accuracy": binary_accuracy},
}
"""What evaluation reports beside the loss, by loss."""


def _per_example(values: jax.Array) -> jax.Array:
    return values.reshape(values.shape[0], -1).mean(-1)


def _class_labels(logits: jax.Array, batch: Batch) -> jax.Array:
    labels = batch["y"]
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        remedy = "Cast them (y.astype(int)), or use binary_cross_entropy or squared_error."
        raise TypeError(f"cross_entropy: expected integer labels, got {labels.dtype}. {remedy}")
    if logits.ndim < 2 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"cross_entropy: expected logits [B, ..., classes] for labels [B, ...], got {logits.shape} for {labels.shape}."
        )
    return labels


def _aligned(outputs: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Outputs ``[B, 1]`` and labels ``[B]`` are made one shape, so that they do not broadcast to ``[B, B]``."""
    labels = batch["y"]
    if outputs.ndim == labels.ndim + 1 and outputs.shape[-1] == 1:
        outputs = outputs[..., 0]
    if outputs.shape != labels.shape:
        raise ValueError(f"The loss needs outputs and labels of one shape, got {outputs.shape} and {labels.shape}.")
    return outputs, labels
