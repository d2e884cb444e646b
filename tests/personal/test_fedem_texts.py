"""FedEM of models that predict at every position, against loops over rows and positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxfed
from jaxfed import FedEM
from jaxfed.messages import Broadcast
from jaxfed.models.adapters import from_linen
from jaxfed.models.functions import from_functions
from jaxfed.models.losses import accuracy, binary_cross_entropy, cross_entropy

M, ROWS, LENGTH, LETTERS, RATE, STEPS = 2, 5, 4, 3, 0.4, 2
WEIGHTS = np.array([0.3, 0.7])
WHOLE = jaxfed.Steps(None, steps=STEPS)


def init(key):
    return jax.random.normal(key, (LETTERS, LETTERS))


def predict(table, batch):
    return table[batch["x"]]


def loss(table, batch, key):
    return cross_entropy(predict(table, batch), batch)


CLIENT = FedEM(from_functions(init, loss, predict), RATE, WHOLE, models=M)


def last(logits, batch):
    return accuracy(logits[:, -1], {"y": batch["y"][:, -1]})


def texts(label="y"):
    letters = np.random.default_rng(0).integers(0, LETTERS, (ROWS, LENGTH + 1))
    return {"x": letters[:, :-1], label: letters[:, 1:]}


def tables():
    return np.random.default_rng(1).normal(size=(M, LETTERS, LETTERS))


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum()


def by_hand(rows, pi):
    """``(loss, accuracy, whether the last label is found)`` of every row, position after position."""
    found = []
    for x, y in zip(rows["x"], rows["y"]):
        mixed = [sum(pi[m] * softmax(tables()[m][letter]) for m in range(M)) for letter in x]
        hits = [p.argmax() == label for p, label in zip(mixed, y)]
        found.append((-np.mean([np.log(p[label]) for p, label in zip(mixed, y)]), np.mean(hits), hits[-1]))
    return np.array(found).T


def posterior(rows, pi):
    """``q`` as ``[M, rows]``: one for each row, of the mean loss over its positions."""
    q = np.empty((M, ROWS))
    for m in range(M):
        for i, (x, y) in enumerate(zip(rows["x"], rows["y"])):
            mean = np.mean([-np.log(softmax(tables()[m][letter])[label]) for letter, label in zip(x, y)])
            q[m, i] = pi[m] * np.exp(-mean)
    return q / q.sum(0)


def trained(rows, pi):
    """The M tables after a round's steps on the weighted losses."""
    q, ends = posterior(rows, pi), tables()
    for m in range(M):
        for _ in range(STEPS):
            slope = np.zeros((LETTERS, LETTERS))
            for i, (x, y) in enumerate(zip(rows["x"], rows["y"])):
                for letter, label in zip(x, y):
                    slope[letter] += q[m, i] * (softmax(ends[m][letter]) - np.eye(LETTERS)[label]) / (ROWS * LENGTH)
            ends[m] -= RATE * slope
    return ends


def broadcast(client):
    start = Broadcast(jnp.asarray(tables()), {}, {}, 0)
    return start, client.init_kept(start, jax.random.key(0))._replace(weights=jnp.asarray(WEIGHTS))


@pytest.mark.usefixtures("x64")
def test_a_round_weighs_whole_rows():
    rows, (start, kept) = texts(), broadcast(CLIENT)
    upload, kept = CLIENT.run(start, kept, jaxfed.ClientRows.of(rows), jax.random.key(1))
    np.testing.assert_allclose(tables() - upload.delta, trained(rows, WEIGHTS), rtol=1e-12)
    np.testing.assert_allclose(kept.weights, posterior(rows, WEIGHTS).mean(1), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_predictions_are_mixed_at_every_position():
    start, _ = broadcast(CLIENT)
    found = CLIENT.metrics((jnp.asarray(WEIGHTS), start.params, {}), texts())
    expected = by_hand(texts(), WEIGHTS)
    np.testing.assert_allclose(found["loss"], expected[0], rtol=1e-12)
    np.testing.assert_allclose(found["accuracy"], expected[1])
    assert 0 < expected[1].mean() < 1


@pytest.mark.usefixtures("x64")
def test_a_mixture_has_its_models_own_metrics_and_labels():
    """Of a network that is asked for the last label alone, and whose labels are not at "y"."""
    rows = texts("next")
    model = from_linen(nn.Embed(LETTERS, LETTERS), rows, metrics={"last": last}, label_key="next")
    client = FedEM(model, RATE, WHOLE, models=M)
    params = {"embedding": jnp.asarray(tables())}
    found = client.metrics((jnp.asarray(WEIGHTS), params, {}), rows)
    expected = by_hand(texts(), WEIGHTS)
    assert set(found) == {"loss", "last"}
    np.testing.assert_allclose(found["loss"], expected[0], rtol=1e-12)
    np.testing.assert_array_equal(found["last"], expected[2])
    equal = client.model.metrics(params, {}, rows)
    np.testing.assert_array_equal(equal["last"], by_hand(texts(), [1 / M] * M)[2])


def test_labels_of_another_kind_are_refused():
    """Several that do not exclude each other: their probabilities are no softmax."""
    rows = {"x": np.zeros((4, 2), np.float32), "y": np.zeros((4, 3), np.float32)}
    client = FedEM(from_linen(nn.Dense(3), rows, loss=binary_cross_entropy), RATE, WHOLE, models=M)
    with pytest.raises(TypeError, match=r"integer labels.*\(4,\), got float32 \(4, 3\)"):
        client.metrics((jnp.asarray(WEIGHTS), *client.model.init(jax.random.key(0))), rows)


def test_a_single_logit_is_refused():
    """The softmax of one logit is always 1."""
    single = from_functions(lambda key: jnp.zeros(2), loss, lambda w, batch: (batch["x"] @ w)[:, None])
    client = FedEM(single, RATE, WHOLE, models=M)
    batch = {"x": jnp.zeros((3, 2)), "y": jnp.zeros(3, int)}
    with pytest.raises(ValueError, match=r"logits \[B, ..., classes\].*got \(3, 1\).*a second one, of zeros"):
        client.metrics((jnp.asarray(WEIGHTS), jnp.zeros((M, 2)), {}), batch)
