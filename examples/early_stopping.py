"""Stop in time, keep the best, see every client: with wrong labels among few rows, more rounds do not mean better models.

Ditto trains a model for each client. The run stops when validation rows are predicted no better for ten evaluations; what is kept
is the state of the best one, personal models included, and only then the test rows are looked at.

Run:  python examples/early_stopping.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxfed
from jaxfed.data import digits, dirichlet_by_label


def loss(params, batch, key):
    """Softmax regression."""
    logits = batch["x"] @ params["kernel"] + params["bias"]
    values = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return values, {"accuracy": logits.argmax(-1) == batch["y"]}


def main(rounds: int = 300) -> tuple[jaxfed.BestModel, jaxfed.History, dict[str, float]]:
    """The best model, the history, and the test losses of the best and the last model."""
    arrays, rng = digits(), np.random.default_rng(0)
    wrong = rng.random(len(arrays["y"])) < 0.2
    arrays["y"] = np.where(wrong, rng.integers(0, 10, len(wrong)), arrays["y"]).astype(np.int32)
    owners = dirichlet_by_label(arrays["y"], clients=30, alpha=1.0, seed=0)
    rest, test = jaxfed.FederatedData.from_arrays(arrays, owners).split(0.3, seed=0)
    train, valid = rest.split(0.3, seed=1)
    simulation = jaxfed.Simulation(jaxfed.ditto(loss, strength=0.1, lrate=0.5, batch_size=5), train, cohort_size=10)
    state = simulation.init({"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}, key=jax.random.key(0))

    stopping, history = jaxfed.EarlyStopping("loss", patience=10), jaxfed.History()
    for state, reports in simulation.chunks(state, rounds=rounds, eval_every=5, eval_data=valid):  # noqa: B020
        history.extend(reports)
        if stopping.update(reports[-1], state):
            break

    best = stopping.best
    losses = {name: simulation.evaluate_in_use(s, test).metrics["loss"] for name, s in (("best", best.state), ("last", state))}
    return best, history, losses


if __name__ == "__main__":
    best, history, losses = main()
    print(f"stopped after round {history[-1].round}, best after {best.round}")
    print(f"test loss {losses['best']:.3f}, of the last model {losses['last']:.3f}")
    rounds, curves = history.by_client("loss")
    print("round   worst tenth  median  best tenth of the clients' validation losses")
    for round, values in zip(rounds, np.nanpercentile(curves, (90, 50, 10), axis=1).T):
        print(f"{round:5d}" + "".join(f"{value:11.3f}" for value in values))
