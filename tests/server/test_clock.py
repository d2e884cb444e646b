"""The virtual clock beside a loop over events; who is there, who finishes, who is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from server.selections import draw, fits, run, simulation

import jaxfed
from jaxfed import Criterion, FirstToFinish, Oort, Uniform, Windows, completion_seconds

SECONDS = [9.0, 1.0, 4.0, 7.0, 2.0]


def test_completion_times():
    """3 B K c / 1000 + 2 S / b."""
    found = completion_seconds(
        milliseconds=np.array([2.0, 50.0]), kbit_per_second=np.array([100.0, 5.0]), examples=np.array([30, 600]), model_kbit=80.0
    )
    np.testing.assert_allclose(found, [3 * 30 * 2 / 1000 + 160 / 100, 3 * 600 * 50 / 1000 + 160 / 5], rtol=1e-6)


def test_the_fastest_of_those_asked_count():
    found = draw(FirstToFinish(Uniform(3), keep=2, seconds=SECONDS), 5, 200)
    for ids, valid in zip(found.ids, found.valid):
        assert sorted(ids[valid]) == sorted(sorted(ids, key=lambda client: SECONDS[client])[:2])
    assert fits(np.bincount(found.ids.ravel(), minlength=5), np.ones(5) / 5)


def windows(begins, ends, period):
    return Windows(np.array(begins, float), np.array(ends, float), np.array(period, float))


def test_windows_come_again_however_long_the_jump():
    trace = windows([[1, 6], [0, 3]], [[2, 8], [3, 3]], [10, 4])
    times = np.array([0, 1, 1.5, 2, 6, 9, 11, 16, 21, 1_000_001.0, 1_000_003.0])

    def there(time, spans, period):
        return any(begin <= time % period < end for begin, end in spans)

    for client, (spans, period) in enumerate([([(1, 2), (6, 8)], 10), ([(0, 3)], 4)]):
        found = [bool(trace.online(jnp.float32(time), jnp.array([client]))[0]) for time in times]
        assert found == [there(time, spans, period) for time in times]


def test_only_who_is_there_is_asked_and_whoever_leaves_drops_out():
    # At 0 clients 0 to 3 are there; 3 leaves at 5, before its 7 seconds are over.
    trace = windows([[0], [0], [0], [0], [8]], [[20], [20], [20], [5], [20]], [20] * 5)
    rule = FirstToFinish(Uniform(5), keep=4, seconds=SECONDS, availability=trace)
    state = rule.init(5)
    cohort = rule.select(state, jax.random.key(0), jnp.array(0), 5)
    assert sorted(np.asarray(cohort.ids)[np.asarray(cohort.valid)]) == [0, 1, 2]
    assert rule.observe(state, cohort, {}).clock == 9
    # At 9 client 3 is gone and 4 is there.
    later = state._replace(clock=jnp.float32(9))
    cohort = rule.select(later, jax.random.key(0), jnp.array(1), 5)
    assert sorted(np.asarray(cohort.ids)[np.asarray(cohort.valid)]) == [0, 1, 2, 4]


def test_the_clock_goes_on_where_nobody_finishes():
    trace = windows([[0]] * 2, [[1]] * 2, [100] * 2)
    rule = FirstToFinish(Uniform(2), keep=1, seconds=[30.0, 60.0], availability=trace)
    cohort = rule.select(rule.init(2), jax.random.key(0), jnp.array(0), 2)
    assert not cohort.valid.any()
    assert rule.observe(rule.init(2), cohort, {}).clock == 60


def test_stragglers_are_told_to_the_rule_inside_and_absent_clients_are_not():
    trace = windows([[0], [0], [0], [50], [50]], [[50], [50], [50], [99], [99]], [99] * 5)
    inside = Oort(4, examples=np.ones(5), metric="loss")
    rule = FirstToFinish(inside, keep=2, seconds=SECONDS, availability=trace)
    state = rule.init(5)
    cohort = rule.select(state, jax.random.key(0), jnp.array(0), 5)
    told = {"loss": jnp.where(cohort.valid, 3.0, jnp.nan), "examples": jnp.full(4, 2.0)}
    after = rule.observe(state, cohort, told).selector
    # Clients 1 and 2 finished, 0 was too slow and gets their mean, 3 and 4 were not there.
    np.testing.assert_array_equal(after.utility, [6, 6, 6, 0, 0])
    np.testing.assert_array_equal(after.picks, [1, 1, 1, 0, 0])


def test_a_run_reports_the_clock_beside_a_loop():
    state, history = run(FirstToFinish(Uniform(3), keep=2, seconds=SECONDS), rounds=5)
    clock = 0.0
    for report in history:
        assert len(report.clients) == len(report.excluded) + 2 == 2
        clock += max(SECONDS[client] for client in report.clients)
        assert report.selection == {"clock": clock}
        assert report.row()["clock"] == clock
    assert state.selector.clock == clock
    np.testing.assert_array_equal(history["clock"], [report.selection["clock"] for report in history])


@pytest.mark.parametrize("options", [{"paged": True}, {"lanes": 2}, {"devices": 1}])
def test_other_ways_to_run_give_the_same_clock(options):
    rule = FirstToFinish(Criterion(3, metric="steps"), keep=2, seconds=SECONDS)
    plain, other = run(rule, rounds=4)[1], run(rule, rounds=4, **options)[1]
    assert [report.selection for report in plain] == [report.selection for report in other]
    assert [report.clients.tolist() for report in plain] == [report.clients.tolist() for report in other]


RULES = {
    "weighted": jaxfed.Weighted(2, np.ones(5)),
    "criterion": Criterion(2, over="mean"),
    "composition": jaxfed.Composition([Uniform(1), Criterion(1)]),
    "oort": Oort(3, examples=np.ones(5), seconds=SECONDS, metric="loss", most_picks=3),
    "first to finish": FirstToFinish(Uniform(3), keep=2, seconds=SECONDS, availability=windows([[0]] * 5, [[40]] * 5, [50] * 5)),
    "asynchronous": jaxfed.Asynchronous(Uniform(3), buffer=2, seconds=SECONDS),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.usefixtures("x64")
def test_rules_run_in_double_precision_and_are_traced_once(name):
    traced = []

    class Noted(type(RULES[name]), register=False):
        def observe(self, state, cohort, metrics):
            traced.append(name)
            return super().observe(state, cohort, metrics)

    rule = Noted(**{field: getattr(RULES[name], field) for field in RULES[name].get_config()})
    sim = simulation(rule)
    state, _ = sim.run(sim.init({"w": jnp.asarray(2.0)}, key=jax.random.key(0)), rounds=2)
    seen = len(traced)
    sim.run(state, rounds=3)
    assert len(traced) == seen > 0


def test_guided_selection_reaches_a_loss_sooner_than_chance():
    """Ten clients of twenty are thirty times as slow, and all have the same to teach."""
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(20), 10)
    x = rng.normal(size=(200, 3)).astype(np.float32)
    data = jaxfed.FederatedData.from_arrays({"x": x, "y": x @ np.array([1.0, -2.0, 0.5], np.float32)}, owners)
    seconds = np.where(np.arange(20) % 2, 30.0, 1.0)

    def squares(params, batch, key):
        return (batch["x"] @ params - batch["y"]) ** 2

    def time_to(selector):
        sim = jaxfed.Simulation(jaxfed.fedavg(squares, lrate=0.02, batch_size=5, measures=["loss_rms"]), data, selector=selector)
        _, history = sim.run(sim.init(np.zeros(3, np.float32), key=jax.random.key(1)), rounds=60, eval_every=1)
        reached = np.flatnonzero(history["eval_loss"] < 0.01)
        return history["clock"][reached[0]]

    guided = Oort(4, examples=np.full(20, 10.0), seconds=seconds, explore_least=0.1)
    times = [time_to(FirstToFinish(rule, keep=3, seconds=seconds)) for rule in (guided, Uniform(4))]
    assert times[0] < 0.8 * times[1]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: FirstToFinish(jaxfed.Everyone(), 2, SECONDS), "FirstToFinish.selector: expected a selector that ranks clients"),
        (lambda: simulation(FirstToFinish(Uniform(2), 3, SECONDS)), "keep: expected at most the 2 clients that are asked, got 3"),
        (lambda: simulation(FirstToFinish(Uniform(2), 1, SECONDS[:4])), "seconds: expected a row for each of 5 clients, got 4"),
        (
            lambda: simulation(FirstToFinish(Uniform(2), 1, SECONDS, windows([[0]], [[1]], [2]))),
            "Windows.period: expected a row for each of 5 clients, got 1",
        ),
        (lambda: FirstToFinish(Uniform(2), 1, [1.0, 0.0]), "seconds: expected finite numbers above 0"),
        (lambda: windows([[0, 1]], [[1]], [2]), r"expected begins \[N, W\]"),
        (lambda: windows([[1]], [[0]], [2]), "begins <= ends <= period"),
        (lambda: windows([[1]], [[3]], [2]), "begins <= ends <= period"),
        (lambda: windows([1], [1], [2]), "expected an array with 2 axes"),
    ],
)
def test_what_does_not_fit_is_refused(make, text):
    with pytest.raises((ValueError, TypeError), match=text):
        make()
