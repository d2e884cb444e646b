"""Per-example losses and metrics against their formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.models import losses

LOGITS = np.array([[1.0, -2.0, 0.5], [0.0, 3.0, 3.5]])
LABELS = np.array([0, 1])


def test_cross_entropy_is_the_negative_log_likelihood():
    probabilities = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
    values = losses.cross_entropy(jnp.array(LOGITS), {"y": jnp.array(LABELS)})
    np.testing.assert_allclose(values, -np.log(probabilities[[0, 1], LABELS]), rtol=1e-6)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2)])
def test_binary_losses_per_example(shape):
    logits, labels = np.random.default_rng(0).normal(size=shape), np.random.default_rng(1).integers(0, 2, shape)
    probability = 1 / (1 + np.exp(-logits))
    expected = -np.log(np.where(labels == 1, probability, 1 - probability)).reshape(4, -1).mean(1)
    np.testing.assert_allclose(losses.binary_cross_entropy(jnp.array(logits), {"y": jnp.array(labels)}), expected, rtol=1e-5)
    right = ((logits > 0) == (labels == 1)).reshape(4, -1).mean(1)
    np.testing.assert_allclose(losses.binary_accuracy(jnp.array(logits), {"y": jnp.array(labels)}), right)


def test_a_sequence_counts_as_the_mean_of_its_labels():
    logits, labels = jnp.array(LOGITS)[None], jnp.array(LABELS)[None]
    whole = losses.cross_entropy(logits, {"y": labels})
    parts = losses.cross_entropy(logits[0], {"y": labels[0]})
    np.testing.assert_allclose(whole, [parts.mean()], rtol=1e-6)
    np.testing.assert_allclose(losses.accuracy(logits, {"y": labels}), [0.5])


@pytest.mark.parametrize("outputs", [jnp.array([1.0, 4.0, 9.0]), jnp.array([[1.0], [4.0], [9.0]])])
def test_squared_error_never_broadcasts_to_pairs(outputs):
    values = losses.squared_error(outputs, {"y": jnp.array([1, 2, 3])})
    np.testing.assert_allclose(values, [0.0, 4.0, 36.0])


@pytest.mark.parametrize(
    ("loss", "outputs", "labels", "error", "text"),
    [
        (losses.cross_entropy, (3, 2), jnp.zeros(3), TypeError, "expected integer labels, got float32. Cast them"),
        (losses.cross_entropy, (3, 2), jnp.zeros((3, 1), int), ValueError, r"got \(3, 2\) for \(3, 1\)"),
        (losses.cross_entropy, (3,), jnp.zeros(3, int), ValueError, r"expected logits \[B, ..., classes\]"),
        (losses.accuracy, (3, 2), jnp.zeros(3, bool), TypeError, "got bool"),
        (losses.squared_error, (3, 2), jnp.zeros(3), ValueError, "outputs and labels of one shape"),
        (losses.binary_cross_entropy, (3,), jnp.zeros((3, 1)), ValueError, "outputs and labels of one shape"),
    ],
)
def test_labels_that_do_not_fit_are_refused(loss, outputs, labels, error, text):
    with pytest.raises(error, match=text):
        loss(jnp.zeros(outputs), {"y": labels})
