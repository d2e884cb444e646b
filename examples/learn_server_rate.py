"""A server that learns its learning rate: gradients of a validation loss pass through the rounds of a whole training.

Twenty clients fit lines of their own with small local steps, so that the server rate of FedAvg, 1, is too low for ten rounds.
How much too low, gradient descent on the logarithm of the rate finds out.

Run:  python examples/learn_server_rate.py
"""

import jax
import jax.numpy as jnp

import jaxfed


def loss(params, batch, key):
    """The squared error of a line."""
    return (batch["x"] @ params - batch["y"]) ** 2


def rows(key, count):
    """Rows of clients whose slopes scatter around (1, -2, 3)."""
    slope_key, x_key, client_key, noise_key = jax.random.split(key, 4)
    slopes = jnp.array([1.0, -2.0, 3.0]) + 0.3 * jax.random.normal(slope_key, (20, 3))
    x, client = jax.random.normal(x_key, (count, 3)), jax.random.randint(client_key, (count,), 0, 20)
    return {"x": x, "y": (x * slopes[client]).sum(1) + 0.1 * jax.random.normal(noise_key, (count,))}, client


def main(steps: int = 60) -> dict[str, tuple[float, float]]:
    """By name a server rate and the validation loss after ten rounds with it: FedAvg's, the learned one, the best of a grid."""
    train_key, validation_key, run_key = jax.random.split(jax.random.key(0), 3)
    train, owners = rows(train_key, 400)
    validation, _ = rows(validation_key, 200)
    algorithm = jaxfed.fedavg(loss, lrate=0.005, batch_size=5)
    simulation = jaxfed.Simulation(algorithm, jaxfed.FederatedData.from_arrays(train, owners), cohort_size=5)
    state = simulation.init(jnp.zeros(3), key=run_key)
    rounds = jaxfed.differentiable_rounds(simulation, rounds=10)

    @jax.jit
    @jax.value_and_grad
    def after_training(log_rate):
        params = rounds(algorithm.replace(server=jnp.exp(log_rate)), state).params
        return loss(params, validation, None).mean()

    log_rate = jnp.zeros(())
    for _ in range(steps):
        value, slope = after_training(log_rate)
        log_rate -= 0.3 * slope / value  # descent on the logarithm of the loss, whose slope is the same for any unit
    grid = min((float(after_training(x)[0]), float(jnp.exp(x))) for x in jnp.linspace(-1, 3, 81))
    results = {name: (float(jnp.exp(x)), float(after_training(x)[0])) for name, x in (("fedavg", 0.0), ("learned", log_rate))}
    return results | {"grid": grid[::-1]}


if __name__ == "__main__":
    for name, (rate, value) in main().items():
        print(f"{name:8s} rate {rate:5.2f}  validation loss {value:.4f}")
