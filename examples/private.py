"""What does privacy cost? The accuracy of a model that 1000 clients train, by the budget that each of them is granted.

Every client is drawn with the same probability, its update is clipped to a greatest norm that follows their median, and noise
hides any single one in the sum. The noise that a budget asks for comes from an accountant.

Run:  python examples/private.py       (needs  pip install "jaxfed[privacy]")
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxfed
from jaxfed import accounting

CLIENTS, EXPECTED, ROUNDS, DELTA = 1000, 50, 40, 1e-5


def loss(params, batch, key):
    """Softmax regression."""
    logits = batch["x"] @ params["kernel"] + params["bias"]
    values = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return values, {"accuracy": logits.argmax(-1) == batch["y"]}


def federation(seed=0):
    """Eight rows of fifty features for each client, labels of four classes from one linear rule; a quarter is for testing."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(CLIENTS * 8, 50)).astype(np.float32)
    y = (x @ rng.normal(size=(50, 4)) + rng.normal(size=(len(x), 4))).argmax(1).astype(np.int32)
    return jaxfed.FederatedData.from_arrays({"x": x, "y": y}, np.repeat(np.arange(CLIENTS), 8)).split(0.25, seed=seed)


def main(budgets: tuple[float, ...] = (0.5, 2.0, 8.0, np.inf)) -> dict[float, float]:
    """The test accuracy by epsilon, for a delta of 1e-5."""
    train, test = federation()
    rate = EXPECTED / CLIENTS
    selector = jaxfed.PoissonSampling(2 * EXPECTED, rate)
    found = {}
    for epsilon in budgets:
        budget = {"epsilon": epsilon, "sampling_rate": rate, "steps": ROUNDS, "delta": DELTA}
        noise = 0.0 if epsilon == np.inf else accounting.noise_multiplier(**budget)
        rule = jaxfed.AdaptivePrivateMean(EXPECTED, max_norm=0.5, noise_multiplier=noise, count_std=EXPECTED / 20)
        algorithm = jaxfed.fedavg(loss, lrate=0.5, batch_size=None, epochs=2, weights="uniform").replace(aggregator=rule)
        simulation = jaxfed.Simulation(algorithm, train, selector=selector)
        first = {"kernel": jnp.zeros((50, 4)), "bias": jnp.zeros(4)}
        state, _ = simulation.run(simulation.init(first, key=jax.random.key(0)), rounds=ROUNDS)
        found[epsilon] = simulation.evaluate(state, test).metrics["accuracy"]
    return found


if __name__ == "__main__":
    for epsilon, accuracy in main().items():
        print(f"epsilon {epsilon:4.1f}  accuracy {accuracy:.3f}")
