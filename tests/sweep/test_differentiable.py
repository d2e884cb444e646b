"""Gradients through rounds against central differences in float64; values against the run itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine.oracle import SIZES, softmax_data, softmax_loss, softmax_params

import jaxfed
from jaxfed import part, trees
from jaxfed.base import Aggregator
from jaxfed.client.local import LocalTraining
from jaxfed.server.aggregators import over_weight

LOCAL = {"batch_size": 4, "epochs": 2}


def with_rates(recipe, **options):
    """From the numbers to the recipe's algorithm with these rates."""

    def make(numbers):
        return recipe(softmax_loss, lrate=numbers["lrate"], server_lrate=numbers["server_lrate"], **LOCAL, **options)

    return make


def fedprox(numbers):
    return jaxfed.fedprox(softmax_loss, mu=numbers["mu"], lrate=numbers["lrate"], **LOCAL)


class ByDomain(Aggregator, register=False):
    """A weight for every domain, here for every client."""

    reads = ("domain",)
    shares: object = part.number(at_least=0)

    def prepare(self, upload, sent):
        share = self.shares[upload.metrics["domain"].astype(int)]
        return trees.scale(share, upload.delta), share

    def finalize(self, total, state, info):
        return over_weight(*total), state


def together(numbers):
    """FedProx at the client, Adam at the server, and a weight for every client, at once: one program takes seconds to compile."""
    optimizer = jaxfed.Optimizer(numbers["lrate"], regularizers=[jaxfed.FedProx(numbers["mu"])])
    client = LocalTraining(softmax_loss, optimizer, jaxfed.Epochs(4, epochs=2), measures=["domain"])
    server = jaxfed.Optimizer(numbers["server_lrate"], modules=[jaxfed.Adam.paper(tau=0.1)])
    return jaxfed.Algorithm(client, server, ByDomain(numbers["shares"]))


RATES = {"lrate": 0.3, "server_lrate": 0.7}
CASES = {
    "together": (together, RATES | {"mu": 0.5, "shares": np.linspace(0.5, 2, len(SIZES))}),
    "scaffold": (with_rates(jaxfed.scaffold, weights="steps"), RATES),
    "fedavg": (with_rates(jaxfed.fedavg), RATES),
    "fedprox": (fedprox, {"lrate": 0.3, "mu": 0.5}),
    "fedadam": (with_rates(jaxfed.fedadam, tau=0.1), RATES),
}
SLOW = [pytest.param(case, 1, marks=pytest.mark.slow) for case in ("fedavg", "fedprox", "fedadam", "scaffold")]


def clients():
    data = softmax_data()
    domain = np.repeat(np.arange(len(SIZES)), SIZES)
    return jaxfed.FederatedData(data.arrays | {"domain": domain}, data.offsets, data.client_names)


def validation_loss(params):
    held_out = {key: jnp.asarray(x) for key, x in softmax_data(SIZES[::-1]).arrays.items()}
    return softmax_loss(params, held_out, None).mean()


def simulation_of(make, numbers, **options):
    return jaxfed.Simulation(make(numbers), clients(), cohort_size=6, lanes=3, **options)


@pytest.mark.usefixtures("x64")
def test_gradients_over_three_devices_equal_those_on_one():
    """Sums over devices, a scattered server step with Adam's state in parts, and kept rows that travel, backwards."""
    make, numbers = CASES["together"]

    def gradients(devices):
        simulation = simulation_of(make, numbers, devices=devices)
        state, rounds = simulation.init(softmax_params(), key=jax.random.key(2)), jaxfed.differentiable_rounds(simulation, 2)
        return jax.jit(jax.grad(lambda numbers: validation_loss(rounds(make(numbers), state).params)))(numbers)

    for one, three in zip(*(jax.tree.leaves(gradients(devices)) for devices in (1, 3))):
        np.testing.assert_allclose(three, one, rtol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("case", "lanes"), [("together", 1), ("scaffold", 4), *SLOW])
def test_gradients_are_central_differences_of_the_run(case, lanes):
    make, numbers = CASES[case]
    simulation = simulation_of(make, numbers)
    state = simulation.init(softmax_params(), key=jax.random.key(2))
    rounds = jaxfed.differentiable_rounds(simulation, 3, lanes=lanes)

    def objective(numbers, params):
        return validation_loss(rounds(make(numbers), state._replace(params=params)).params)

    @jax.jit
    def of_run(params):
        return validation_loss(params)

    def value(numbers, params):
        numbers = {name: np.asarray(x) if np.ndim(x) else float(x) for name, x in numbers.items()}
        after, _ = simulation_of(make, numbers).run(state._replace(params=params), rounds=3)
        return float(of_run(after.params))

    at = (numbers, state.params)
    found, gradients = jax.jit(jax.value_and_grad(objective, (0, 1)))(*at)
    assert float(found) == pytest.approx(value(*at), rel=1e-12)
    rng, step = np.random.default_rng(3), 1e-5
    leaves, tree = jax.tree.flatten(at)
    # Every number by itself; arrays along two random directions each.
    for i, (leaf, gradient) in enumerate(zip(leaves, jax.tree.leaves(gradients))):
        for _ in range(2 if np.ndim(leaf) else 1):
            along = rng.normal(size=np.shape(leaf)) if np.ndim(leaf) else 1.0
            ends = [value(*jax.tree.unflatten(tree, [*leaves[:i], leaf + s * along, *leaves[i + 1 :]])) for s in (step, -step)]
            expected = (ends[0] - ends[1]) / (2 * step)
            assert abs(expected) > 1e-6
            assert float((np.asarray(gradient) * along).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("devices", [1, 2])
def test_a_closed_form(devices):
    """Clients at 0 and 4 with losses (w - b)^2 / 2: w -> w + s (m - 1) (w - 2) with m = (1 - r)^2 in a round of two steps."""

    def loss(w, batch, key):
        return (w - batch["b"]) ** 2 / 2

    data = jaxfed.FederatedData.from_arrays({"b": np.array([0.0, 4.0])}, [0, 1])
    algorithm = jaxfed.fedavg(loss, lrate=0.1, batch_size=1, steps=2)
    simulation = jaxfed.Simulation(algorithm, data, devices=devices)
    state, rounds = simulation.init(jnp.zeros(()), key=jax.random.key(0)), jaxfed.differentiable_rounds(simulation, 5)
    r, s = 0.2, 0.6

    def end(r, s):
        return rounds(jaxfed.fedavg(loss, lrate=r, server_lrate=s, batch_size=1, steps=2), state).params

    shrink = 1 + s * ((1 - r) ** 2 - 1)
    by_r, by_s = jax.jit(jax.grad(end, (0, 1)))(r, s)
    assert float(jax.jit(end)(r, s)) == pytest.approx(2 - 2 * shrink**5, rel=1e-12)
    assert float(by_r) == pytest.approx(-10 * shrink**4 * s * -2 * (1 - r), rel=1e-12)
    assert float(by_s) == pytest.approx(-10 * shrink**4 * ((1 - r) ** 2 - 1), rel=1e-12)


def test_poisson_batches_pass():
    data = softmax_data(dtype=np.float32)

    def make(rate):
        return jaxfed.Algorithm(LocalTraining(softmax_loss, rate, jaxfed.Poisson(4, steps=3, rate=0.5)))

    simulation = jaxfed.Simulation(make(0.1), data, cohort_size=3)
    state = simulation.init(softmax_params(np.float32), key=jax.random.key(0))
    rounds = jaxfed.differentiable_rounds(simulation, 1)
    with jax.numpy_rank_promotion("allow"):
        assert jnp.isfinite(jax.jit(jax.grad(lambda rate: rounds(make(rate), state).params["bias"].sum()))(0.1))


def test_epochs_that_are_traced_are_refused():
    simulation = jaxfed.Simulation(jaxfed.fedavg(softmax_loss, lrate=0.1, **LOCAL), softmax_data(dtype=np.float32))
    state = simulation.init(softmax_params(np.float32), key=jax.random.key(0))
    rounds = jaxfed.differentiable_rounds(simulation, 1)
    with pytest.raises(TypeError, match="Close over the algorithm"):
        jax.jit(rounds)(simulation.algorithm, state)
    with pytest.raises(ValueError, match="rounds: expected an integer at least 1"):
        jaxfed.differentiable_rounds(simulation, 0)
