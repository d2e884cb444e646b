"""A round's four steps - broadcast, client update, upload, aggregate - are four pure functions. Replacing them adds an algorithm.

Here it is FedCM, which the package does not have: all clients mix the cohort's last mean direction into each of their steps
(Xu et al., https://arxiv.org/abs/2106.10874, 2021).

Run:  python examples/four_steps.py
"""

import jax
import jax.numpy as jnp

import jaxfed
from jaxfed import trees


class FedCMServer(jaxfed.OptiModule):
    """Keeps the last mean direction."""

    name, aux_name = "fedcm-server", "fedcm"

    def init(self, params):
        return trees.zeros_like(params)

    def send(self, state):  # 1. broadcast: beside the weights, the last mean direction
        return state

    def receive(self, state, aux, info):  # 4. aggregate: what the clients sent, averaged as the weights are
        return trees.cast_like(aux, state)

    def update(self, updates, state, params=None):
        return updates, state


class FedCMClient(jaxfed.OptiModule):
    """Steps along ``alpha g + (1 - alpha) direction``."""

    name, aux_name, aux_reduction = "fedcm-client", "fedcm", "mean"
    alpha: float = jaxfed.number(default=0.1, above=0, at_most=1)

    def start_round(self, kept, start):
        return start.aux, trees.zeros_like(start.params), jnp.zeros(())

    def update(self, updates, state, params=None):  # 2. client update: a gradient becomes a step
        direction, total, steps = state
        step = trees.average(1 - self.alpha, direction, updates)
        return step, (direction, trees.add_scaled(total, 1, step), steps + 1)

    def end_round(self, state, begin, end):  # 3. upload: nothing is kept, the mean of the steps travels
        return (), trees.divide(state[1], jnp.maximum(state[2], 1))


def fedcm(loss, lrate, alpha, **options):
    """FedAvg with both halves."""
    client, server = (jaxfed.Optimizer(r, modules=[half]) for r, half in ((lrate, FedCMClient(alpha)), (1.0, FedCMServer())))
    return jaxfed.fedavg(loss, lrate=client, server_lrate=server, **options)


def loss(x, batch, key):
    """A parabola per client."""
    return batch["curvature"] / 2 * (x - batch["centre"]) ** 2


def main(rounds: int = 800) -> dict[str, float]:
    """Where each algorithm is after some rounds; the optimum is 10 / 11."""
    clients = {"curvature": jnp.array([1.0, 10.0]), "centre": jnp.array([0.0, 1.0])}
    data, options = jaxfed.FederatedData.from_arrays(clients, client_ids=[0, 1]), {"lrate": 0.05, "batch_size": 1, "steps": 10}
    found = {}
    for algorithm, name in ((jaxfed.fedavg(loss, **options), "fedavg"), (fedcm(loss, alpha=0.1, **options), "fedcm")):
        simulation = jaxfed.Simulation(algorithm, data)
        state, _ = simulation.run(simulation.init(jnp.zeros(()), key=jax.random.key(0)), rounds=rounds)
        found[name] = float(state.params)
    return found


if __name__ == "__main__":
    for name, x in main().items():
        print(f"{name:7s} {x:.6f}  (optimum {10 / 11:.6f})")
