"""pFedMe against a plain loop and its fixed points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from personal import personal_loops as loops
from personal.personal_loops import assert_trees

import jaxfed
from jaxfed import Optimizer, PFedMe
from jaxfed.messages import Broadcast

STRENGTH, INNER_RATE, INNER_STEPS = 1.5, 0.2, 3
CLIENT = PFedMe(loops.MODEL, loops.RATE, INNER_RATE, loops.ORDERED, STRENGTH, INNER_STEPS)
pytestmark = pytest.mark.usefixtures("x64")


def pfedme_round(params, kept, rows):
    own, theta = params, params
    for x, y in loops.steps(rows):
        for _ in range(INNER_STEPS):
            pull = loops.tree(lambda g, t, w: g + STRENGTH * (t - w), loops.gradient(theta, x, y), theta, own)
            theta = loops.sgd(theta, pull, INNER_RATE)
        own = loops.tree(lambda w, t: w - loops.RATE * STRENGTH * (w - t), own, theta)
    return own, theta


@pytest.mark.parametrize("lanes", [1, 3])
def test_rounds_agree_with_a_plain_loop(lanes):
    expected = loops.federated(pfedme_round, lambda params: None, loops.start())
    assert_trees(loops.simulate(CLIENT, lanes).params, expected.params)


def test_the_personal_model_is_where_a_round_from_the_global_weights_arrives():
    params = loops.start()
    assert_trees(loops.personal(CLIENT, params, 3)[0], pfedme_round(params, None, loops.data().client(3))[1])


def envelopes(steps, lrate=0.3, **options):
    """Where the two parabolas' run ends: ``(w, theta [2])``."""
    work = {"lrate": lrate, "batch_size": None, "steps": steps, "personal_lrate": 0.1}
    algorithm = jaxfed.pfedme(loops.parabola, strength=2.0, inner_steps=100, **work, **options)
    run = jaxfed.Simulation(algorithm, loops.curvatures(), chunk=50)
    state, _ = run.run(run.init(jnp.zeros(()), key=jax.random.key(0)), rounds=300)
    start = Broadcast(state.params, {}, {}, 0)
    kept = algorithm.client.init_kept(start, jax.random.key(2))
    rows = [jaxfed.ClientRows.of(loops.curvatures().client(i)) for i in range(2)]
    personal = [algorithm.client.personalize(start, kept, rows[i], jax.random.key(i))[0] for i in range(2)]
    return float(state.params), np.array(personal)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_fixed_points(beta):
    weights, personal = envelopes(steps=1, server_lrate=beta)
    assert weights == pytest.approx(0.714285714286, abs=1e-11)
    np.testing.assert_allclose(personal, [0.476190476190, 0.952380952381], atol=1e-11)


def test_fixed_point_of_several_local_steps():
    """Steps of rate 0.05 on envelopes of curvature 2 a / (a + 2): as FedAvg's on parabolas."""
    share = 1 - (1 - 0.05 * np.array([2 / 3, 20 / 12])) ** 4
    assert envelopes(steps=4, lrate=0.05)[0] == pytest.approx(share[1] / share.sum(), abs=1e-9)


def test_clipping_bounds_each_inner_step():
    clipped = Optimizer(0.5, modules=[("l2-global-clipping", {"max_norm": 1e-3})])
    params = loops.start()
    found, _ = loops.personal(CLIENT.replace(personal=clipped, batches=jaxfed.Steps(None, steps=1)), params, 3)
    moved = np.sqrt(sum(((found[name] - params[name]) ** 2).sum() for name in params))
    assert moved == pytest.approx(INNER_STEPS * 0.5 * 1e-3, rel=0.01)


SCAFFOLD = Optimizer(0.1, modules=["scaffold-client"])
REFUSED = {
    "scaffold": ({"lrate": SCAFFOLD, "server_lrate": Optimizer(1.0, modules=["scaffold-server"])}, "exchanges.*'scaffold'"),
    "scaffold in the personal model": ({"personal_lrate": SCAFFOLD}, "PFedMe.personal.*exchanges"),
    "no pull": ({"strength": 0.0}, "above 0"),
    "no inner step": ({"inner_steps": 0}, "at least 1"),
}


@pytest.mark.parametrize(("options", "text"), REFUSED.values(), ids=REFUSED)
def test_bad_parts_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        jaxfed.pfedme(loops.MODEL, **{"lrate": 0.1, "batch_size": 4} | options)
