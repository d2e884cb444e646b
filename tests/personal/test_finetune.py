"""Fine-tuning before a client predicts."""

import jax
import pytest
from personal import personal_loops as loops
from personal.personal_loops import assert_trees, local_training

from jaxfed import APFL, Ditto, FedEM, Finetuned, LocalLeaves, Optimizer

pytestmark = pytest.mark.usefixtures("x64")


def tuned(client, params):
    """What client 3, seen for the first time, predicts with."""
    return loops.personal(client, params, 3)[0]


def test_a_client_trains_on_from_the_global_weights():
    params, rows = loops.start(), loops.data().client(3)
    assert_trees(tuned(Finetuned(local_training()), params), loops.train(params, rows))
    other = Finetuned(local_training(), 0.1, loops.ORDERED.replace(epochs=5))
    assert_trees(tuned(other, params), loops.train(params, rows, 5, rate=0.1))


def test_a_client_trains_on_from_what_it_would_predict_with():
    params, rows = loops.start(), loops.data().client(3)
    first = loops.train(params, rows, only=["head"])
    assert_trees(tuned(Finetuned(LocalLeaves(local_training(), "head")), params), loops.train(first, rows))
    alone = loops.train(loops.train(params, rows), rows)
    assert_trees(tuned(Finetuned(Ditto(local_training(), strength=0.0)), params), alone)
    assert_trees(tuned(Finetuned(APFL(local_training(), 1.0)), params), alone)


def test_the_upload_is_that_of_local_training():
    client = local_training(batches=loops.SHUFFLED)
    (plain, _), (ours, _) = (loops.run_round(c, loops.start(), 3) for c in (client, Finetuned(client, 0.01)))
    assert_trees(ours.delta, plain.delta, 1e-15)
    assert_trees(ours.metrics, plain.metrics, 1e-15)


def test_clients_never_seen_are_tuned_on_their_training_rows():
    train, test = loops.data([4, 6], seed=5), loops.data([3, 2], seed=6)
    run = loops.simulation(Finetuned(local_training()))
    state = run.init(loops.start(), key=jax.random.key(0))
    found = run.evaluate_personal(state, test, train=train).by_client["loss"]
    expected = [loops.losses(loops.train(loops.start(), train.client(i)), **test.client(i)).mean() for i in range(2)]
    assert found == pytest.approx(expected, rel=1e-11)


SCAFFOLD = Optimizer(0.1, modules=["scaffold-client"])
REFUSED = {
    "a mixture": (lambda: Finetuned(FedEM(loops.MODEL, 0.1, loops.ORDERED)), TypeError, "needs one set of weights"),
    "scaffold": (lambda: Finetuned(local_training(SCAFFOLD)), ValueError, "away from the client's.*optimizer="),
}


@pytest.mark.parametrize(("make", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_bad_parts_are_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_scaffold_may_train_what_another_optimizer_tunes():
    params = loops.start()
    assert_trees(tuned(Finetuned(local_training(SCAFFOLD), loops.RATE), params), loops.train(params, loops.data().client(3)))
