"""How often the user's loss is traced: a fixed number for a new program, and never again for the same shapes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfed
from jaxfed import Optimizer, Simulation
from jaxfed.engine.round import run_round
from jaxfed.models import advice

TRACES = 2
"""Advice on slow layers looks at the loss, and the round is traced."""
count = 0


@pytest.fixture(autouse=True)
def no_advice_yet():
    """Advice is given once for a loss: which test comes first must not matter."""
    advice._warn_once.cache_clear()


def counted_loss(params, batch, key):
    global count
    count += 1
    return jnp.square(jnp.dot(batch["x"], params["w"]) + params["b"] - batch["y"])


def federation(seed=0, sizes=(3, 5, 1, 4)):
    rng = np.random.default_rng(seed)
    clients = np.repeat(np.arange(len(sizes)), sizes)
    arrays = {"x": rng.normal(size=(len(clients), 2)), "y": rng.normal(size=len(clients))}
    return jaxfed.FederatedData.from_arrays({k: v.astype(np.float32) for k, v in arrays.items()}, clients)


def params(seed=0):
    return {"b": jnp.zeros(()), "w": jax.random.normal(jax.random.key(seed), (2,))}


def start(algorithm, data=None, **options):
    simulation = Simulation(algorithm, federation() if data is None else data, 2, lanes=2, chunk=4, **options)
    return simulation, simulation.init(params(), key=jax.random.key(0))


def traces(function):
    """How many times ``function()`` traces the loss."""
    before = count
    function()
    return count - before


OPTIONS = {"lrate": 0.1, "batch_size": 2, "epochs": 2}
KEPT = Optimizer(0.1, modules=["adam"], keep_state=True)
RECIPES = {
    "fedavg": partial(jaxfed.fedavg, counted_loss),
    "fedadam": partial(jaxfed.fedadam, counted_loss),
    "scaffold": partial(jaxfed.scaffold, counted_loss),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_loss_is_traced_for_the_first_run_only(recipe):
    simulation, state = start(recipe(**OPTIONS))
    assert traces(lambda: simulation.run(state, rounds=10)) == TRACES
    later, _ = simulation.run(state, rounds=1)
    again = {
        "a second call": lambda: simulation.run(state, rounds=10),
        "another number of rounds": lambda: simulation.run(later, rounds=7),
        "round by round": lambda: list(simulation.rounds(later, rounds=2)),
        "another state": lambda: simulation.run(simulation.init(params(1), key=jax.random.key(7)), rounds=3),
    }
    assert {name: traces(run) for name, run in again.items()} == dict.fromkeys(again, 0)


def test_new_numbers_and_data_of_the_same_shapes_trace_nothing():
    simulation, state = start(jaxfed.fedprox(counted_loss, **OPTIONS))
    simulation.run(state, rounds=1)
    changes = {
        "lrate": jaxfed.fedprox(counted_loss, **OPTIONS | {"lrate": 0.2}),
        "lrate from NumPy": jaxfed.fedprox(counted_loss, **OPTIONS | {"lrate": np.float64(0.2)}),
        "lrate from JAX": jaxfed.fedprox(counted_loss, **OPTIONS | {"lrate": jnp.float32(0.2)}),
        "epochs": jaxfed.fedprox(counted_loss, **OPTIONS | {"epochs": 3}),
        "mu": jaxfed.fedprox(counted_loss, mu=2, **OPTIONS),
        "server": jaxfed.fedprox(counted_loss, server_lrate=0.5, **OPTIONS),
    }
    pairs = {name: start(algorithm) for name, algorithm in changes.items()}
    pairs["data"] = start(jaxfed.fedprox(counted_loss, **OPTIONS), federation(seed=1, sizes=(5, 2, 4, 2)))
    found = {name: traces(partial(simulation.run, state, rounds=2)) for name, (simulation, state) in pairs.items()}
    assert found == dict.fromkeys(pairs, 0)


def test_another_model_or_batch_size_traces_anew():
    simulation, state = start(jaxfed.fedavg(counted_loss, **OPTIONS | {"batch_size": 3}))
    assert traces(lambda: simulation.run(state, rounds=1)) == TRACES


def test_weakly_typed_weights_trace_once():
    def scalar_loss(params, batch, key):
        return counted_loss({"w": jnp.zeros(2), "b": params}, batch, key)

    simulation = Simulation(jaxfed.fedavg(scalar_loss, **OPTIONS), federation())
    state, _ = simulation.run(simulation.init(jnp.array(1.0), key=jax.random.key(0)), rounds=1)
    assert traces(lambda: simulation.run(state, rounds=1)) == 0


def test_evaluation_traces_once():
    simulation, state = start(jaxfed.fedavg(counted_loss, **OPTIONS))
    assert traces(lambda: simulation.evaluate(state)) == 2
    later = simulation.init(params(3), key=jax.random.key(1))
    assert traces(lambda: simulation.evaluate(later)) == 0


RATES = [0.01, 0.1, 0.5]


def round_of(simulation, state):
    """``algorithm -> weights after one round``, a function that JAX may transform."""
    parts = (simulation.selector, simulation.population, state, 2)
    return lambda algorithm: run_round(algorithm, *parts)[0].params


def assert_like_separate_rounds(together, one_round, make):
    alone = jax.jit(one_round)
    separate = [alone(make(rate)) for rate in RATES]
    jax.tree.map(lambda x, *y: np.testing.assert_allclose(x, y, rtol=1e-5), together, *separate)
    assert len({float(b) for b in together["b"]}) == len(RATES)


@pytest.mark.parametrize("name", ["lrate", "server_lrate"])
def test_a_round_vmapped_over_an_algorithm_equals_separate_rounds(name):
    def make(rate):
        return jaxfed.fedavg(counted_loss, **{"lrate": 0.1, "batch_size": 2, name: rate})

    one_round, swept = round_of(*start(make(0.1))), make(jnp.array(RATES))
    axes = jax.tree.map(lambda x: 0 if jnp.ndim(x) else None, swept)
    assert_like_separate_rounds(jax.jit(jax.vmap(one_round, in_axes=(axes,)))(swept), one_round, make)


def test_an_algorithm_can_be_built_from_traced_numbers():
    def make(rate):
        return jaxfed.fedprox(counted_loss, mu=rate, lrate=rate, batch_size=2, epochs=2)

    one_round = round_of(*start(make(0.1)))
    assert_like_separate_rounds(jax.vmap(lambda rate: one_round(make(rate)))(jnp.array(RATES)), one_round, make)


def test_the_population_may_be_first_used_inside_a_trace():
    simulation, _ = start(jaxfed.fedavg(counted_loss, **OPTIONS))
    jax.jit(lambda: simulation.population.weight)()
    assert float(simulation.population.weight) == 13
