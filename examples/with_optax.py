"""Both ways between jaxfed and optax: our parts in an optax chain, optax's transformations in our Optimizer.

Run:  python examples/with_optax.py
"""

import jax
import jax.numpy as jnp
import optax

import jaxfed


def minimise(transformation: optax.GradientTransformation, steps: int = 200) -> jax.Array:
    """Minimises |w - 1|^2 from 0 by any optax transformation, and returns w."""

    def step(carry, _):
        weights, state = carry
        updates, state = transformation.update(2 * (weights - 1), state, weights)
        return (optax.apply_updates(weights, updates), state), None

    start = jnp.zeros(3)
    return jax.lax.scan(step, (start, transformation.init(start)), length=steps)[0][0]


def main() -> dict[str, jax.Array]:
    """The same problem by four compositions."""
    return {
        "our module in a chain": minimise(optax.chain(jaxfed.L2Clipping(1.0), jaxfed.Momentum(0.5), optax.scale(-0.1))),
        "our Optimizer as it is": minimise(jaxfed.Optimizer(0.1, modules=["ewma"])),
        "optax in our Optimizer": minimise(jaxfed.Optimizer(0.1, modules=[optax.clip_by_global_norm(1.0), "momentum"])),
        "an optax factory by name": minimise(
            jaxfed.Optimizer(0.02, modules=[("optax", {"factory": "scale_by_adam", "b1": 0.8})])
        ),
    }


if __name__ == "__main__":
    for name, weights in main().items():
        print(f"{name:26s} {weights}")
