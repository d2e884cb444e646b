"""Why SCAFFOLD: with several local steps on unlike clients FedAvg stops beside the optimum, SCAFFOLD at it.

Two clients minimise (x - 0)^2 / 2 and 10 (x - 1)^2 / 2; together the optimum is 10 / 11.

Run:  python examples/client_drift.py
"""

import jax
import jax.numpy as jnp

import jaxfed


def loss(x, batch, key):
    """A parabola per client."""
    return batch["curvature"] / 2 * (x - batch["centre"]) ** 2


def main() -> dict[str, float]:
    """Where each algorithm stops."""
    clients = {"curvature": jnp.array([1.0, 10.0]), "centre": jnp.array([0.0, 1.0])}
    data = jaxfed.FederatedData.from_arrays(clients, client_ids=[0, 1])
    recipes = {"fedavg": jaxfed.fedavg, "fedprox": jaxfed.fedprox, "scaffold": jaxfed.scaffold}
    found = {}
    for name, recipe in recipes.items():
        simulation = jaxfed.Simulation(recipe(loss, lrate=0.05, batch_size=1, steps=10), data)
        state, _ = simulation.run(simulation.init(jnp.zeros(()), key=jax.random.key(0)), rounds=200)
        found[name] = float(state.params)
    return found


if __name__ == "__main__":
    print(f"optimum  {10 / 11:.6f}")
    for name, x in main().items():
        print(f"{name:8s} {x:.6f}")
