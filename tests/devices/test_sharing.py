"""What lies on which device, and how devices talk: from the compiled program and from the arrays that it leaves."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfed
from jaxfed import FederatedData, Median, Simulation
from jaxfed.engine import mesh
from jaxfed.engine.round import run_round

WIDTH, SMALL = 4096, 5
CLIENTS = 4


@pytest.fixture(autouse=True)
def _split_large_leaves(monkeypatch):
    monkeypatch.setattr(mesh, "_SMALLEST_SPLIT", WIDTH)


def line(params, batch, key):
    return jnp.square(batch["x"] @ params["large"][:, 0] + params["small"].sum() - batch["y"])


PARAMS = {"large": jnp.zeros((WIDTH, 3)), "small": jnp.zeros(SMALL)}
MODEL_BYTES = 4 * (3 * WIDTH + SMALL)


def compiled(algorithm, devices):
    """One round as a program, and its arguments."""
    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(2 * CLIENTS, WIDTH)) / WIDTH, "y": rng.normal(size=2 * CLIENTS)}
    data = FederatedData.from_arrays({k: x.astype(np.float32) for k, x in arrays.items()}, np.arange(2 * CLIENTS) % CLIENTS)
    simulation = Simulation(algorithm, data, devices=devices, lanes=1)
    program = jax.jit(lambda state, population: run_round(algorithm, simulation.selector, population, state, 1))
    args = (simulation.init(PARAMS, key=jax.random.key(0)), simulation.population)
    return program.lower(*args).compile(), args


def results(text, operation):
    """The shapes that a collective of the program gives."""
    found = re.findall(rf"= (.*) {operation}(?:-start)?\(", text)
    return {tuple(map(int, dims.split(","))) for one in found for dims in re.findall(r"\[([\d,]+)\]", one)}


def large(tree):
    return [x for x in jax.tree.leaves(tree) if x.shape == (WIDTH, 3)]


@pytest.mark.parametrize("devices", [4, pytest.param(2, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)])
def test_the_servers_state_lies_in_parts(devices):
    part = (WIDTH // devices, 3)
    program, args = compiled(jaxfed.fedadam(line, lrate=0.1, batch_size=None), devices)
    after, _ = program(*args)
    for state in (args[0], after):
        moments = large(state.server)
        assert len(moments) == 2
        assert {shard.data.shape for moment in moments for shard in moment.addressable_shards} == {part}
        assert state.params["large"].is_fully_replicated
    layouts = jax.tree.leaves(program.output_shardings[0].server)
    assert sorted(x.shard_shape((WIDTH, 3)) for x in layouts if not x.is_fully_replicated) == [part, part]
    # What comes out on each device: the weights, its part of both moments, and a few numbers.
    assert program.memory_analysis().output_size_in_bytes == pytest.approx(MODEL_BYTES * (1 + 2 / devices), rel=0.02)


def test_the_devices_share_the_servers_step():
    text = compiled(jaxfed.fedadam(line, lrate=0.1, batch_size=None), 4)[0].as_text()
    assert results(text, "reduce-scatter") == {(WIDTH // 4, 3)}
    assert results(text, "all-gather") == {(WIDTH, 3)}
    assert all(size == (SMALL,) or np.prod(size) <= CLIENTS for size in results(text, "all-reduce"))


def test_stacked_uploads_lie_in_parts():
    """Each device gets a part of the coordinates of all C clients, and none has C models."""
    text = compiled(jaxfed.fedavg(line, lrate=0.1, batch_size=None).replace(aggregator=Median()), 2)[0].as_text()
    parts = results(text, "all-to-all")
    assert parts
    assert {CLIENTS // 2 * WIDTH * 3 // 2} == {int(np.prod(size)) for size in parts}
    assert f"f32[{CLIENTS},{WIDTH},3]" not in text
    assert f"f32[{CLIENTS},{WIDTH // 2},3]" in text
    assert results(text, "all-gather") <= {(WIDTH, 3), (2, CLIENTS // 2, 1)}
