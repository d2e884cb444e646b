"""One model for all, or one for each: when clients hold few labels, a model of their own predicts better than the global one.

Run:  python examples/personal.py
"""

import jax
import optax

import jaxfed
from jaxfed.data import digits, pathological
from jaxfed.models.functions import from_functions


def init(key):
    """A hidden layer, and a head."""
    body, head = jax.random.split(key)
    return {"body": 0.1 * jax.random.normal(body, (64, 32)), "head": 0.1 * jax.random.normal(head, (32, 10))}


def predict(params, batch):
    """Logits [B, 10]."""
    return jax.nn.relu(batch["x"] @ params["body"]) @ params["head"]


def loss(params, batch, key):
    """Cross entropy, and accuracy for evaluation."""
    logits = predict(params, batch)
    values = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return values, {"accuracy": logits.argmax(-1) == batch["y"]}


def main(rounds: int = 30) -> dict[str, tuple[float, float]]:
    """The test accuracies by algorithm: of the global model, and of each client's own."""
    model, work = from_functions(init, loss, predict), {"lrate": 0.1, "batch_size": 10}
    algorithms = {
        "Ditto": jaxfed.ditto(model, strength=0.1, **work),
        "APFL": jaxfed.apfl(model, alpha=0.5, **work),
    }
    arrays = digits()
    owners = pathological(arrays["y"], clients=30, labels_per_client=3, seed=0)
    train, test = jaxfed.FederatedData.from_arrays(arrays, owners).split(0.3, seed=0)
    found = {}
    for name, algorithm in algorithms.items():
        simulation = jaxfed.Simulation(algorithm, train, cohort_size=10)
        state, _ = simulation.run(simulation.init(key=jax.random.key(0)), rounds=rounds)
        evaluations = simulation.evaluate(state, test), simulation.evaluate_personal(state, test)
        found[name] = tuple(evaluation.metrics["accuracy"] for evaluation in evaluations)
    return found


if __name__ == "__main__":
    print(f"{'':8s}global  personal")
    for name, (common, own) in main().items():
        print(f"{name:8s}{common:6.3f}  {own:8.3f}")
