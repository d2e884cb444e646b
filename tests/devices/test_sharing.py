"""What lies on which device, and how devices talk: from the compiled program and from the arrays that it leaves."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices.runs import simulate

import jaxfed
from jaxfed import (
    Bulyan,
    CentredClipping,
    FederatedData,
    GeometricMedian,
    Krum,
    Median,
    Simulation,
    TrimmedMean,
)
from jaxfed.base import CohortInfo, Upload
from jaxfed.engine import mesh
from jaxfed.engine.mesh import choose_devices
from jaxfed.engine.round import run_round, state_layout

WIDTH = 4096
INFO = CohortInfo(0, 11, 11.0, 10.0, 10.0)
RULES = {
    "median": Median(),
    "trimmed mean": TrimmedMean(0.2),
    "krum": Krum(2),
    "multi-krum": Krum(2, 3),
    "bulyan": Bulyan(1),
    "geometric median": GeometricMedian(0.5, 4),
    "centred clipping": CentredClipping(1.5, 3),
}


@pytest.fixture(autouse=True)
def _split_large_leaves(monkeypatch):
    monkeypatch.setattr(mesh, "_SMALLEST_SPLIT", WIDTH)


def line(params, batch, key):
    """One large leaf, that every number of devices up to 8 but 5 and 7 can share, and a small one."""
    return jnp.square(batch["x"] @ params["large"][:, 0] + params["small"] - batch["y"])


PARAMS = {"large": jnp.zeros((WIDTH, 3)), "small": jnp.zeros(())}


def federation(clients=8):
    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(3 * clients, WIDTH)) / WIDTH, "y": rng.normal(size=3 * clients)}
    return FederatedData.from_arrays({k: x.astype(np.float32) for k, x in arrays.items()}, np.arange(3 * clients) % clients)


def compiled(algorithm, devices, lanes=1):
    """One round as a program, with the state and what it leaves."""
    simulation = Simulation(algorithm, federation(), 4, devices=devices, lanes=lanes)
    state = simulation.init(PARAMS, key=jax.random.key(0))
    program = jax.jit(lambda state, population: run_round(algorithm, simulation.selector, population, state, lanes))
    population = simulation.population
    return program.lower(state, population).compile(), state, population


def shapes(array):
    return {shard.data.shape for shard in array.addressable_shards}


@pytest.mark.parametrize("devices", [4, pytest.param(2, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)])
def test_the_servers_state_lies_in_parts(devices):
    algorithm = jaxfed.fedadam(line, lrate=0.1, batch_size=None)
    program, state, population = compiled(algorithm, devices)
    after, _ = program(state, population)
    for one in (state, after):
        large = [x for x in jax.tree.leaves(one.server) if x.shape == (WIDTH, 3)]
        assert len(large) == 2  # both moments
        for moment in large:
            assert shapes(moment) == {(WIDTH // devices, 3)}
        assert shapes(one.params["large"]) == {(WIDTH, 3)}
    layouts, _ = program.output_shardings
    assert {str(s.spec) for s, x in zip(jax.tree.leaves(layouts.server), jax.tree.leaves(after.server)) if x.ndim == 2} == {
        str(mesh.PartitionSpec(mesh.AXES, None))
    } or all(s.shard_shape((WIDTH, 3)) == (WIDTH // devices, 3) for s in jax.tree.leaves(layouts.server) if not s.is_fully_replicated)
    text = program.as_text()
    assert results(text, "reduce-scatter") == {(WIDTH // devices, 3)}
    assert (WIDTH, 3) in results(text, "all-gather")
    assert (WIDTH, 3) not in results(text, "all-reduce")


def results(text, operation):
    """The shapes that a collective of the program gives."""
    found = re.findall(rf"= (\S+) {operation}(?:-start)?\(", text)
    return {tuple(map(int, dims.split(","))) for one in found for dims in re.findall(r"\[([\d,]+)\]", one)}


def test_x():
    pass
