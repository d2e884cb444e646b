"""A run evaluates what clients predict with: their own models where the algorithm personalizes, else the global one."""

import jax
import jax.numpy as jnp
import pytest

import jaxfed


def parabola(v, batch, key):
    return (v - batch["x"]) ** 2 / 2


@pytest.mark.parametrize(
    ("recipe", "options", "loss"),
    [(jaxfed.fedavg, {}, 2.0), (jaxfed.ditto, {"strength": 0.0}, 0.0), (jaxfed.finetuned, {"finetune_steps": 20}, 0.0)],
)
def test_evaluation_in_use(recipe, options, loss):
    """Clients at 0 and 4: the global model ends at 2 with the loss 2, a client's own at its centre with none."""
    data = jaxfed.FederatedData.from_arrays({"x": jnp.array([0.0, 4.0])}, [0, 1])
    simulation = jaxfed.Simulation(recipe(parabola, lrate=0.5, batch_size=1, steps=20, **options), data)
    state = simulation.init(jnp.array(1.0), key=jax.random.key(0))
    state, history = simulation.run(state, rounds=3, eval_every=3)
    assert history[-1].evaluation.metrics["loss"] == pytest.approx(loss, abs=1e-4)
    assert simulation.evaluate(state).metrics["loss"] == pytest.approx(2.0, abs=1e-4)
