"""Robust aggregators in whole rounds: clients left out, state, statistics, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from server.papers import RULES, clipped_about, krum_order, norm_bounded

import jaxfed
from jaxfed import CentredClipping, Krum, Median, NormBound


def parabola(params, batch, key):
    return jnp.square(batch["x"] @ params - batch["y"])


def federation(seed=15, clients=8, rows=3):
    """The last client's gradients overflow, so that it never counts."""
    rng = np.random.default_rng(seed)
    x, owners = rng.normal(size=(clients * rows, 2)).astype(np.float32), np.repeat(np.arange(clients), rows)
    arrays = {"x": x, "y": rng.normal(size=len(x)).astype(np.float32)}
    for array in arrays.values():
        array[owners == clients - 1] = 1e30
    return jaxfed.FederatedData.from_arrays(arrays, owners)


def rounds_by_hand(data, paper, rounds=3, lrate=0.1):
    """Gradient descent of all clients but the last, one full step each, put together by the paper's rule."""
    weights, clients = np.zeros(2), [data.client(i) for i in range(data.num_clients - 1)]
    for _ in range(rounds):
        steps = [lrate * np.mean(2 * (c["x"] @ weights - c["y"])[:, None] * c["x"], axis=0) for c in clients]
        weights = weights - paper(np.array(steps, float), np.full(len(steps), 3.0))
    return weights


class RoundsOfClipping:
    """Centred clipping with the aggregate of the round before."""

    def __init__(self):
        self.v = np.zeros(2)

    def __call__(self, x, w):
        self.v = clipped_about(x, w, 0.1, 2, self.v)
        return self.v


ROUNDS = RULES | {
    "centred clipping": (CentredClipping(0.1, 2), RoundsOfClipping()),
    "norm bound": (NormBound(0.1), lambda x, w: norm_bounded(x, w, 0.1)),
}
QUICK = ("median", "krum", "centred clipping")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in ROUNDS])
def test_rounds_equal_a_loop_for_any_lanes(name):
    rule, paper = ROUNDS[name]
    data, algorithm = federation(), jaxfed.fedavg(parabola, lrate=0.1, batch_size=None).replace(aggregator=rule)
    ends = []
    for lanes in (1, 3):
        simulation = jaxfed.Simulation(algorithm, data, lanes=lanes)
        state, history = simulation.run(simulation.init(jnp.zeros(2), key=jax.random.key(0)), rounds=3)
        ends.append(state.params)
        assert history[-1].excluded == [7]
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-6)
    np.testing.assert_allclose(ends[0], rounds_by_hand(data, paper), rtol=2e-5, atol=1e-6)


def scaffold_by_hand(data, choose, rounds=3, lrate=0.1):
    """SCAFFOLD with one full step: the rule puts together updates, and changes of the control variates likewise."""
    weights, control, clients = np.zeros(2), np.zeros(2), [data.client(i) for i in range(data.num_clients - 1)]
    own = np.zeros((len(clients), 2))
    for _ in range(rounds):
        slopes = np.array([np.mean(2 * (c["x"] @ weights - c["y"])[:, None] * c["x"], axis=0) for c in clients], float)
        update, change = choose(lrate * (slopes - own + control), slopes - own)
        weights, control, own = weights - update, control + change * len(clients) / data.num_clients, slopes
    return weights, control


def krum_of_both(updates, changes):
    best = krum_order(updates, 1)[0]
    return updates[best], changes[best]


CONTROLS = {"median": (Median(), lambda *both: [np.median(x, axis=0) for x in both]), "krum": (Krum(1), krum_of_both)}


@pytest.mark.parametrize("name", CONTROLS)
def test_control_variates_follow_the_rule_of_the_updates(name):
    rule, choose = CONTROLS[name]
    data, algorithm = federation(), jaxfed.scaffold(parabola, lrate=0.1, batch_size=None).replace(aggregator=rule)
    simulation = jaxfed.Simulation(algorithm, data, lanes=3)
    state, _ = simulation.run(simulation.init(jnp.zeros(2), key=jax.random.key(0)), rounds=3)
    weights, control = scaffold_by_hand(data, choose)
    np.testing.assert_allclose(state.params, weights, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(state.server.modules[0].control, control, rtol=2e-5, atol=1e-5)


def counting_loss(params, stats, batch, key):
    """Statistics become the client's first value in bfloat16, and an integer that stays the server's."""
    return jnp.square(batch["y"] - params), {"seen": batch["y"][0].astype(jnp.bfloat16), "version": stats["version"] + 1}


@pytest.mark.parametrize("rule", [Median(), Krum(1)], ids=["coordinates", "weights"])
def test_statistics_keep_their_types(rule):
    model = jaxfed.Model(init=print, loss=counting_loss, predict=print, metrics=print)
    y = np.array([1.0, 2.0, 2.5, 3.0, 1e4], np.float32)
    data = jaxfed.FederatedData.from_arrays({"y": y}, np.arange(5))
    simulation = jaxfed.Simulation(jaxfed.fedavg(model, lrate=0.1, batch_size=1).replace(aggregator=rule), data)
    stats = {"seen": jnp.zeros((), jnp.bfloat16), "version": jnp.array(7)}
    state, _ = simulation.run(simulation.init(jnp.zeros(()), stats=stats, key=jax.random.key(0)), rounds=1)
    assert state.stats == {"seen": 2.5, "version": 7}
    assert state.stats["seen"].dtype == jnp.bfloat16


class Half(jaxfed.OptiModule, register=False):
    """Either half of a pair that exchanges a sum over clients."""

    aux_name = "total"

    def update(self, updates, state, params=None):
        return updates, state


def test_sums_over_clients_are_refused():
    half = jaxfed.Optimizer(0.1, modules=[Half()])
    algorithm = jaxfed.fedavg(parabola, lrate=half, server_lrate=half, batch_size=None)
    with pytest.raises(ValueError, match=r"'median'.*'total' is a sum"):
        algorithm.replace(aggregator=Median())
    assert algorithm.replace(aggregator=NormBound(1.0)).aggregator.max_norm == 1
