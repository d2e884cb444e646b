"""Rules that see all uploads together: on several devices they see what they see on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices.runs import LOCAL, assert_equal, broken, outcome, simulate
from engine.oracle import softmax_data, softmax_loss
from jax.sharding import PartitionSpec

import jaxfed
from jaxfed import Bulyan, CentredClipping, GeometricMedian, Krum, Median, TrimmedMean
from jaxfed.engine.cohort import deal
from jaxfed.engine.mesh import AXES, EVERYWHERE, choose_devices
from jaxfed.messages import CohortInfo, Upload

pytestmark = pytest.mark.usefixtures("x64")
RULES = {
    "median": Median(),
    "trimmed mean": TrimmedMean(0.2),
    "krum": Krum(2),
    "multi-krum": Krum(2, 3, by="examples"),
    "bulyan": Bulyan(1),
    "geometric median": GeometricMedian(0.5, 4),
    "centred clipping": CentredClipping(1.5, 3),
}
QUICK = ("median", "multi-krum")
CLIENTS, LANES = 11, 2


def uploads():
    """Rows of leaves that 2, 3 or 6 devices can share, and of some that they cannot; one client is far off."""
    rng = np.random.default_rng(0)
    delta = {"a": rng.normal(size=(CLIENTS, 6, 5)), "b": rng.normal(size=(CLIENTS, 2, 3)), "c": rng.normal(size=(CLIENTS, 7))}
    delta["a"][4] = 1e6
    stats = {"mean": rng.normal(size=(CLIENTS, 12)), "flag": rng.normal(size=CLIENTS) > 0}
    return jax.tree.map(jnp.asarray, Upload(delta, stats, {}, {"examples": rng.integers(1, 9, CLIENTS).astype(float)}))


def exchanged(devices, rows, weights):
    """Each client's rows from the device that visited it, brought together."""
    deck, _ = deal(rows.metrics["examples"], CLIENTS, devices.count, LANES)
    held = jax.tree.map(lambda x: x[jnp.minimum(deck, CLIENTS - 1)], (rows, weights))
    by_device = jax.tree.map(lambda _: PartitionSpec(AXES), held)

    def one(held, places):
        held, places = jax.tree.map(lambda x: x[0], (held, places))
        return devices.exchange(held[0], places, CLIENTS), devices.spread(held[1], places, CLIENTS)

    return devices.run(one, (held, deck), (by_device, PartitionSpec(AXES)), (devices.split_rows(without_rows(rows)), EVERYWHERE))


def without_rows(tree):
    return jax.tree.map(lambda x: x[0], tree)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_rows_are_brought_together_in_the_order_of_the_cohort(count):
    devices, weights = choose_devices(count, CLIENTS), jnp.arange(CLIENTS) > 2
    found = jax.jit(lambda rows: exchanged(devices, rows, weights))(uploads())
    jax.tree.map(np.testing.assert_array_equal, found, (uploads(), weights))
    jax.tree.map(lambda x, y: x.dtype == y.dtype or pytest.fail(f"{x.dtype}"), found, (uploads(), weights))
    assert {shard.data.shape for shard in found[0].delta["a"].addressable_shards} == {(CLIENTS, 6 // count, 5)}
    assert {shard.data.shape for shard in found[0].delta["c"].addressable_shards} == {(CLIENTS, 7)}


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RULES])
@pytest.mark.parametrize("count", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_rules_on_parts_equal_rules_on_the_whole(name, count):
    devices, rule = choose_devices(count, CLIENTS), RULES[name]
    weights = jnp.where(jnp.arange(CLIENTS) == 7, 0.0, uploads().metrics["examples"])
    info = CohortInfo(0, CLIENTS, 50.0, CLIENTS - 1, weights.sum())

    def combine(rows, weights):
        rows = rows._replace(metrics={}, stats={"mean": rows.stats["mean"]})
        return rule.combine(rows, weights, rule.init(without_rows(rows.delta)), info)

    def on_devices(rows, weights):
        found, spread = exchanged(devices, rows, weights)
        return combine(found, spread)

    whole, parts = jax.jit(combine)(uploads(), weights), jax.jit(on_devices)(uploads(), weights)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12), parts, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("devices", [2, 3])
def test_rounds_on_several_devices(name, devices):
    """Of 9 clients one holds no rows and one overflows: 7 uploads count."""
    algorithm = jaxfed.fedavg(softmax_loss, **LOCAL).replace(aggregator=RULES[name])
    data = broken(softmax_data(), 4)
    ours, theirs = (outcome(*simulate(algorithm, d, cohort_size=None, data=data)) for d in (devices, 1))
    assert_equal(ours[:-2], theirs[:-2])
