"""Parity with declearn 2.9.1 in float64 and float32: step by step, jitted, vmapped and scanned."""

import itertools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed import part

pytestmark = golden.needs_golden
MODES = ("eager", "jit", "vmap", "scan")
DTYPES = ("float64", "float32")


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def row(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def run_loop(module, gradients, weights, step):
    state, outputs = module.init(weights[0]), []
    for g, w in zip(gradients, weights):
        output, state = step(module, g, state, w)
        outputs.append(output)
    return outputs


def run_scan(module, gradients, weights):
    """From stacked trees to stacked outputs."""

    def body(state, now):
        output, state = module.update(now[0], state, now[1])
        return state, output

    state = jax.tree.map(jnp.asarray, module.init(row(weights, 0)))
    return jax.lax.scan(body, state, (gradients, weights))[1]


def run_vmap(module, gradients, weights):
    """Two lanes, of which the first runs on other data."""
    lanes = [jax.tree.map(lambda x: jnp.stack([x + 1, x]), tree) for tree in (gradients, weights)]
    return row(jax.vmap(run_scan, in_axes=(None, 0, 0))(module, *lanes), 1)


def update(module, g, state, w):
    return module.update(g, state, w)


def run(mode, module, gradients, weights):
    if mode in ("eager", "jit"):
        return run_loop(module, gradients, weights, jax.jit(update) if mode == "jit" else update)
    outputs = jax.jit(run_vmap if mode == "vmap" else run_scan)(module, stack(gradients), stack(weights))
    return [row(outputs, i) for i in range(len(gradients))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("record", golden.params("modules"))
def test_module(record, mode, dtype):
    with jax.enable_x64(dtype == "float64"):
        module = part.build("module", (record["name"], record["config"]))
        outputs = run(mode, module, golden.sequence("grads", dtype), golden.sequence("weights", dtype))
        for output, expected in zip(outputs, record["outputs"], strict=True):
            golden.assert_close(output, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("record", golden.params("regularizers"))
def test_regularizer(record, mode, dtype):
    """A new round begins at the recorded steps, and with it a new anchor."""
    with jax.enable_x64(dtype == "float64"):
        regularizer = part.build("regularizer", (record["name"], {"alpha": record["alpha"]}))
        gradients, weights = golden.sequence("grads", dtype), golden.sequence("weights", dtype)
        starts = [*record["on_round_start_before_steps"], len(gradients)]
        rounds = (run(mode, regularizer, gradients[a:b], weights[a:b]) for a, b in itertools.pairwise(starts))
        for output, expected in zip(itertools.chain(*rounds), record["outputs"], strict=True):
            golden.assert_close(output, expected, dtype)


def values_at(mode, schedule, steps, rounds):
    """The rates at pairs of counts."""
    if mode == "vmap":
        return jax.vmap(schedule)(steps, rounds)
    if mode == "scan":
        return jax.lax.scan(lambda carry, now: (carry, schedule(*now)), 0, (steps, rounds))[1]
    call = jax.jit(lambda schedule, step, round: schedule(step, round)) if mode == "jit" else lambda s, *now: s(*now)
    return [call(schedule, step, round) for step, round in zip(steps, rounds)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("record", golden.params("schedulers"))
def test_schedule(record, mode, dtype):
    """Six rounds of four steps, which count on over rounds."""
    with jax.enable_x64(dtype == "float64"):
        schedule = part.build("schedule", (record["name"], record["config"]))
        expected = np.array(record["rounds_x_4steps"])
        rounds, columns = np.indices(expected.shape, np.int32)
        got = values_at(mode, schedule, (4 * rounds + columns).ravel(), rounds.ravel())
        tolerance = golden.TOLERANCES[dtype]
        np.testing.assert_allclose(np.array(got), expected.ravel(), rtol=tolerance, atol=tolerance * expected.max() / 10)
