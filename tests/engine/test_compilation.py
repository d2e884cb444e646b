"""A program is compiled in the way that suits its steps, and rounds are the same either way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfed
from jaxfed.engine import compilation
from jaxfed.models.recurrent import Kernels, lstm

WIDTH = 160


def wide(params, batch, key):
    return jnp.square(jax.nn.relu(batch["x"] @ params["w"]) @ params["v"] - batch["y"])


def curved(params, batch, key):
    return jnp.square(jnp.tanh(batch["x"] @ params["w"]) @ params["v"] - batch["y"])


def recurring(params, batch, key):
    pieces = jnp.split(params["w"][:128, :128], 4)  # four gates of 32
    kernels = Kernels([piece[:, :32] for piece in pieces], [piece[:, 32:64] for piece in pieces], [jnp.zeros(32)] * 4)
    carry = jnp.zeros((len(batch["x"]), 32))
    _, h = lstm(jnp.moveaxis(batch["x"].reshape(-1, 5, 32), 1, 0), kernels, (carry, carry))
    return jnp.square(h[-1] @ params["v"][:32] - batch["y"])


def linear(params, batch, key):
    return jnp.square(batch["x"] @ params - batch["y"])


def simulation(loss, lrate=0.01, width=WIDTH, batch_size=2):
    rng = np.random.default_rng(0)
    clients = np.repeat(np.arange(4), (3, 5, 1, 4))
    arrays = {"x": rng.normal(size=(len(clients), width)), "y": rng.normal(size=len(clients))}
    data = jaxfed.FederatedData.from_arrays({k: v.astype(np.float32) for k, v in arrays.items()}, clients)
    built = jaxfed.Simulation(jaxfed.fedavg(loss, lrate=lrate, batch_size=batch_size), data, cohort_size=3)
    params = {"w": 0.1 * jax.random.normal(jax.random.key(1), (width, width)), "v": jnp.ones(width) / width}
    return built, built.init(params, key=jax.random.key(0))


def chosen(monkeypatch, loss, **options):
    """The program that the first round of a simulation takes."""
    found = []
    choose = compilation.rounds_program
    monkeypatch.setattr(compilation, "rounds_program", lambda *a, **k: found.append(choose(*a, **k)) or found[-1])
    built, state = simulation(loss, **options)
    built.run(state, rounds=2)
    [program] = found
    return program


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="Only a CPU's compiler has two ways.")
def test_products_and_small_models_are_compiled_quickly_and_curved_functions_thoroughly(monkeypatch):
    quick = [compilation._program(quickly=True, multi_thread=multi_thread) for multi_thread in (False, True)]
    assert chosen(monkeypatch, wide, batch_size=300) in quick
    assert chosen(monkeypatch, wide, width=4) in quick
    assert chosen(monkeypatch, curved, batch_size=300) not in quick
    # The gates of an LSTM go where the backward loop finds them.
    assert chosen(monkeypatch, recurring, batch_size=300) in quick
    # Two rows are multiplied as soon as the weights are added to.
    assert chosen(monkeypatch, wide, batch_size=2) not in quick
    # Adam takes a root of every weight in every step.
    adam = jaxfed.Optimizer(0.01, modules=["adam"])
    assert chosen(monkeypatch, wide, lrate=adam, batch_size=300) not in quick


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="Only on a CPU are there threads to hand work to.")
def test_only_steps_that_write_much_hand_parts_of_it_to_other_cores(monkeypatch):
    # Weights, their gradient and their update are 160,000 numbers each.
    assert chosen(monkeypatch, wide, width=400) is compilation._program(quickly=False, multi_thread=True)
    assert chosen(monkeypatch, wide) is compilation._program(quickly=False, multi_thread=False)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="Only on a CPU are there threads to hand work to.")
def test_a_large_population_does_not_make_small_steps_hand_work_over():
    count = 100_000
    rows = {"x": np.ones((count, 10), np.float32), "y": np.ones(count, np.float32)}
    data = jaxfed.FederatedData(rows, np.arange(count + 1), np.arange(count))
    built = jaxfed.Simulation(jaxfed.scaffold(linear, lrate=0.1, batch_size=2), data, cohort_size=20, chunk=1)
    arguments, options = built._arguments(built.population, built.init(jnp.zeros(10), key=jax.random.key(0)), 1, 1)
    program = compilation.rounds_program(*arguments, **options)
    # How XLA writes that an operation's result is cut into parts for several threads.
    assert "outer_dimension_partitions" not in program.lower(*arguments, **options).compile().as_text()


def test_both_ways_train_alike(monkeypatch):
    monkeypatch.setattr(compilation, "rounds_program", lambda *a, **k: compilation._program(quickly=True, multi_thread=False))
    built, state = simulation(wide)
    quick, _ = built.run(state, rounds=3)
    monkeypatch.setattr(compilation, "rounds_program", lambda *a, **k: compilation._program(quickly=False, multi_thread=True))
    built, state = simulation(wide)
    thorough, _ = built.run(state, rounds=3)
    # Kernels may add up in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), quick.params, thorough.params)


def test_an_option_that_this_compiler_does_not_know_is_left_out():
    assert compilation._if_known({"xla_cpu_no_such_option": True}) == {}


def test_memory_is_given_back_only_where_the_c_library_can(monkeypatch):
    compilation._give_back_memory()
    monkeypatch.setattr(compilation.ctypes, "CDLL", lambda name: object())
    compilation._give_back_memory()
