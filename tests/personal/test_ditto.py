"""Ditto against a plain loop, its fixed points, and its two ends: local training and the global model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from personal import personal_loops as loops
from personal.personal_loops import assert_trees, kept_of, local_training

import jaxfed
from jaxfed import Broadcast, Ditto, LocalLeaves, Optimizer

STRENGTH, PERSONAL_RATE = 0.4, 0.2
pytestmark = pytest.mark.usefixtures("x64")


def ditto_round(params, own, rows):
    for x, y in loops.steps(rows):
        pull = loops.tree(lambda g, v, w: g + STRENGTH * (v - w), loops.gradient(own, x, y), own, params)
        own = loops.sgd(own, pull, PERSONAL_RATE)
    return loops.train(params, rows), own


@pytest.mark.parametrize("lanes", [1, 3])
def test_rounds_agree_with_a_plain_loop(lanes):
    expected = loops.federated(ditto_round, lambda params: params, loops.start())
    state = loops.simulate(Ditto(local_training(), PERSONAL_RATE, STRENGTH), lanes)
    assert_trees(state.params, expected.params)
    for i, own in expected.kept.items():
        assert_trees(kept_of(state, i).params, own)


def parabolas(strength, rounds=300, **options):
    algorithm = jaxfed.ditto(loops.parabola, strength=strength, batch_size=None, steps=1, lrate=0.05, **options)
    run = jaxfed.Simulation(algorithm, loops.curvatures(), chunk=50)
    return run.run(run.init(jnp.zeros(()), key=jax.random.key(0)), rounds=rounds)[0]


def test_personal_models_end_between_their_own_optimum_and_the_common_one():
    state = parabolas(strength=2.0)
    assert float(state.params) == pytest.approx(0.909090909091, abs=1e-11)
    np.testing.assert_allclose(state.kept.params, [0.606060606061, 0.984848484848], atol=1e-11)


def test_strength_0_is_local_training():
    run = jaxfed.Simulation(jaxfed.Algorithm(Ditto(local_training(), strength=0.0)), loops.data())
    state, _ = run.run(run.init(loops.start(), key=jax.random.key(0)), rounds=2)
    for i in (0, 1, 3, 4, 5):
        assert_trees(kept_of(state, i).params, loops.train(loops.start(), loops.data().client(i), 2 * loops.EPOCHS))


def test_a_great_strength_is_the_global_model():
    state = parabolas(strength=1e6, personal_lrate=1e-6, rounds=200)
    np.testing.assert_allclose(state.kept.params, float(state.params), atol=1e-4)


def test_the_upload_is_that_of_local_training():
    client = local_training(batches=loops.SHUFFLED)
    (plain, _), (ours, _) = (loops.run_round(c, loops.start(), 3) for c in (client, Ditto(client)))
    assert_trees(ours.delta, plain.delta, 1e-15)
    assert_trees(ours.metrics, plain.metrics, 1e-15)


def test_a_client_never_seen_trains_its_model_before_it_predicts():
    params = loops.start()
    found, _ = loops.personal(Ditto(local_training(), PERSONAL_RATE, STRENGTH), params, 3)
    assert_trees(found, ditto_round(params, params, loops.data().client(3))[1])


def test_a_client_that_was_seen_predicts_with_the_model_it_kept():
    own = loops.start(seed=2)
    found, _ = loops.personal(Ditto(local_training(), PERSONAL_RATE, STRENGTH), loops.start(), 4, params=own, trained=True)
    assert_trees(found, own, 0)


def test_over_local_leaves_the_anchor_is_what_the_client_sees():
    """With one step and rate 1 / strength, v becomes the anchor less a step: its head is the client's own."""
    leaves = LocalLeaves(local_training(batches=jaxfed.Steps(None, steps=1)), "head")
    params, own_head, own, rows = loops.start(), loops.start(seed=2)["head"], loops.start(seed=3), loops.data().client(3)
    inner = leaves.init_kept(Broadcast(params, {}, {}, 0), jax.random.key(0))._replace(params={"body": None, "head": own_head})
    upload, kept = loops.run_round(Ditto(leaves, 0.5, 2.0), params, 3, client=inner, params=own, trained=True)
    anchor = {**params, "head": own_head}
    assert_trees(kept.params, loops.sgd(anchor, loops.gradient(own, rows["x"], rows["y"]), 0.5))
    assert upload.delta["head"] is None
    np.testing.assert_allclose(
        kept.client.params["head"], loops.sgd(anchor, loops.gradient(anchor, rows["x"], rows["y"]))["head"]
    )


SCAFFOLD = Optimizer(0.05, modules=["scaffold-client"])


def test_the_global_model_may_be_that_of_scaffold():
    client = Ditto(jaxfed.LocalTraining(loops.parabola, SCAFFOLD, jaxfed.Steps(None, steps=10)), 0.05, 2.0)
    algorithm = jaxfed.Algorithm(client, Optimizer(1.0, modules=["scaffold-server"]))
    run = jaxfed.Simulation(algorithm, loops.curvatures(), chunk=50)
    state, _ = run.run(run.init(jnp.zeros(()), key=jax.random.key(0)), rounds=200)
    assert float(state.params) == pytest.approx(10 / 11, abs=1e-9)
    np.testing.assert_allclose(state.kept.params, [0.606060606061, 0.984848484848], atol=1e-9)


REFUSED = {
    "scaffold in the personal model": (lambda: Ditto(local_training(SCAFFOLD)), ValueError, "'scaffold'.*optimizer= of its own"),
    "a mixture": (
        lambda: Ditto(jaxfed.FedEM(loops.MODEL, 0.1, loops.ORDERED)),
        TypeError,
        "expected LocalTraining or LocalLeaves",
    ),
    "a negative pull": (lambda: Ditto(local_training(), strength=-1.0), ValueError, "at least 0"),
}


@pytest.mark.parametrize(("make", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_bad_parts_are_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()
