"""Fair to whom: nine clients have their optimum at 0, the tenth has it at 1, and each algorithm makes its own peace.

FedAvg minimises the mean of the losses F_i, q-FedAvg the mean of F_i^(q+1), AFL the worst mixture of the two groups.

Run:  python examples/fair.py
"""

import jax
import jax.numpy as jnp

import jaxfed


def loss(w, batch, key):
    """A parabola per client."""
    return (w - batch["centre"]) ** 2 / 2


def main(rounds: int = 400) -> dict[str, tuple[float, float, float]]:
    """By algorithm: the common weight, the mean loss, the worst client's loss."""
    tenth = jnp.arange(10) == 9
    data = jaxfed.FederatedData.from_arrays({"centre": 1.0 * tenth, "domain": jnp.int32(tenth)}, client_ids=range(10))
    work = {"batch_size": None, "steps": 1, "weights": "uniform"}
    algorithms = {
        "FedAvg": jaxfed.fedavg(loss, lrate=0.5, **work),
        "q-FedAvg, q = 1": jaxfed.qfedavg(loss, q=1.0, lrate=1.0, **work),
        "q-FedAvg, q = 5": jaxfed.qfedavg(loss, q=5.0, lrate=1.0, **work),
        "AFL": jaxfed.afl(loss, domains=2, ascent_rate=0.5, lrate=0.5, **work),
    }
    found = {}
    for name, algorithm in algorithms.items():
        simulation = jaxfed.Simulation(algorithm, data)
        state, _ = simulation.run(simulation.init(jnp.zeros(()), key=jax.random.key(0)), rounds=rounds)
        losses = simulation.evaluate(state).by_client["loss"]
        found[name] = float(state.params), losses.mean(), losses.max()
    return found


if __name__ == "__main__":
    print(f"{'':18s}weight  mean loss  worst loss")
    for name, (w, mean, worst) in main().items():
        print(f"{name:18s}{w:6.3f}  {mean:9.3f}  {worst:10.3f}")
