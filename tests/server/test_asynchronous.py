"""Asynchronous rounds beside a loop over events, and their models beside a loop over rounds that keeps every model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from server.selections import Fixed, draw, fits, run, simulation

import jaxfed
from jaxfed import Asynchronous, Buffered, Oort, Stragglers, Uniform, Windows, fedbuff

POPULATION = 9


class Events:
    """The same rule, one event after another."""

    def __init__(self, rule, order):
        self.rule, self.order, self.clock, self.round = rule, order, 0.0, 0
        self.seconds = np.asarray(rule.seconds)
        self.lanes = [None] * rule.selector.size

    def stays(self, client):
        trace = self.rule.availability
        if trace is None:
            return True
        here = (trace.online(jnp.float32(t), jnp.array([client]))[0] for t in (self.clock, self.clock + self.seconds[client]))
        return all(map(bool, here))

    def begin(self, lane, gone):
        busy = {job[0] for job in self.lanes if job is not None}
        for client in self.order:
            if client not in busy | gone and self.stays(client):
                self.lanes[lane] = (client, self.clock, np.float32(self.clock) + self.seconds[client], self.round)
                return

    def next_round(self):
        """``[(client, age, counts)]``."""
        for lane, job in enumerate(self.lanes):
            if job is None:
                self.begin(lane, set())
        found, gone = [], set()
        for _ in range(self.rule.buffer):
            jobs = [(job[2], lane) for lane, job in enumerate(self.lanes) if job is not None]
            if not jobs:
                found.append((None, 0, False))
                continue
            self.clock, lane = min(jobs)
            client, _, _, began = self.lanes[lane]
            age = self.round - began
            found.append((client, age, age < self.rule.versions))
            gone.add(client)
            self.lanes[lane] = None
            self.begin(lane, gone)
        if all(client is None for client, _, _ in found):
            self.clock += self.seconds.max()
        self.lanes = [job and (*job[:3], self.round + 1 if job[1] == self.clock else job[3]) for job in self.lanes]
        self.round += 1
        return found


def rounds_of(rule, rounds):
    """``[(cohort, clock)]`` of a rule that learns nothing."""
    state, found = rule.init(POPULATION), []
    choose = jax.jit(rule.select, static_argnums=3)
    for round in range(rounds):
        cohort = choose(state, jax.random.key(round), jnp.array(round), POPULATION)
        state = rule.observe(state, cohort, {})
        found.append((cohort, float(state.clock)))
    return found


NIGHTS = Windows(np.zeros((POPULATION, 1)), np.linspace(15, 40, POPULATION)[:, None], np.full(POPULATION, 45.0))


@pytest.mark.parametrize("availability", [None, NIGHTS])
@pytest.mark.parametrize(("train", "buffer", "versions"), [(4, 3, 3), (5, 1, 2), (3, 3, 2), (9, 2, 6)])
def test_who_finishes_when_and_how_late(train, buffer, versions, availability):
    rng = np.random.default_rng(train)
    scores = rng.permutation(POPULATION).astype(float)
    rule = Asynchronous(Fixed(train, scores), buffer, rng.lognormal(1, 1, POPULATION).astype(np.float32), availability, versions)
    events, ages = Events(rule, np.argsort(-scores).tolist()), set()
    for cohort, clock in rounds_of(rule, 30):
        for place, (client, age, counts) in enumerate(events.next_round()):
            assert bool(cohort.valid[place]) == counts
            if client is not None:
                assert int(cohort.ids[place]) == client
                assert int(cohort.age[place]) == min(age, versions - 1)
                ages.add(age)
        assert clock == pytest.approx(events.clock, rel=1e-6)
    assert len(ages) > 1 or train == buffer


def test_equal_times_make_synchronous_rounds():
    rule = Asynchronous(Uniform(5), 5, np.full(POPULATION, 2.0))
    for number, (cohort, clock) in enumerate(rounds_of(rule, 6)):
        assert clock == 2.0 * (number + 1)
        assert cohort.valid.all()
        assert (cohort.age == 0).all()


def test_who_begins_is_drawn_at_random_and_ties_too():
    ids = draw(Asynchronous(Uniform(2), 2, np.ones(6)), 6).ids
    assert fits(np.bincount(ids.ravel(), minlength=6), np.ones(6) / 6)
    ids = draw(Asynchronous(Fixed(2, np.zeros(6)), 2, np.ones(6)), 6).ids
    assert fits(np.bincount(ids.ravel(), minlength=6), np.ones(6) / 6)


SECONDS = np.array([1.0, 2.5, 7.3, 4.1, 3.2])


def squares(params, batch, key):
    return 0.5 * (params["w"] - batch["x"]) ** 2


def federation():
    rows = np.array([3, 1, 2, 4, 2])
    owners = np.repeat(np.arange(5), rows)
    return jaxfed.FederatedData.from_arrays({"x": np.random.default_rng(0).normal(size=rows.sum())}, owners)


@pytest.mark.parametrize(("weights", "power"), [("uniform", 0.5), ("examples", 1.0)])
@pytest.mark.usefixtures("x64")
def test_models_are_those_of_a_loop_that_keeps_them_all(weights, power):
    """w <- w - sum n (1 + age)^-a (w_old - local(w_old)) / sum n, with w_old the model of ``age`` rounds ago."""
    data, rate = federation(), 0.3
    algorithm = fedbuff(squares, lrate=rate, batch_size=None, epochs=2, weights=weights, power=power, server_lrate=0.7)
    rule = Asynchronous(Uniform(4), buffer=2, seconds=SECONDS, versions=3)
    sim = jaxfed.Simulation(algorithm, data, selector=rule)
    first = sim.init({"w": jnp.asarray(2.0)}, key=jax.random.key(3))
    models, ages = [2.0], []
    for state, report in sim.rounds(first, rounds=25):
        total, weight = 0.0, 0.0
        for client, age in zip(report.clients, report.metrics["staleness"].astype(int)):
            x, old = data.client(client)["x"], models[len(models) - 1 - age]
            local = x.mean() + (1 - rate) ** 2 * (old - x.mean())
            n = len(x) if weights == "examples" else 1
            total, weight = total + n * (1 + age) ** -power * (old - local), weight + n
            ages.append(age)
        models.append(models[-1] - 0.7 * total / weight if weight else models[-1])
        np.testing.assert_allclose(state.params["w"], models[-1], rtol=1e-12)
    assert set(ages) >= {0, 1}


def test_without_delay_it_is_federated_averaging():
    data, options = federation(), {"lrate": 0.3, "batch_size": 2, "epochs": 2}
    rule = Asynchronous(Uniform(5), buffer=5, seconds=np.full(5, 4.0))
    found, average = [], jaxfed.fedavg(squares, weights="uniform", **options)
    for algorithm, more in (
        (fedbuff(squares, **options), {"selector": rule}),
        (average, {}),
    ):
        sim = jaxfed.Simulation(algorithm, data, **more)
        state, history = sim.run(sim.init({"w": jnp.asarray(2.0)}, key=jax.random.key(3)), rounds=4)
        found.append((state.params["w"], history["loss"]))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5)


@pytest.mark.parametrize("options", [{"paged": True}, {"lanes": 3}, {"devices": 1}])
def test_other_ways_to_run_give_the_same(options):
    """SCAFFOLD, whose clients keep a state, with a selection that learns."""
    data = federation()
    inside = Oort(4, examples=data.sizes, seconds=SECONDS, metric="loss")
    algorithm = jaxfed.scaffold(squares, lrate=0.1, batch_size=2)
    found = []
    for more in ({}, options):
        sim = jaxfed.Simulation(algorithm, data, selector=Asynchronous(inside, buffer=2, seconds=SECONDS), **more)
        found.append(sim.run(sim.init({"w": jnp.asarray(2.0)}, key=jax.random.key(3)), rounds=8))
    (one, first), (other, second) = found
    np.testing.assert_allclose(one.params["w"], other.params["w"], rtol=1e-5)
    assert [report.clients.tolist() for report in first] == [report.clients.tolist() for report in second]
    assert [report.selection for report in first] == [report.selection for report in second]


def test_a_run_in_two_parts_is_the_run():
    whole, history = run(Asynchronous(Uniform(4), 2, SECONDS), rounds=9)
    sim = simulation(Asynchronous(Uniform(4), 2, SECONDS))
    state, first = sim.run(sim.init({"w": np.float32(2.0)}, key=jax.random.key(0)), rounds=4)
    state, second = sim.run(state, rounds=5)
    assert state.params["w"] == whole.params["w"]
    assert [*first["clock"], *second["clock"]] == history["clock"].tolist()


def test_late_updates_weigh_less_and_the_sum_is_not_made_one():
    rule = Buffered("examples", power=1.0)
    np.testing.assert_allclose(rule.aggregate(jnp.array([[2.0], [6.0]]), jnp.array([1.0, 3.0])), [5.0])


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Asynchronous(jaxfed.Everyone(), 1, SECONDS), "Asynchronous.selector: expected a selector that ranks clients"),
        (lambda: Asynchronous(Uniform(2), 3, SECONDS), "buffer: expected at most the 2 clients that train at a time, got 3"),
        (lambda: Asynchronous(Uniform(2), 2, SECONDS, versions=1), "versions: expected an integer at least 2"),
        (lambda: simulation(Asynchronous(Uniform(2), 2, SECONDS[:3])), "seconds: expected a row for each of 5 clients, got 3"),
        (lambda: simulation(Asynchronous(Uniform(6), 2, SECONDS)), "at most the population of 5 clients, got 6"),
        (
            lambda: jaxfed.Simulation(
                jaxfed.mime(squares, lrate=0.1, batch_size=2), federation(), selector=Asynchronous(Uniform(2), 2, SECONDS)
            ),
            "'asynchronous' lets clients begin in other rounds than they end in",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, text):
    with pytest.raises((ValueError, TypeError), match=text):
        make()


def test_a_round_in_which_nobody_finishes_leaves_the_model_and_lets_time_pass():
    trace = Windows(np.full((5, 1), 10.0), np.full((5, 1), 20.0), np.full(5, 30.0))
    _, history = run(Asynchronous(Uniform(3), 2, SECONDS, trace), rounds=6)
    # Nobody is there until 10; each of two rounds lasts as long as the slowest client would take.
    np.testing.assert_allclose(history["clock"][:2], [7.3, 14.6], rtol=1e-6)
    assert [len(report.clients) for report in history][:2] == [0, 0]
    assert len(history[2].clients) > 0


def test_stragglers_may_do_less_of_what_is_late():
    state, history = run(Stragglers(Asynchronous(Uniform(4), 2, SECONDS), 0.5, epochs=2), rounds=6)
    assert state.past.params["w"].shape == (6,)
    assert max(report.metrics["staleness"].max() for report in history) > 0
