"""Every setting of a sweep against a run of its own."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine.oracle import softmax_data, softmax_loss, softmax_params

import jaxfed
from jaxfed import side_by_side

sweeping = sys.modules["jaxfed.sweep"]
PARAMS = softmax_params(np.float32)
DATA = softmax_data(dtype=np.float32)


def scaffold(lrate=0.1, epochs=1, **_):
    return jaxfed.scaffold(softmax_loss, lrate=lrate, batch_size=4, epochs=epochs, weights="steps")


def simulation_of(algorithm, **options):
    return jaxfed.Simulation(algorithm, DATA, chunk=2, **({"cohort_size": 4} | options))


def same(outcome, simulation, seed, **options):
    """The outcome is that of the simulation's own run: cohorts exactly, numbers to a few units in the last place."""
    state, history = simulation.run(simulation.init(PARAMS, key=jax.random.key(seed)), **options)
    for ours, theirs in zip(jax.tree.leaves(outcome.params), jax.tree.leaves(state.params)):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)
    assert len(outcome.history) == len(history)
    for ours, theirs in zip(outcome.history, history):
        np.testing.assert_array_equal(ours.clients, theirs.clients)
        np.testing.assert_array_equal(ours.counted, theirs.counted)
        np.testing.assert_array_equal(ours.metrics["steps"], theirs.metrics["steps"])
        ours, theirs = ours.row(), theirs.row()
        assert ours.pop("excluded") == theirs.pop("excluded")
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_settings_are_runs_of_their_own():
    """Rates, epochs and seeds, in one program; the population's weight depends on the epochs."""
    over = {"seed": [5, 7], "client.lrate": [0.05, 0.2], "batches.epochs": [1, 3]}
    options = {"rounds": 3, "eval_every": 2}
    found = jaxfed.sweep(simulation_of(scaffold()), over, params=PARAMS, **options)
    assert found.settings[5] == {"seed": 7, "client.lrate": 0.05, "batches.epochs": 3}
    for setting, outcome in zip(found.settings, found.outcomes):
        own = simulation_of(scaffold(setting["client.lrate"], setting["batches.epochs"]))
        same(outcome, own, setting["seed"], **options)
    rows = found.rows()
    assert [row["setting"] for row in rows] == list(range(8))
    assert rows[3]["eval_loss"] == found.outcomes[3].history["eval_loss"][-1]
    assert len(found.history()) == 8 * 3


def test_what_a_state_begins_with_and_who_is_late_can_vary():
    """Adam's memory begins at a number of its own, and a selector has numbers too; the two go side by side."""

    def make(init_v, share):
        server = jaxfed.Optimizer(0.1, modules=[("adam", {"init_v": init_v})])
        algorithm = jaxfed.fedavg(softmax_loss, lrate=0.1, batch_size=4, server_lrate=server)
        selector = jaxfed.Stragglers(jaxfed.Uniform(4), share, epochs=3)
        return simulation_of(algorithm, cohort_size=None, selector=selector)

    rows = [(0.01, 0.25), (0.5, 0.75), (1.0, 0.5)]
    found = jaxfed.sweep(make(0.1, 0.1), {("adam.init_v", "selector.share"): rows}, rounds=2, params=PARAMS, seed=3)
    for row, outcome in zip(rows, found.outcomes):
        same(outcome, make(*row), 3, rounds=2)


def test_personal_models_are_evaluated_as_such():
    def make(rate):
        return simulation_of(jaxfed.ditto(softmax_loss, strength=rate, lrate=0.1, batch_size=4))

    found = jaxfed.sweep(make(0.1), {"client.strength": [0.2, 1.0]}, rounds=2, eval_every=2, params=PARAMS)
    for setting, outcome in zip(found.settings, found.outcomes):
        same(outcome, make(setting["client.strength"]), 0, rounds=2, eval_every=2)


def parabola(w, batch, key):
    return (w - batch["x"]) ** 2 / 2


def small():
    data = jaxfed.FederatedData.from_arrays({"x": np.array([1.0, 3.0], np.float32)}, [0, 1])
    return jaxfed.Simulation(jaxfed.fedavg(parabola, lrate=0.5, batch_size=1), data)


def closed_form(rate, rounds):
    """Both clients take one step: w -> w + rate (2 - w)."""
    return 2 - 2 * (1 - rate) ** rounds


RATES = [0.1, 0.2, 0.3, 0.4, 0.5]


@pytest.mark.parametrize("at_once", [2, 1])
def test_chunks_of_settings(at_once):
    found = jaxfed.sweep(small(), {"client.lrate": RATES}, rounds=4, params=jnp.zeros(()), at_once=at_once)
    np.testing.assert_allclose([o.params for o in found.outcomes], [closed_form(r, 4) for r in RATES], rtol=1e-6)
    # Columns: what varies, then the last round.
    assert str(found).split()[:3] == ["client.lrate", "round", "loss"]
    assert str(found).splitlines()[1].split()[:2] == ["0.1", "4"]


def test_short_memory_halves_the_settings(monkeypatch):
    sizes, real = [], side_by_side.Block.bytes_needed

    def bytes_needed(block):
        assert real(block) >= block.grid[0][-1] * 4  # a weight each
        sizes.append(len(block.grid[0]))
        return 10 * len(block.grid[0])

    monkeypatch.setattr(side_by_side.Block, "bytes_needed", bytes_needed)
    monkeypatch.setattr(sweeping, "bytes_available", lambda: 30)
    with pytest.warns(UserWarning, match="at most 2 at once"):
        found = jaxfed.sweep(small(), {"client.lrate": RATES[:4]}, rounds=4, params=jnp.zeros(()))
    np.testing.assert_allclose([o.params for o in found.outcomes], [closed_form(r, 4) for r in RATES[:4]], rtol=1e-6)
    assert sizes == [4, 2, 2]


def test_an_error_of_the_device_halves_the_settings(monkeypatch):
    real = side_by_side.Block.advance

    def advance(block, rounds):
        if len(block.grid[0]) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return real(block, rounds)

    monkeypatch.setattr(side_by_side.Block, "advance", advance)
    with pytest.warns(UserWarning, match="at most 2 at once"):
        found = jaxfed.sweep(small(), {"client.lrate": RATES[:4]}, rounds=2, params=jnp.zeros(()))
    np.testing.assert_allclose([o.params for o in found.outcomes], [closed_form(r, 2) for r in RATES[:4]], rtol=1e-6)


@pytest.mark.parametrize(
    ("over", "error", "text"),
    [
        ({"lrate": [1]}, ValueError, "'lrate' may mean 'client.optimizer.lrate', 'server.lrate'. Say which."),
        ({"client.lrte": [1]}, ValueError, "no hyper-parameter is called 'client.lrte'. Did you mean 'client.optimizer.lrate'?"),
        ({"batch_size": [1]}, ValueError, "client.batches.batch_size is a name, a switch or a size"),
        ({"client.lrate": [0.1, -1]}, ValueError, "over: client.lrate: Optimizer.lrate: expected a finite number at least 0"),
        ({"client.lrate": ["cosine"]}, TypeError, "over: client.lrate: expected numbers, got 'cosine'"),
        ({"client.lrate": [[0.1]]}, TypeError, "over: client.lrate: expected numbers, got [0.1]"),
        ({"epochs": [1.5]}, TypeError, "over: epochs: Epochs.epochs: expected an integer, got 1.5."),
        ({"seed": [-1]}, ValueError, "over: seed: expected an integer at least 0"),
        ({"seed": []}, ValueError, "over: seed: expected at least one value"),
        ({"seed": 3}, TypeError, "over: seed: expected a list of values, got 3"),
        ({}, ValueError, "over: expected names"),
        ({"seed": [1], ("seed", "epochs"): [(1, 1)]}, ValueError, "over: expected names that differ"),
        ({"client.lrate": [1], "client.lr": [1]}, ValueError, "are both client.optimizer.lrate. Name it once."),
        ({("seed", "epochs"): [(1, 1, 1)]}, ValueError, "expected 2 values side by side"),
    ],
)
def test_wrong_settings(over, error, text):
    with pytest.raises(error) as found:
        jaxfed.sweep(small(), over, rounds=1, params=jnp.zeros(()))
    assert text in str(found.value)


def test_numbers_of_sweep_are_checked():
    for options in ({"rounds": 0}, {"rounds": 1, "at_once": 0}, {"rounds": 1, "eval_every": -1}):
        with pytest.raises(ValueError, match="expected an integer"):
            jaxfed.sweep(small(), {"seed": [1]}, params=jnp.zeros(()), **options)


def test_schedules_and_parts_in_lists_have_names():
    client = jaxfed.Optimizer(("exponential-decay", {"base": 0.1, "rate": 0.9}), modules=["momentum", "momentum"])
    tree = jaxfed.fedavg(parabola, lrate=client, batch_size=1)
    names = [field.name for field in jaxfed.hyperparameters.fields_of(tree) if field.number]
    assert names[:4] == [
        "client.optimizer.lrate.base",
        "client.optimizer.lrate.rate",
        "client.optimizer.w_decay",
        "client.optimizer.modules.momentum.beta",
    ]
    assert jaxfed.hyperparameters.find(tree, "modules.1.beta").keys[-2].idx == 1
    with pytest.raises(ValueError, match="may mean"):
        jaxfed.hyperparameters.find(tree, "momentum.beta")


def test_a_setting_that_diverges_makes_no_warning():
    rows = [{"setting": seed, "seed": seed, "loss": np.inf} for seed in (0, 1)]
    (found,) = sweeping.summary(rows, ["seed"])
    assert found["loss"] == np.inf
    assert np.isnan(found["loss_std"])
