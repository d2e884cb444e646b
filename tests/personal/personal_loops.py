"""A slow federated loop in NumPy, one client after the other, around what an algorithm's paper says a client does.

The model is ``softmax(tanh(x body) head)``. Batches go in the order of the data, cohorts are planned, so that the loop needs
nothing of the library.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxfed
from jaxfed import part
from jaxfed.base import Selector
from jaxfed.messages import Broadcast, Cohort
from jaxfed.models.functions import from_functions
from jaxfed.models.losses import accuracy, cross_entropy

FEATURES, HIDDEN, CLASSES = 3, 2, 3
SIZES = [5, 1, 0, 9, 7, 3]
PLAN = [[0, 1, 2, 3], [3, 4, 5, 0], [1, 3, 0, 4]]
RATE, SERVER_RATE, BATCH, EPOCHS = 0.3, 0.7, 4, 2
ORDERED = jaxfed.Epochs(BATCH, shuffle=False, epochs=EPOCHS)
SHUFFLED = ORDERED.replace(shuffle=True)


class Planned(Selector):
    """Cohorts ``[R, C]`` given in advance."""

    ids: Any = part.count()

    def cohort_size(self, population):
        return self.ids.shape[1]

    def select(self, state, key, round, population):
        ids = jnp.asarray(self.ids)[round].astype(jnp.int32)
        return Cohort(ids, ids < population, jnp.ones(ids.shape))


def init(key):
    body, head = jax.random.split(key)
    return {"body": jax.random.normal(body, (FEATURES, HIDDEN)), "head": jax.random.normal(head, (HIDDEN, CLASSES))}


def predict(params, batch):
    return jnp.tanh(batch["x"] @ params["body"]) @ params["head"]


def loss(params, batch, key):
    logits = predict(params, batch)
    return cross_entropy(logits, batch), {"accuracy": accuracy(logits, batch)}


MODEL = from_functions(init, loss, predict)


def local_training(lrate=RATE, batches=ORDERED):
    return jaxfed.LocalTraining(MODEL, lrate, batches)


def data(sizes=SIZES, seed=0):
    """Clients of these sizes whose labels depend on the client."""
    rng = np.random.default_rng(seed)
    clients = np.repeat(np.arange(len(sizes)), sizes)
    x = rng.normal(size=(len(clients), FEATURES))
    return jaxfed.FederatedData.from_arrays(
        {"x": x, "y": (rng.integers(0, 3, len(x)) * clients) % 3}, clients, num_clients=len(sizes)
    )


def start(*models, seed=1):
    """Initial weights, with a leading ``models``."""
    rng = np.random.default_rng(seed)
    return {"body": rng.normal(size=(*models, FEATURES, HIDDEN)), "head": rng.normal(size=(*models, HIDDEN, CLASSES))}


def tree(function, *trees):
    """``function`` on each entry of dicts."""
    return {name: function(*(t[name] for t in trees)) for name in trees[0]}


def probabilities(params, x):
    logits = np.tanh(x @ params["body"]) @ params["head"]
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


def losses(params, x, y):
    return -np.log(probabilities(params, x)[np.arange(len(y)), y])


def gradient(params, x, y, weights=1.0):
    """The gradient of the mean over a batch of ``weights * loss``, by hand."""
    hidden = np.tanh(x @ params["body"])
    error = (probabilities(params, x) - np.eye(CLASSES)[y]) * np.broadcast_to(weights, len(y))[:, None] / len(y)
    return {"body": x.T @ ((error @ params["head"].T) * (1 - hidden**2)), "head": hidden.T @ error}


def steps(rows, epochs=EPOCHS):
    """The batches ``(x, y)`` of a client's round."""
    first = range(0, len(rows["y"]), BATCH)
    return [(rows["x"][i : i + BATCH], rows["y"][i : i + BATCH]) for _ in range(epochs) for i in first]


def sgd(params, slope, rate=RATE):
    return tree(lambda w, g: w - rate * g, params, slope)


def train(params, rows, epochs=EPOCHS, only=("body", "head"), rate=RATE):
    """Plain local training, of some leaves only."""
    for x, y in steps(rows, epochs):
        slope = gradient(params, x, y)
        params = {name: w - rate * slope[name] * (name in only) for name, w in params.items()}
    return params


@dataclass
class Result:
    """The weights after the last round, and what each client that took part keeps."""

    params: Any
    kept: dict[int, Any]


def federated(local, first, params):
    """``local(w, kept, rows) -> (end, kept)`` for each client of each cohort; ``first(w)`` is what a new one keeps."""
    clients, kept = data(), {}
    for cohort in PLAN:
        present = [i for i in cohort if SIZES[i]]
        ends = []
        for i in present:
            end, kept[i] = local(params, kept[i] if i in kept else first(params), clients.client(i))
            ends.append(end)
        mean = tree(lambda *leaves, n=[SIZES[i] for i in present]: np.average(leaves, axis=0, weights=n), *ends)
        params = tree(lambda w, m: w + SERVER_RATE * (m - w), params, mean)
    return Result(params, kept)


def run_round(client, params, number, /, **changes):
    """``(upload, kept)`` of one client's round from ``params``; ``changes`` are to what a new client keeps."""
    return _call("run", client, params, jaxfed.ClientRows.of(data().client(number)), changes)


def personal(client, params, number, /, **changes):
    """What a client predicts with; ``changes`` are to what a new client keeps."""
    return _call("personalize", client, params, jaxfed.ClientRows.of(data().client(number)), changes)


@partial(jax.jit, static_argnums=0)
def _call(method, client, params, rows, changes):
    begin = Broadcast(params, {}, {}, 0)
    kept = client.init_kept(begin, jax.random.key(0))
    kept = kept._replace(**changes) if changes else kept
    return getattr(client, method)(begin, kept, rows, jax.random.key(1))


def simulation(client, lanes=3):
    algorithm = jaxfed.Algorithm(client, server=SERVER_RATE, aggregator=jaxfed.Mean("examples"))
    return jaxfed.Simulation(algorithm, data(), selector=Planned(PLAN), lanes=lanes)


def simulate(client, lanes=3, params=None):
    """The state after the planned rounds."""
    run = simulation(client, lanes)
    return run.run(run.init(start() if params is None else params, key=jax.random.key(0)), rounds=len(PLAN))[0]


def kept_of(state, client):
    """What one client keeps."""
    return jax.tree.map(lambda x: np.asarray(x[client]), state.kept)


def assert_trees(got, expected, tolerance=1e-11):
    for name, leaf in expected.items():
        np.testing.assert_allclose(got[name], leaf, rtol=tolerance, atol=tolerance, err_msg=name)


def curvatures():
    """Two clients with ``a / 2 (x - b)^2``, a = (1, 10), b = (0, 1)."""
    return jaxfed.FederatedData.from_arrays({"a": np.array([1.0, 10.0]), "b": np.array([0.0, 1.0])}, [0, 1])


def parabola(params, batch, key):
    return batch["a"] / 2 * (params - batch["b"]) ** 2
