"""A slow federated loop in NumPy: softmax regression, one client after the other, one step after the other.

From the library it takes who takes part and in which order rows come, never how anything is trained or added up.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jaxfed
from jaxfed import part
from jaxfed.base import Selector
from jaxfed.engine.round import CLIENTS, SELECTION
from jaxfed.messages import Cohort

FEATURES, CLASSES = 4, 3
SIZES = np.array([5, 1, 0, 12, 7, 3, 9, 4, 8])


class Planned(Selector):
    """Cohorts ``[R, C]`` given in advance, round after round, and how much of their work each client does.

    The number N leaves a place empty.
    """

    ids: np.ndarray = part.count()
    work: np.ndarray | float = part.number(default=1.0, at_least=0)

    def cohort_size(self, population):
        return self.ids.shape[1]

    def select(self, state, key, round, population):
        ids, work = (jnp.broadcast_to(x, self.ids.shape)[round % len(self.ids)] for x in (self.ids, self.work))
        return Cohort(ids.astype(jnp.int32), ids < population, work)


def softmax_loss(params, batch, key):
    logits = jnp.dot(batch["x"], params["weight"]) + params["bias"][None]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], axis=1)[:, 0]


def softmax_data(sizes=SIZES, dtype=np.float64):
    """Clients of these sizes, with labels that depend on the client."""
    rng = np.random.default_rng(0)
    clients = np.repeat(np.arange(len(sizes)), sizes)
    arrays = {"x": rng.normal(size=(len(clients), FEATURES)).astype(dtype), "y": (rng.integers(0, 3, len(clients)) * clients) % 3}
    return jaxfed.FederatedData.from_arrays(arrays, clients, num_clients=len(sizes))


def softmax_params(dtype=np.float64):
    rng = np.random.default_rng(1)
    return {"bias": rng.normal(size=CLASSES).astype(dtype), "weight": rng.normal(size=(FEATURES, CLASSES)).astype(dtype)}


def flat(params):
    """Bias and weight in one float64 vector."""
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(params)])


def loss_and_gradient(theta, x, y):
    """The mean cross entropy of softmax regression and its gradient, by hand."""
    bias, weight = theta[:CLASSES], theta[CLASSES:].reshape(FEATURES, CLASSES)
    logits = x @ weight + bias
    odds = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = odds / odds.sum(1, keepdims=True)
    error = (probabilities - np.eye(CLASSES)[y]) / len(y)
    return -np.log(probabilities[np.arange(len(y)), y]).mean(), np.concatenate([error.sum(0), (x.T @ error).ravel()])


@dataclasses.dataclass
class Rules:
    """What the loop does; by default nothing but SGD and a mean."""

    lrate: float = 0.1
    mu: float = 0.0
    beta: float = 0.0
    keep_state: bool = False
    scaffold: str = ""
    adaalter: float = 0.0
    by: str = "examples"
    threshold: float | None = None
    server: str = "sgd"
    server_lrate: float = 1.0


@dataclasses.dataclass
class Server:
    """The server's memory: weights, moments, SCAFFOLD's control variate, AdaAlter's accumulator."""

    theta: np.ndarray
    first: np.ndarray | float = 0.0
    second: np.ndarray | float = 1e-6
    control: np.ndarray | float = 0.0
    squares: np.ndarray | float = 1.0


@dataclasses.dataclass
class Client:
    """A client's memory between rounds."""

    velocity: np.ndarray | float = 0.0
    control: np.ndarray | float = 0.0


@partial(jax.jit, static_argnames="limit")
def rows_of_steps(policy, population, client, work, keys, limit):
    """The rows of up to ``limit`` local steps, as numbers within the client, their masks, and how many steps it takes."""
    batch_key = jax.random.fold_in(keys, client)
    batches = policy.of(population.client(client, work), batch_key)
    index, mask = jax.vmap(lambda k: policy.choose(batches.key, k, batches.rows))(jnp.arange(limit))
    return index, mask, batches.steps


@partial(jax.jit, static_argnames=("count", "limit"))
def plan_round(selector, selection, policy, population, key, round, count, limit):
    keys = jax.random.fold_in(key, round)
    cohort = selector.select(selection, jax.random.fold_in(keys, SELECTION), round, count)
    rows = partial(rows_of_steps, policy, population, keys=jax.random.fold_in(keys, CLIENTS), limit=limit)
    return cohort.ids, *jax.vmap(rows)(cohort.ids, cohort.work)


def plan(simulation, state, rounds, limit=9):
    """``[(client, rows of its steps), ...]`` of each round."""
    policy, planned = simulation.algorithm.client.batches, []
    for round in range(int(state.round), int(state.round) + rounds):
        parts = (simulation.selector, state.selector, policy, simulation.population, state.key, round)
        chosen = jax.device_get(plan_round(*parts, simulation.data.num_clients, limit))
        assert chosen[3].max() <= limit
        planned.append([(int(i), [x[m] for x, m in zip(index[:k], mask[:k])]) for i, index, mask, k in zip(*chosen)])
    return planned


def train(rules, data, planned, params, population_weight=None):
    """The weights after each round ``[R, P]``, and each client's mean loss by round."""
    server, clients = Server(flat(params)), [Client() for _ in range(data.num_clients)]
    weight_of_all = data.num_examples if population_weight is None else population_weight
    thetas, losses = [], []
    for cohort in planned:
        uploads = {i: local_round(rules, server, clients[i], data.client(i), steps) for i, steps in cohort if steps}
        server_round(rules, server, list(uploads.values()), weight_of_all)
        thetas.append(server.theta)
        losses.append({i: upload["loss"] for i, upload in uploads.items()})
    return np.array(thetas), losses


def local_round(rules, server, client, rows, steps):
    theta, velocity = server.theta, client.velocity if rules.keep_state else 0.0
    losses, seen, squares = [], [], 0.0
    for t, index in enumerate(steps, start=1):
        loss, gradient = loss_and_gradient(theta, rows["x"][index], rows["y"][index])
        losses.append(loss)
        seen.append(gradient)
        squares = squares + gradient**2
        gradient = gradient + rules.mu * (theta - server.theta)
        gradient = gradient + (server.control - client.control if rules.scaffold else 0)
        if rules.adaalter:
            gradient = gradient / np.sqrt(server.squares + t * rules.adaalter**2)
        velocity = rules.beta * velocity + gradient
        theta = theta - rules.lrate * velocity
    weight = {"examples": len(rows["y"]), "steps": len(steps), "uniform": 1}[rules.by]
    upload = {"delta": server.theta - theta, "loss": np.mean(losses), "squares": squares, "weight": weight}
    client.velocity = velocity
    if rules.scaffold:
        control = np.mean(seen, axis=0) if rules.scaffold == "II" else loss_and_gradient(server.theta, rows["x"], rows["y"])[1]
        upload["change"], client.control = control - client.control, control
    return upload


def server_round(rules, server, uploads, weight_of_all):
    if not uploads:
        return
    weights = np.array([upload["weight"] for upload in uploads])[:, None]
    deltas = np.array([upload["delta"] for upload in uploads])
    mean = (weights * deltas).sum(0) / weights.sum()
    if rules.threshold is not None:
        agreement = np.abs((weights * np.sign(deltas)).sum(0)) / weights.sum()
        mean = np.where(agreement > rules.threshold, 1, agreement) * mean
    server.theta = server.theta - rules.server_lrate * server_direction(rules, server, mean)
    server.squares = server.squares + (weights * np.array([upload["squares"] for upload in uploads])).sum(0) / weights.sum()
    if rules.scaffold:
        server.control = server.control + (weights * np.array([u["change"] for u in uploads])).sum(0) / weight_of_all


def server_direction(rules, server, mean):
    if rules.server == "sgd":
        return mean
    if rules.server == "momentum":
        server.first = 0.9 * server.first + mean
        return server.first
    if rules.server == "adagrad":
        server.second = server.second + mean**2
        return mean / (np.sqrt(server.second) + 1e-3)
    server.first = 0.9 * server.first + 0.1 * mean
    change = mean**2 * np.sign(server.second - mean**2) if rules.server == "yogi" else server.second - mean**2
    server.second = server.second - 0.01 * change
    return server.first / (np.sqrt(server.second) + 1e-3)
