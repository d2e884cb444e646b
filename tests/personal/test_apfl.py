"""APFL against a plain loop, and its two ends: the global model and local training."""

import numpy as np
import pytest
from personal import personal_loops as loops
from personal.personal_loops import assert_trees, kept_of, local_training

from jaxfed import APFL, LocalLeaves, Optimizer

ALPHA, ALPHA_RATE, PERSONAL_RATE = 0.6, 0.8, 0.5
ADAPTIVE = APFL(local_training(), ALPHA, ALPHA_RATE, PERSONAL_RATE)
pytestmark = pytest.mark.usefixtures("x64")


def mix(alpha, own, params):
    return loops.tree(lambda v, w: alpha * v + (1 - alpha) * w, own, params)


def apfl_round(params, kept, rows):
    local, own, alpha = params, *kept
    for number, (x, y) in enumerate(loops.steps(rows)):
        slope, share = loops.gradient(mix(alpha, own, local), x, y), alpha
        if number == 0:
            direction = sum(((own[name] - local[name]) * slope[name]).sum() for name in own)
            alpha = np.clip(alpha - ALPHA_RATE * direction, 0, 1)
        own = loops.tree(lambda v, g, share=share: v - PERSONAL_RATE * share * g, own, slope)
        local = loops.sgd(local, loops.gradient(local, x, y))
    return local, (own, alpha)


@pytest.mark.parametrize("lanes", [1, 3])
def test_rounds_agree_with_a_plain_loop(lanes):
    expected = loops.federated(apfl_round, lambda params: (params, ALPHA), loops.start())
    state = loops.simulate(ADAPTIVE, lanes)
    assert_trees(state.params, expected.params)
    for i, (own, alpha) in expected.kept.items():
        assert_trees(kept_of(state, i).params, own)
        assert kept_of(state, i).alpha == pytest.approx(alpha, abs=1e-11)
    assert len({float(alpha) for _, alpha in expected.kept.values()}) > 2  # some have adapted


def test_a_client_predicts_with_the_mixture():
    params, own = loops.start(), loops.start(seed=2)
    found, _ = loops.personal(ADAPTIVE, params, 3, params=own, alpha=0.3, trained=True)
    assert_trees(found, mix(0.3, own, params), 1e-15)


def test_a_client_never_seen_trains_its_weights_before_it_predicts():
    params = loops.start()
    _, (own, alpha) = apfl_round(params, (params, ALPHA), loops.data().client(3))
    assert_trees(loops.personal(ADAPTIVE, params, 3)[0], mix(alpha, own, params))


def test_with_alpha_0_own_weights_stay_and_with_1_they_train_alone():
    params = loops.start()
    for alpha, expected in ((0.0, params), (1.0, loops.train(params, loops.data().client(3)))):
        _, kept = loops.run_round(APFL(local_training(), alpha), params, 3)
        assert_trees(kept.params, expected)


def test_the_upload_is_that_of_local_training():
    client = local_training(batches=loops.SHUFFLED)
    (plain, _), (ours, _) = (loops.run_round(c, loops.start(), 3) for c in (client, APFL(client)))
    assert_trees(ours.delta, plain.delta, 1e-15)
    assert_trees(ours.metrics, plain.metrics, 1e-15)


SCAFFOLD = Optimizer(0.1, modules=["scaffold-client"])
REFUSED = {
    "scaffold": (lambda: APFL(local_training(SCAFFOLD)), ValueError, "APFL.client.*'scaffold'"),
    "scaffold in the personal model": (
        lambda: APFL(local_training(), optimizer=SCAFFOLD),
        ValueError,
        "APFL.optimizer.*'scaffold'",
    ),
    "local leaves": (lambda: APFL(LocalLeaves(local_training(), "head")), TypeError, "mixes all weights"),
    "alpha": (lambda: APFL(local_training(), alpha=1.5), ValueError, "at most 1"),
}


@pytest.mark.parametrize(("make", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_bad_parts_are_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()
