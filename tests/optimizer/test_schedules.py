import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from steps import random_part, through_json

from jaxfed import part
from jaxfed.optimizer import rates, schedules
from jaxfed.optimizer.rates import ByLabel, Constant, FromSchedule, Schedule, as_rate
from jaxfed.optimizer.schedules import (
    CosineAnnealing,
    CosineAnnealingWarmRestarts,
    CyclicExpRange,
    CyclicTriangular,
    ExponentialDecay,
    InverseScaling,
    LinearDecay,
    PiecewiseDecay,
    PolynomialDecay,
    Warmup,
    WarmupRounds,
)

OWN = [cls for cls in part.registered("schedule").values() if cls.__module__ == schedules.__name__]


def half_cosine(low, high, past):
    return low + (high - low) * (1 + np.cos(np.pi * past)) / 2


def triangle(u, size):
    return 1 - abs(u % (2 * size) / size - 1)


# A schedule of one count, and the same in plain Python.
FORMULAS = {
    "exponential": (ExponentialDecay, (0.5, 0.99), lambda u: 0.5 * 0.99**u),
    "inverse": (InverseScaling, (0.5, 0.7), lambda u: 0.5 / (u + 1) ** 0.7),
    "linear": (LinearDecay, (0.5, 0.01), lambda u: 0.5 * max(1 - 0.01 * u, 0)),
    "polynomial": (PolynomialDecay, (0.5, 3, 70), lambda u: 0.5 * (1 - min(u / 70, 1)) ** 3),
    "piecewise": (PiecewiseDecay, (0.5, 0.8, 9), lambda u: 0.5 * 0.8 ** (u // 9)),
    "cosine": (CosineAnnealing, (0.1, 0.5, 70), lambda u: half_cosine(0.1, 0.5, min(u / 70, 1))),
    "restarts": (CosineAnnealingWarmRestarts, (0.1, 0.5, 9, 0.9), lambda u: half_cosine(0.1, 0.5 * 0.9 ** (u // 9), u % 9 / 9)),
}
COUNTS = np.arange(100)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("step_level", [True, False])
def test_formula_of_the_step_or_the_round(name, step_level, x64):
    cls, arguments, formula = FORMULAS[name]
    schedule = cls(*arguments, step_level=step_level)
    clocks = (COUNTS, np.full(100, 5)) if step_level else (np.full(100, 5), COUNTS)
    np.testing.assert_allclose(jax.vmap(schedule)(*clocks), [formula(u) for u in range(100)], rtol=1e-12)


@pytest.mark.parametrize("decay", [False, True])
def test_cyclic_triangular(decay, x64):
    expected = [0.1 + 0.4 * triangle(u, 7) * (0.5 ** (u // 14) if decay else 1) for u in COUNTS]
    np.testing.assert_allclose(jax.vmap(CyclicTriangular(0.1, 0.5, 7, decay))(COUNTS), expected, rtol=1e-12)


def test_cyclic_exp_range(x64):
    expected = [0.97**u * (0.1 + 0.4 * triangle(u, 7)) for u in COUNTS]
    np.testing.assert_allclose(jax.vmap(CyclicExpRange(0.1, 0.5, 7, 0.97))(COUNTS), expected, rtol=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
def test_first_round_has_the_first_value(name):
    """declearn's Optimizer begins at round -1: 2 * base, 1.1 * base, a division by zero; T-03."""
    cls, arguments, formula = FORMULAS[name]
    np.testing.assert_allclose(cls(*arguments, step_level=False)(step=0, round=0), formula(0), rtol=1e-6)


def test_warm_restarts_restart_by_round():
    """declearn takes the cycle from the step and its position from the round: no restarts; T-04."""
    schedule = CosineAnnealingWarmRestarts(0.001, 0.01, period=3, step_level=False)
    got = [float(schedule(step=4 * r, round=r)) for r in range(7)]
    np.testing.assert_allclose([got[0], got[3], got[6]], 0.01, rtol=1e-6)
    assert min(got) < 0.004


class StatefulWarmup:
    """declearn's two warm-ups as it runs them, with counters in Python; ``base`` is an exponential decay by step or by round."""

    def __init__(self, base, warmup, by_rounds):
        self.base, self.warmup, self.by_rounds = base, warmup, by_rounds
        self.steps, self.rounds, self.full_rounds, self.warmup_steps = 0, -1, -1, 0

    def start_round(self):
        self.rounds += 1
        self.full_rounds += self.steps < self.warmup

    def next_rate(self):
        if self.by_rounds:
            rate = self.base.base * (self.rounds + 1) / self.warmup
            warm, shift = self.rounds < self.warmup, (self.warmup_steps, self.warmup)
            self.warmup_steps += warm
        else:
            rate = self.base.base * (self.steps + 1) / self.warmup
            warm, shift = self.steps < self.warmup, (self.warmup, self.full_rounds)
        rate = rate if warm else float(self.base(self.steps - shift[0], self.rounds - shift[1]))
        self.steps += 1
        return rate


@pytest.mark.parametrize("step_level", [True, False])
@pytest.mark.parametrize("warmup", [1, 4, 6, 8])
@pytest.mark.parametrize("by_rounds", [True, False])
def test_warmup_equals_declearns_given_the_steps_per_round(by_rounds, warmup, step_level):
    """With 4 steps a round: the wrapped schedule's other clock is set back by a number that we are told."""
    base = ExponentialDecay(1.0, 0.9, step_level=step_level)
    ours = WarmupRounds(base, warmup, steps=4 * warmup) if by_rounds else Warmup(base, warmup, rounds=(warmup - 1) // 4)
    theirs = StatefulWarmup(base, warmup, by_rounds)
    for round in range(10):
        theirs.start_round()
        for step in range(4 * round, 4 * round + 4):
            np.testing.assert_allclose(ours(step, round), theirs.next_rate(), rtol=1e-6)


def test_warmup_of_what_has_no_base_rises_to_its_first_value():
    schedule = Warmup(optax.constant_schedule(0.5), 2)
    np.testing.assert_allclose([schedule(u) for u in range(4)], [0.25, 0.5, 0.5, 0.5])
    nested = Warmup(WarmupRounds(0.5, 1), 2)
    np.testing.assert_allclose(nested(0), 0.25)


@pytest.mark.parametrize("cls", OWN)
def test_compiles_once_and_sweeps(cls):
    """Steps, rounds and numbers are data; a sweep over the numbers equals a loop."""
    traces = []

    @jax.jit
    def value(schedule, step, round):
        traces.append(1)
        return schedule(step, round)

    first = random_part(cls, seed=0)
    second = jax.tree.map(lambda x: x + 1 if isinstance(x, int) else x / 2, first)
    plain = [float(value(s, 11, 4)) for s in (first, second)]
    assert len(traces) == 1
    both = jax.tree.map(lambda *x: jnp.array(x), first, second)
    np.testing.assert_allclose(jax.vmap(lambda s: s(11, 4))(both), plain, rtol=1e-5)
    np.testing.assert_allclose([first(11, 4), second(11, 4)], plain, rtol=1e-5)


@pytest.mark.parametrize("cls", [*OWN, Constant])
@pytest.mark.parametrize("seed", range(3))
def test_config_is_lossless(cls, seed):
    schedule = random_part(cls, seed)
    assert through_json(schedule) == schedule


def test_nested_config_is_lossless():
    rate = ByLabel({"b/*": Warmup(CosineAnnealing(0.1, 0.5, 7, step_level=False), 3), "*": 1})
    assert through_json(rate) == rate
    assert list(through_json(rate).rates) == ["b/*", "*"]


def test_is_an_optax_schedule():
    transformation = optax.scale_by_learning_rate(ExponentialDecay(1.0, 0.5))
    state = transformation.init(jnp.ones(1))
    for expected in (-1.0, -0.5, -0.25):
        update, state = transformation.update(jnp.ones(1), state)
        np.testing.assert_allclose(update, expected)


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1), np.int64(1), jnp.float32(1), jnp.bfloat16(1)])
def test_numbers_become_floats(value):
    assert type(as_rate("lrate", value)) is float


@pytest.mark.parametrize(
    ("value", "cls"),
    [
        (("linear-decay", {"base": 1, "rate": 0.1}), LinearDecay),
        (["constant", {"rate": 0.1}], Constant),
        (lambda step: 0.1 * step, FromSchedule),
        ({"a": 0.1}, ByLabel),
        (LinearDecay(1.0, 0.1), LinearDecay),
    ],
)
def test_rates_are_converted(value, cls):
    assert type(as_rate("lrate", value)) is cls


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (-0.1, ValueError, "lrate: expected a finite number at least 0, got -0.1"),
        (float("inf"), ValueError, "finite"),
        (True, TypeError, "lrate: expected a number, a schedule"),
        (None, TypeError, r"got None \(NoneType\)"),
        ("linear-decai", ValueError, "Did you mean 'linear-decay'"),
        (("linear-decay", {"base": 1}), ValueError, "linear-decay needs rate"),
        (("linear-decay", {"base": 1, "rat": 1}), ValueError, "Did you mean 'rate'"),
        ({"a": {"b": 0.1}}, TypeError, "rates by label cannot be wrapped"),
        ({}, TypeError, "expected {label: rate}"),
    ],
)
def test_what_is_no_rate_is_refused(value, error, text):
    with pytest.raises(error, match=text):
        as_rate("lrate", value)


@pytest.mark.parametrize("options", [{"base": 0.1, "rate": -1}, {"base": -0.1, "rate": 1}])
def test_bad_numbers_are_refused(options):
    with pytest.raises(ValueError, match="at least 0"):
        ExponentialDecay(**options)


TREE = {"out": {"bias": 1, "kernel": 2}, "body": [3, 4]}


def test_by_label_first_match_wins_also_after_a_tree_map():
    """A plain dict would come back from tree.map in alphabetical order."""
    rate = ByLabel({"out/bias": 1.0, "out/*": 2.0, "*": LinearDecay(3.0, 0.5)})
    for same in (rate, jax.tree.map(lambda x: x, rate)):
        assert rates.rates(same, 1, 0, TREE) == {"out": {"bias": 1.0, "kernel": 2.0}, "body": [1.5, 1.5]}
    swept = jax.vmap(lambda r: r.per_leaf(0, 0, TREE)["out"])(jax.tree.map(lambda x: x * jnp.arange(2.0), rate))
    np.testing.assert_allclose(swept["kernel"], [0.0, 2.0])


def test_by_label_with_a_function_of_labels():
    rate = ByLabel({"slow": 0.1, "fast": 1.0}, labels=lambda params: {"out": "fast", "body": "slow"})
    assert rate.per_leaf(0, 0, TREE) == {"out": {"bias": 1.0, "kernel": 1.0}, "body": [0.1, 0.1]}
    with pytest.raises(ValueError, match="cannot be written to a config"):
        rate.get_config()


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (["out/*"], "no rate for 'body/0', 'body/1'.*Leaves: 'body/0', 'body/1', 'out/bias', 'out/kernel'"),
        (["out/*", "body/*", "head/*"], "'head/.' decides no leaf.*Labels: 'out/.', 'body/.', 'head/.'"),
        (["*", "out/bias"], "'out/bias' decides no leaf .the first label that fits does."),
    ],
)
def test_by_label_names_what_does_not_match(labels, text):
    with pytest.raises(ValueError, match=text):
        ByLabel(dict.fromkeys(labels, 0.1)).per_leaf(0, 0, TREE)


def test_one_rate_for_all_leaves():
    now = rates.rates(LinearDecay(1.0, 0.25), 1, 0, {"a": 1, "b": {}})
    assert now == {"a": 0.75, "b": {}}
    with pytest.raises(TypeError, match="per_leaf"):
        ByLabel({"a": 1.0})(0)


def test_a_function_has_no_config():
    with pytest.raises(ValueError, match="a function cannot be written to a config"):
        FromSchedule(optax.constant_schedule(0.1)).get_config()
    assert FromSchedule(lambda r: r / 2, step_level=False)(step=8, round=3) == 1.5


def test_an_unnamed_schedule_can_be_used():
    class Alternate(Schedule, register=False):
        def __call__(self, step, round=0):
            return 0.5 * (jnp.asarray(step) % 2)

    assert rates.at(Alternate(), 3) == 0.5
