"""How long until 80% are right, if a round lasts as long as its slowest client? Five ways to choose who takes part.

Devices differ thirtyfold in speed and are gone for four hours of twelve. A round can wait for all ten that it asked; ask
thirteen and take the first ten; ask by Oort, which prefers clients with much to teach and little to wait for; or wait for
nobody: ten train at their own pace, and the server steps with every third that finishes.

Run:  python examples/selection.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxfed
from jaxfed.data import digits, pathological

CLIENTS, WANTED, EPOCHS, TARGET = 60, 10, 5, 0.8


def loss(params, batch, key):
    """Softmax regression."""
    logits = batch["x"] @ params["kernel"] + params["bias"]
    values = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return values, {"accuracy": logits.argmax(-1) == batch["y"]}


def devices(sizes, seed=0):
    """How long each client takes for a round, and when it is there: all of twelve hours but four."""
    rng = np.random.default_rng(seed)
    speeds = {"milliseconds": rng.lognormal(5, 1, CLIENTS), "kbit_per_second": rng.lognormal(7, 1, CLIENTS)}
    seconds = jaxfed.completion_seconds(**speeds, examples=EPOCHS * sizes, model_kbit=650 * 32 / 1000)
    leaves = rng.uniform(0, 8 * 3600, CLIENTS)
    begins, ends = [0 * leaves, leaves + 4 * 3600], [leaves, 0 * leaves + 12 * 3600]
    return seconds, jaxfed.Windows(np.transpose(begins), np.transpose(ends), np.full(CLIENTS, 12 * 3600))


def main(rounds: int = 150) -> dict[str, float]:
    """The hours until the target is reached, by who is chosen; infinite if it is not."""
    arrays = digits()
    owners = pathological(arrays["y"], clients=CLIENTS, labels_per_client=2, seed=0)
    train, test = jaxfed.FederatedData.from_arrays(arrays, owners).split(0.2, seed=0)
    seconds, there = devices(train.sizes)
    more = int(1.3 * WANTED)
    loads = {"seconds": seconds, "availability": there}
    choices = {
        "chance, waits for all": jaxfed.FirstToFinish(jaxfed.Uniform(WANTED), WANTED, **loads),
        "chance, the first to finish": jaxfed.FirstToFinish(jaxfed.Uniform(more), WANTED, **loads),
        "the highest loss": jaxfed.FirstToFinish(jaxfed.Criterion(more), WANTED, **loads),
        "Oort": jaxfed.FirstToFinish(jaxfed.Oort(more, train.sizes, seconds), WANTED, **loads),
        "chance, waits for nobody": jaxfed.Asynchronous(jaxfed.Uniform(WANTED), buffer=3, **loads),
    }
    found = {}
    for name, selector in choices.items():
        # Without late clients it is FedAvg.
        algorithm = jaxfed.fedbuff(loss, lrate=0.1, batch_size=10, epochs=EPOCHS, weights="examples", measures=selector.reads)
        simulation = jaxfed.Simulation(algorithm, train, selector=selector)
        state = simulation.init({"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}, key=jax.random.key(0))
        _, history = simulation.run(state, rounds=rounds, eval_every=1, eval_data=test)
        reached = np.flatnonzero(history["eval_accuracy"] >= TARGET)
        found[name] = float(history["clock"][reached[0]]) / 3600 if reached.size else np.inf
    return found


if __name__ == "__main__":
    for name, hours in main().items():
        print(f"{name:28s} {hours:5.2f} hours")
