"""What clients keep between rounds, and what a run leaves to its caller."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine.oracle import Planned, flat, softmax_data, softmax_loss, softmax_params

import jaxfed
from jaxfed import FromOptax, Optimizer, OptiModule, Simulation, fedavg
from jaxfed.optimizer.rates import FromSchedule

OPTIONS = {"batch_size": 4, "epochs": 2}
ADAM, MOMENTUM = ("adam", {"round_reset": True}), ("momentum", {"beta": 0.5})
PARAMS = softmax_params(np.float32)


def simulate(algorithm, cohort_size=4, **options):
    simulation = Simulation(algorithm, softmax_data(dtype=np.float32), cohort_size, lanes=3, **options)
    return simulation, simulation.init(PARAMS, key=jax.random.key(0))


def assert_same_state(left, right):
    one, other = (jax.tree.leaves(state._replace(key=jax.random.key_data(state.key))) for state in (left, right))
    for x, y in zip(one, other, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def scaffold():
    """A run with state everywhere: control variates at clients and server, Adam at the server, partial participation."""
    server = Optimizer(0.05, modules=["adam"])
    return simulate(jaxfed.scaffold(softmax_loss, lrate=0.1, server_lrate=server, **OPTIONS), chunk=5)


def test_going_on_is_the_run_that_was_never_interrupted(scaffold):
    simulation, state = scaffold
    whole, history = simulation.run(state, rounds=7)
    half, first = simulation.run(state, rounds=3)
    resumed, second = simulation.run(half, rounds=4)
    assert_same_state(whole, resumed)
    assert [r.row() for r in history] == first.rows() + second.rows()
    assert [r.round for r in history] == [1, 2, 3, 4, 5, 6, 7]


def test_rounds_one_by_one_are_the_run(scaffold):
    simulation, state = scaffold
    whole, history = simulation.run(state, rounds=3)
    steps = list(simulation.rounds(state, rounds=3))
    assert_same_state(steps[-1][0], whole)
    assert [report.row() for _, report in steps] == history.rows()
    assert len({flat(s.params).tobytes() for s, _ in steps}) == 3


def test_the_caller_keeps_his_state_and_his_weights(scaffold):
    simulation, state = scaffold
    before = jax.tree.map(np.array, (state.params, state.kept, state.seen))
    first, _ = simulation.run(state, rounds=2)
    second, _ = simulation.run(state, rounds=2)
    assert_same_state(first, second)
    jax.tree.map(np.testing.assert_array_equal, before, (state.params, state.kept, state.seen))
    assert not state.seen.any()
    np.testing.assert_array_equal(flat(PARAMS), flat(softmax_params(np.float32)))


def test_only_those_who_took_part_are_seen(scaffold):
    simulation, state = scaffold
    after, history = simulation.run(state, rounds=1)
    assert np.flatnonzero(after.seen).tolist() == sorted(history[0].clients[history[0].counted].tolist())


def test_no_rounds_change_nothing(scaffold):
    simulation, state = scaffold
    after, history = simulation.run(state, rounds=0)
    assert_same_state(state, after)
    assert len(history) == 0


def final(optimizer, rounds=3):
    simulation, state = simulate(fedavg(softmax_loss, lrate=optimizer, **OPTIONS))
    return flat(simulation.run(state, rounds=rounds)[0].params)


def test_modules_that_reset_begin_every_round_afresh():
    fresh = final(Optimizer(0.1, modules=[ADAM]))
    assert (final(Optimizer(0.1, modules=[ADAM], keep_state=True)) == fresh).all()


def test_a_reset_module_leaves_its_neighbour_alone():
    alone = Optimizer(0.1, modules=[("ewma", {"beta": 0.0, "round_reset": True}), MOMENTUM], keep_state=True)
    np.testing.assert_allclose(final(alone), final(Optimizer(0.1, modules=[MOMENTUM], keep_state=True)), atol=1e-6)
    assert abs(final(alone) - final(alone.replace(keep_state=False))).max() > 1e-3


def slope(params, batch, key):
    return jnp.broadcast_to(params, batch["y"].shape)


def count_steps(step):
    return jnp.asarray(step, jnp.float32)


@pytest.mark.parametrize(("keep_state", "moved"), [(False, [3, 3, 3]), (True, [3, 12, 21])])
def test_steps_count_from_zero_or_go_on(keep_state, moved):
    """With a gradient of 1 and a rate that is the number of the step, three steps move by 0 + 1 + 2, then 3 + 4 + 5."""
    optimizer = Optimizer(FromSchedule(count_steps), keep_state=keep_state)
    algorithm = fedavg(slope, lrate=optimizer, batch_size=None, steps=3)
    simulation = Simulation(algorithm, softmax_data([2, 2]), selector=Planned([[0]]))
    weights = [float(s.params) for s, _ in simulation.rounds(simulation.init(jnp.zeros(()), key=jax.random.key(0)), rounds=3)]
    assert (-np.diff([0.0, *weights])).tolist() == moved


class Birth(OptiModule):
    """Keeps the weights that a client began with."""

    def init_kept(self, params, key):
        return params

    def start_round(self, kept, start):
        return kept

    def update(self, updates, state, params=None):
        return updates, state

    def end_round(self, state, begin, end):
        return state, ()


def test_a_new_client_begins_from_the_weights_of_its_first_round():
    algorithm = fedavg(slope, lrate=Optimizer(1.0, modules=[Birth()]), batch_size=None)
    simulation = Simulation(algorithm, softmax_data([2, 2, 2]), selector=Planned([[0], [1], [0], [2]]))
    state, _ = simulation.run(simulation.init(jnp.zeros(()), key=jax.random.key(0)), rounds=4)
    assert state.kept.kept[0].tolist() == [0.0, -1.0, -3.0]


def test_an_optax_transformation_keeps_its_state_like_a_module():
    ours = final(Optimizer(0.1, modules=[MOMENTUM], keep_state=True))
    foreign = FromOptax("trace", decay=0.5)
    np.testing.assert_allclose(final(Optimizer(0.1, modules=[foreign], keep_state=True)), ours, atol=1e-6)
