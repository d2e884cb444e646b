"""Federated training in twenty lines: your loss, your data, your optimizers, a picture.

Run:  python examples/quickstart.py
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import jaxfed
from jaxfed.data import digits, dirichlet_by_label


def loss(params, batch, key):
    """Softmax regression: a value per example, and a metric for evaluation."""
    logits = batch["x"] @ params["kernel"] + params["bias"]
    values = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return values, {"accuracy": logits.argmax(-1) == batch["y"]}


def main(rounds: int = 100, picture: str = "quickstart.png") -> float:
    """Trains on 100 clients with skewed labels and returns the test accuracy."""
    arrays = digits()
    owners = dirichlet_by_label(arrays["y"], clients=100, alpha=0.5, seed=0)
    train, test = jaxfed.FederatedData.from_arrays(arrays, owners).split(0.2, seed=0)

    client = jaxfed.Optimizer(lrate=0.5, regularizers=[("fedprox", {"alpha": 0.01})])
    server = jaxfed.Optimizer(lrate=0.03, modules=["adam"])
    algorithm = jaxfed.fedavg(loss, lrate=client, server_lrate=server, batch_size=10)
    simulation = jaxfed.Simulation(algorithm, train, cohort_size=10)

    state = simulation.init({"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}, key=jax.random.key(0))
    state, history = simulation.run(state, rounds=rounds, eval_every=5, eval_data=test)

    evaluated = jnp.isfinite(history["eval_accuracy"])
    plt.plot(history["round"][evaluated], history["eval_accuracy"][evaluated])
    plt.xlabel("round")
    plt.ylabel("test accuracy")
    plt.savefig(picture)
    return history["eval_accuracy"][-1]


if __name__ == "__main__":
    print(f"test accuracy {main():.3f}")
