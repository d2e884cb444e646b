"""What the slow transcriptions share: ragged clients of a linear regression, and two parabolas with known fixed points.

From the library they take who takes part, never how anything is trained or added up.
"""

import jax
import jax.numpy as jnp
import numpy as np

import jaxfed

SIZES = np.array([3, 5, 2, 4])
RATE, EPOCHS, BATCH, COHORT, ROUNDS = 0.1, 2, 2, 3, 3
OPTIONS = {"lrate": RATE, "batch_size": BATCH, "epochs": EPOCHS}
START = np.array([0.5, -1.0])
CURVATURE, CENTER = np.array([1.0, 10.0]), np.array([0.0, 1.0])
OPTIMUM = 10 / 11


def loss(params, batch, key):
    return 0.5 * jnp.square(jnp.dot(batch["x"], params) - batch["y"])


def clients():
    """``(x, y)`` of each client."""
    rng = np.random.default_rng(0)
    return [(rng.normal(size=(n, 2)), rng.normal(size=n) + i) for i, n in enumerate(SIZES)]


def minibatches(x, y):
    """The batches of a client's round, in the order of the data; the last of a pass may be partial."""
    for start in list(range(0, len(y), BATCH)) * EPOCHS:
        yield x[start : start + BATCH], y[start : start + BATCH]


def gradient(w, x, y):
    return x.T @ (x @ w - y) / len(y)


def mean_loss(w, x, y):
    return 0.5 * np.mean((x @ w - y) ** 2)


def descend(w, x, y, direction=gradient, rate=RATE):
    """Where local steps along ``direction(w, x, y)`` end, and how many they were."""
    batches = list(minibatches(x, y))
    for batch in batches:
        w = w - rate * direction(w, *batch)
    return w, len(batches)


def data(extra=None):
    """The clients' rows, and ``extra`` arrays of one number per client."""
    owner = np.repeat(np.arange(len(SIZES)), SIZES)
    x, y = (np.concatenate(parts) for parts in zip(*clients()))
    arrays = {"x": x, "y": y} | {name: np.asarray(values)[owner] for name, values in (extra or {}).items()}
    return jaxfed.FederatedData.from_arrays(arrays, owner)


def run(algorithm, lanes, extra=None, start=START):
    """The weights ``[R, 2]`` after each of three rounds, and the cohorts ``[R, C]``; batches come in the order of the data."""
    ordered = algorithm.replace(client=algorithm.client.replace(batches=jaxfed.Epochs(BATCH, False, EPOCHS)))
    simulation = jaxfed.Simulation(ordered, data(extra), COHORT, lanes=lanes)
    done = list(simulation.rounds(simulation.init(start, key=jax.random.key(3)), rounds=ROUNDS))
    return np.array([np.hstack(jax.tree.leaves(state.params)) for state, _ in done]), [report.clients for _, report in done]


def parabola(x, batch, key):
    return batch["a"] / 2 * jnp.square(x - batch["b"])


def end(algorithm, rounds, sizes=(1, 1), **options):
    """The state where a run on the two parabolas ends, each row of which is there ``sizes`` times."""
    owner = np.repeat(np.arange(2), sizes)
    arrays = {"a": CURVATURE[owner], "b": CENTER[owner], "domain": owner}
    simulation = jaxfed.Simulation(algorithm, jaxfed.FederatedData.from_arrays(arrays, owner), chunk=100, **options)
    return simulation.run(simulation.init(jnp.zeros(()), key=jax.random.key(0)), rounds=rounds)[0]
