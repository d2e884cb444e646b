"""Local leaves against a plain loop; they never travel; choices that cannot be meant are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from personal import personal_loops as loops
from personal.personal_loops import EPOCHS, assert_trees, kept_of, local_training

import jaxfed
from jaxfed import LocalLeaves, Model, trees

HEAD_EPOCHS, HEAD_RATE = 3, 0.2
FEDPER = LocalLeaves(local_training(), "head")
FEDREP = LocalLeaves(
    local_training(), ["h*"], head=local_training(HEAD_RATE, jaxfed.Epochs(4, shuffle=False, epochs=HEAD_EPOCHS))
)


def fedper_round(params, head, rows):
    end = loops.train({**params, "head": head}, rows)
    return {**end, "head": params["head"]}, end["head"]


def fedrep_round(params, head, rows):
    both = loops.train({**params, "head": head}, rows, HEAD_EPOCHS, only=["head"], rate=HEAD_RATE)
    end = loops.train(both, rows, only=["body"])
    return {**end, "head": params["head"]}, end["head"]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize(("client", "by_hand"), [(FEDPER, fedper_round), (FEDREP, fedrep_round)], ids=["fedper", "fedrep"])
def test_rounds_agree_with_a_plain_loop(client, by_hand, lanes):
    expected = loops.federated(by_hand, lambda params: params["head"], loops.start())
    state = loops.simulate(client, lanes)
    assert_trees(state.params, expected.params)
    assert np.flatnonzero(state.seen).tolist() == sorted(expected.kept)
    for i, head in expected.kept.items():
        np.testing.assert_allclose(kept_of(state, i).params["head"], head, rtol=1e-11)


@pytest.mark.parametrize("client", [FEDPER, FEDREP], ids=["fedper", "fedrep"])
def test_local_leaves_never_travel(client):
    upload, _ = loops.run_round(client, loops.start(), 3)
    assert trees.names(upload.delta) == ["body"]


def test_the_server_holds_no_state_of_local_leaves():
    algorithm = jaxfed.fedper(
        loops.MODEL, leaves="head", lrate=0.1, batch_size=4, server_lrate=jaxfed.Optimizer(0.1, modules=["adam"])
    )
    run = jaxfed.Simulation(algorithm, loops.data())
    state = run.init(loops.start(), key=jax.random.key(0))
    after, _ = run.run(state, rounds=2)
    assert not any("head" in name for name in trees.names(after.server))
    np.testing.assert_array_equal(after.params["head"], state.params["head"])
    assert np.abs(after.params["body"] - state.params["body"]).max() > 0.01


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("client", "epochs", "rate"), [(FEDPER, EPOCHS, loops.RATE), (FEDREP, HEAD_EPOCHS, HEAD_RATE)])
def test_a_client_never_seen_trains_its_own_leaves_alone(client, epochs, rate):
    params = loops.start()
    expected = loops.train(params, loops.data().client(3), epochs, only=["head"], rate=rate)
    assert_trees(loops.personal(client, params, 3)[0], expected)


@pytest.mark.usefixtures("x64")
def test_a_client_that_was_seen_predicts_with_what_it_kept():
    params, own = loops.start(), loops.start(seed=2)["head"]
    found, _ = loops.personal(FEDPER, params, 3, params={"body": None, "head": own}, trained=True)
    assert_trees(found, {**params, "head": own}, 0)


def normed_init(key):
    return {"bn": jnp.ones(3), "out": jnp.ones(3)}, {"mean": jnp.array([0.3, 0.0, -0.7])}


def normed_loss(params, stats, batch, key):
    mean = jnp.where(batch["mask"][:, None], batch["x"], 0).sum(0) / jnp.maximum(batch["mask"].sum(), 1)
    values = ((batch["x"] - stats["mean"][None]) * params["bn"][None]) @ params["out"] - batch["y"]
    return values**2, {"mean": 0.5 * stats["mean"] + 0.5 * mean}


def normed_metrics(params, stats, batch):
    return {"loss": normed_loss(params, stats, batch, None)[0]}


NORMED = Model(normed_init, normed_loss, normed_loss, normed_metrics)
FULL = {"lrate": 0.01, "batch_size": None, "steps": 2}


@pytest.mark.usefixtures("x64")
def test_fedbn_keeps_norm_layers_and_statistics_with_the_client():
    run = jaxfed.Simulation(jaxfed.fedbn(NORMED, **FULL), loops.data())
    begin = run.init(key=jax.random.key(0))
    state, _ = run.run(begin, rounds=2)
    np.testing.assert_array_equal(state.params["bn"], begin.params["bn"])
    np.testing.assert_allclose(state.stats["mean"], begin.stats["mean"], atol=1e-15)
    for i in (0, 1, 3, 4, 5):  # four steps towards the mean of the client's rows, half of the way each
        mean = loops.data().client(i)["x"].mean(0) * (1 - 0.5**4) + begin.stats["mean"] * 0.5**4
        np.testing.assert_allclose(kept_of(state, i).stats["mean"], mean, rtol=1e-12)
        assert np.abs(kept_of(state, i).params["bn"] - 1).max() > 1e-3


@pytest.mark.usefixtures("x64")
def test_statistics_are_shared_unless_asked_for():
    leaves = LocalLeaves(jaxfed.LocalTraining(NORMED, 0.01, jaxfed.Steps(None, steps=2)), "bn")
    run = jaxfed.Simulation(jaxfed.Algorithm(leaves, aggregator=jaxfed.Mean("uniform")), loops.data())
    begin = run.init(key=jax.random.key(0))
    state, _ = run.run(begin, rounds=1)
    means = [loops.data().client(i)["x"].mean(0) for i in (0, 1, 3, 4, 5)]
    np.testing.assert_allclose(state.stats["mean"], 0.75 * np.mean(means, 0) + 0.25 * begin.stats["mean"], rtol=1e-12)
    assert state.kept.stats == ()


def additive_loss(params, batch, key):
    return (params["body"] - batch["x"]) ** 2 + params["head"] * batch["slope"]


def test_a_client_whose_own_leaves_are_not_finite_is_left_out():
    arrays = {"x": np.ones(2, np.float32), "slope": np.array([1.0, 3e38], np.float32)}
    algorithm = jaxfed.fedper(additive_loss, leaves="head", lrate=10.0, batch_size=1)
    run = jaxfed.Simulation(algorithm, jaxfed.FederatedData.from_arrays(arrays, [0, 1]))
    state, history = run.run(run.init({"body": jnp.zeros(()), "head": jnp.zeros(())}, key=jax.random.key(0)), rounds=1)
    assert history[0].excluded == [1]
    assert state.seen.tolist() == [True, False]


WRONG = {
    "no such leaf": (
        lambda: LocalLeaves(local_training(), ["head", "tail/*"]),
        ValueError,
        r"'tail/\*' matches no leaf.*'body', 'head'",
    ),
    "no norm layer": (lambda: jaxfed.fedbn(loops.MODEL, **FULL).client, ValueError, "no normalisation layer.*'body', 'head'"),
    "function of none": (lambda: LocalLeaves(local_training(), str.isdigit), ValueError, "chooses none"),
    "all local": (lambda: LocalLeaves(local_training(), "*"), ValueError, "all leaves are local"),
}


@pytest.mark.parametrize(("make", "error", "text"), WRONG.values(), ids=WRONG)
def test_choices_of_leaves_are_refused_when_a_run_begins(make, error, text):
    run = jaxfed.Simulation(jaxfed.Algorithm(make()), loops.data())
    with pytest.raises(error, match=text):
        run.init(loops.start(), key=jax.random.key(0))


SCAFFOLD = jaxfed.Optimizer(0.1, modules=["scaffold-client"])
REFUSED = {
    "scaffold inside": (lambda: LocalLeaves(local_training(SCAFFOLD), "head"), ValueError, "'scaffold'.*never leave the client"),
    "a wrapper inside": (lambda: LocalLeaves(FEDPER, "head"), TypeError, "expected LocalTraining, got LocalLeaves"),
    "a number": (lambda: LocalLeaves(local_training(), 3), TypeError, "expected patterns"),
    "no pattern": (lambda: LocalLeaves(local_training(), []), TypeError, "expected patterns"),
}


@pytest.mark.parametrize(("make", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_bad_parts_are_refused_when_built(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("bn/scale", True),
        ("block_2/bn3/bias", True),
        ("LayerNorm_0/scale", True),
        ("subnet/kernel", False),
        ("dense/bias", False),
    ],
)
def test_norm_layers_are_known_by_name(name, norm):
    assert jaxfed.norm_layers(name) is norm
