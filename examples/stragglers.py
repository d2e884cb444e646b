"""When nine of ten clients are late: drop them, or take what they have done so far?

Late clients do a random part of their ten epochs. FedAvg as published waits for nobody and drops them; FedProx takes their
partial work and keeps it near the global model; FedNova counts each client's steps, so that more steps do not pull harder.

Run:  python examples/stragglers.py
"""

import jax
import jax.numpy as jnp
import optax

import jaxfed
from jaxfed.data import digits, pathological

EPOCHS = 10


def loss(params, batch, key):
    """Softmax regression."""
    logits = batch["x"] @ params["kernel"] + params["bias"]
    values = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return values, {"accuracy": logits.argmax(-1) == batch["y"]}


def main(rounds: int = 30) -> dict[str, float]:
    """The test accuracy by what becomes of late clients: the mean of the last ten rounds."""
    arrays = digits()
    owners = pathological(arrays["y"], clients=50, labels_per_client=2, seed=0)
    train, test = jaxfed.FederatedData.from_arrays(arrays, owners).split(0.2, seed=0)
    work = {"lrate": 0.1, "batch_size": 10, "epochs": EPOCHS}
    choices = {
        "FedAvg, dropped": (jaxfed.fedavg(loss, **work), "drop"),
        "FedAvg, partial work": (jaxfed.fedavg(loss, **work), "partial"),
        "FedProx, partial work": (jaxfed.fedprox(loss, mu=0.1, **work), "partial"),
        "FedNova, partial work": (jaxfed.fednova(loss, **work), "partial"),
    }
    found = {}
    for name, (algorithm, late) in choices.items():
        # Who is late, and by how much, is the same for all: draws depend on the key and the round alone.
        selector = jaxfed.Stragglers(jaxfed.Uniform(10), share=0.9, late=late, epochs=EPOCHS)
        simulation = jaxfed.Simulation(algorithm, train, selector=selector)
        state = simulation.init({"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}, key=jax.random.key(0))
        _, history = simulation.run(state, rounds=rounds, eval_every=1, eval_data=test)
        found[name] = history["eval_accuracy"][-10:].mean()
    return found


if __name__ == "__main__":
    for name, accuracy in main().items():
        print(f"{name:22s} {accuracy:.3f}")
