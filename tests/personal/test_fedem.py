"""FedEM against a plain loop: posteriors of every example, distinct starts, weights that reach the gradient; and its mixtures."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from personal import personal_loops as loops
from personal.personal_loops import assert_trees, kept_of

import jaxfed
from jaxfed import Broadcast, FedEM, Optimizer, stacked_starts
from jaxfed.models.functions import from_functions
from jaxfed.models.losses import cross_entropy

M = 3
CLIENT = FedEM(loops.MODEL, loops.RATE, loops.ORDERED, models=M)
EQUAL = np.full(M, 1 / M)


def component(params, m):
    return {name: leaf[m] for name, leaf in params.items()}


def posterior(weights, params, x, y):
    """``q`` as ``[M, n]``."""
    odds = np.array([weights[m] * np.exp(-loops.losses(component(params, m), x, y)) for m in range(M)])
    return odds / odds.sum(0)


def fedem_round(params, weights, rows):
    models = [component(params, m) for m in range(M)]
    for x, y in loops.steps(rows):
        q = posterior(weights, params, x, y)
        models = [loops.sgd(models[m], loops.gradient(models[m], x, y, q[m])) for m in range(M)]
    stacked = {name: np.stack([model[name] for model in models]) for name in params}
    return stacked, posterior(weights, params, rows["x"], rows["y"]).mean(1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("lanes", [1, 3])
def test_rounds_agree_with_a_plain_loop(lanes):
    expected = loops.federated(fedem_round, lambda params: EQUAL, loops.start(M))
    state = loops.simulate(CLIENT, lanes, loops.start(M))
    assert_trees(state.params, expected.params)
    for i, weights in expected.kept.items():
        np.testing.assert_allclose(kept_of(state, i).weights, weights, rtol=1e-11)


@pytest.mark.usefixtures("x64")
def test_the_loop_tells_examples_from_batches():
    """One posterior for a whole batch, FederatedScope's reading, ends elsewhere: the comparison above would notice."""
    rows = loops.data().client(3)
    q = posterior(EQUAL, loops.start(M), rows["x"], rows["y"])
    assert np.abs(q - q.mean(1, keepdims=True)).max() > 0.1


@pytest.mark.usefixtures("x64")
def test_one_model_is_fedavg():
    plain, _ = loops.run_round(loops.local_training(), loops.start(), 3)
    ours, kept = loops.run_round(CLIENT.replace(models=1), loops.start(1, seed=1), 3)
    assert_trees(component(ours.delta, 0), plain.delta)
    assert_trees(ours.metrics, plain.metrics)
    assert kept.weights.tolist() == [1.0]


def test_the_models_start_apart():
    params, stats = CLIENT.model.init(jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == {"body": (3, 3, 2), "head": (3, 2, 3)}
    assert stats == {}
    for m in range(M):
        assert np.abs(params["body"][m] - params["body"][m - 1]).max() > 0.1
    assert_trees(params, stacked_starts(loops.MODEL, jax.random.key(0), M)[0], 0)


def test_orthogonal_starts_do_not_wait_for_each_other():
    """In a process of its own, which ends where the decompositions of eight kernels by three models block."""
    program = """
import jax
from jaxfed.models.functions import from_functions
from jaxfed.personal.fedem import stacked_starts

def init(key):
    return [jax.nn.initializers.orthogonal()(jax.random.fold_in(key, i), (64, 64)) for i in range(8)]

model = from_functions(init, lambda w, batch, key: w, lambda w, batch: w)
params, _ = jax.jit(lambda key: stacked_starts(model, key, 3))(jax.random.key(0))
print(abs(params[0][0] @ params[0][0].T - jax.numpy.eye(64)).max() < 1e-5, (params[0][0] != params[0][1]).any())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["True", "True"]


@pytest.mark.usefixtures("x64")
def test_a_mixture_predicts_with_probabilities():
    params, rows, weights = loops.start(M), loops.data().client(3), np.array([0.2, 0.7, 0.1])
    mixed = sum(w * loops.probabilities(component(params, m), rows["x"]) for m, w in enumerate(weights))
    metrics = CLIENT.metrics((jnp.asarray(weights), params, {}), jax.tree.map(jnp.asarray, rows))
    np.testing.assert_allclose(metrics["loss"], -np.log(mixed[np.arange(9), rows["y"]]), rtol=1e-12)
    np.testing.assert_array_equal(metrics["accuracy"], mixed.argmax(1) == rows["y"])


@pytest.mark.usefixtures("x64")
def test_the_global_model_is_the_mixture_of_equal_weights():
    params, batch = loops.start(M), jax.tree.map(jnp.asarray, loops.data().client(3))
    expected = CLIENT.metrics((jnp.asarray(EQUAL), params, {}), batch)
    model = CLIENT.model
    assert_trees(model.metrics(params, {}, batch), expected)
    np.testing.assert_allclose(model.loss(params, {}, batch, None)[0], expected["loss"])
    np.testing.assert_allclose(jnp.exp(model.predict(params, {}, batch)).sum(1), 1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("passes", [0, 1, 3])
def test_a_client_brings_its_weights_up_to_date_before_it_predicts(passes):
    params, rows, expected = loops.start(M), loops.data().client(3), np.array([0.2, 0.7, 0.1])
    found, _, _ = loops.personal(CLIENT.replace(passes=passes), params, 3, weights=expected)
    for _ in range(passes):
        expected = posterior(expected, params, rows["x"], rows["y"]).mean(1)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def linear_init(key):
    return jax.random.normal(key, (2, 2))


def linear_predict(params, batch):
    return batch["x"] @ params


def linear_loss(params, batch, key):
    return cross_entropy(linear_predict(params, batch), batch)


def opposites(seed):
    """Eight clients, 40 rows each, whose label is the sign of ``x_0``; for the odd clients it is the opposite."""
    x = np.random.default_rng(seed).normal(size=(320, 2)).astype(np.float32)
    clients = np.arange(320) % 8
    return jaxfed.FederatedData.from_arrays({"x": x, "y": ((x[:, 0] > 0) ^ (clients % 2 == 1)).astype(int)}, clients)


def test_opposite_clients_find_different_models():
    linear = from_functions(linear_init, linear_loss, linear_predict)
    algorithm = jaxfed.fedem(linear, models=2, lrate=0.5, batch_size=20, server_lrate=Optimizer(0.1, modules=["adam"]))
    run = jaxfed.Simulation(algorithm, opposites(0))
    state, _ = run.run(run.init(key=jax.random.key(0)), rounds=40)
    weights = np.asarray(state.kept.weights)
    assert (weights[::2].argmax(1) == weights[0].argmax()).all()
    assert (weights[1::2].argmax(1) != weights[0].argmax()).all()
    assert weights.max(1).min() > 0.8
    assert run.evaluate(state, opposites(1)).metrics["accuracy"] < 0.65
    assert run.evaluate_personal(state, opposites(1)).metrics["accuracy"] > 0.95
    new = run.evaluate_personal(state, opposites(3), train=opposites(2)).by_client["accuracy"]
    assert new.shape == (8,)
    assert new.min() > 0.9


SCAFFOLD = Optimizer(0.1, modules=["scaffold-client"])
REFUSED = {
    "a plain loss": (lambda: FedEM(linear_loss, 0.1, loops.ORDERED), TypeError, "expected Model.*from_functions"),
    "scaffold": (lambda: FedEM(loops.MODEL, SCAFFOLD, loops.ORDERED), ValueError, "made for one model"),
    "no model": (lambda: FedEM(loops.MODEL, 0.1, loops.ORDERED, models=0), ValueError, "at least 1"),
}


@pytest.mark.parametrize(("make", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_bad_parts_are_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_weights_of_one_model_are_refused():
    with pytest.raises(ValueError, match=r"leaf body: expected a leading axis of 3 models, got \(4, 2\)"):
        CLIENT.init_kept(Broadcast({"body": jnp.zeros((4, 2)), "head": jnp.zeros((3, 2, 3))}, {}, {}, 0), jax.random.key(0))


@pytest.mark.parametrize("labels", [None, np.zeros(9, np.float32), np.zeros((9, 1), int)])
def test_other_labels_are_refused(labels):
    batch = {"x": jnp.zeros((9, 3))} | ({} if labels is None else {"y": jnp.asarray(labels)})
    with pytest.raises(TypeError, match="expected integer labels"):
        CLIENT.metrics((jnp.asarray(EQUAL), loops.start(M), {}), batch)
