"""The benchmarks measure what they say: our peer script against a plain loop, and the bookkeeping of the sweep."""

import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


# The models of the benchmarks broadcast as NumPy does.
@pytest.fixture(autouse=True)
def strict():
    """Replaces the tests' strictness."""


@pytest.fixture
def load(monkeypatch):
    """A module of the benchmarks, forgotten afterwards: their names are not the package's."""
    monkeypatch.syspath_prepend(FOLDER)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.fixture
def small(load):
    """W1 with 12 clients, 5 a round."""
    return load("workloads").draw_logistic(np.random.default_rng(3), clients=12, cohort=5)


def gradient(params, x, y):
    """Of the mean cross-entropy of ``x @ w + b``."""
    logits = x @ params["w"] + params["b"]
    chances = np.exp(logits - logits.max(1, keepdims=True))
    error = (chances / chances.sum(1, keepdims=True) - np.eye(10)[y]) / len(y)
    return {"w": x.T @ error, "b": error.sum(0)}


def local(work, number, start, correct):
    """One epoch of SGD in the order of the data; ``correct`` changes each gradient."""
    params, (x, y) = dict(start), work.client(number)
    for i in range(0, len(x), work.batch_size):
        g = correct(params, gradient(params, x[i : i + work.batch_size].astype(float), y[i : i + work.batch_size]))
        params = {key: params[key] - work.lrate * g[key] for key in params}
    return params


def slow_rounds(work, rounds, server=lambda params, mean, t: mean, mu=0.0):
    """Weighted averaging, optionally with FedProx's pull and a step of the server's own."""
    params = {key: w.astype(float) for key, w in work.params.items()}
    for t in range(rounds):
        cohort, start = work.schedule[t], params

        def pull(now, g, start=start):
            return {key: g[key] + mu * (now[key] - start[key]) for key in g}

        ends = [local(work, number, start, pull) for number in cohort]
        share = work.sizes[cohort] / work.sizes[cohort].sum()
        mean = {key: sum(s * end[key] for s, end in zip(share, ends)) for key in params}
        params = server(start, mean, t + 1)
    return params


def slow_scaffold(work, rounds):
    """Option II, uniform weights, the server's variate over the population."""
    params = {key: w.astype(float) for key, w in work.params.items()}
    zeros = {key: np.zeros_like(w) for key, w in params.items()}
    c, own = zeros, [zeros] * len(work.sizes)
    for cohort in work.schedule[:rounds]:
        ends, moved = [], zeros
        for number in cohort:
            ci = own[number]
            end = local(work, number, params, lambda now, g, ci=ci: {key: g[key] - ci[key] + c[key] for key in g})  # noqa: B023
            rate = work.steps[number] * work.lrate
            own[number] = {key: ci[key] - c[key] + (params[key] - end[key]) / rate for key in params}
            moved = {key: moved[key] + own[number][key] - ci[key] for key in params}
            ends.append(end)
        params = {key: np.mean([end[key] for end in ends], axis=0) for key in params}
        c = {key: c[key] + moved[key] / len(work.sizes) for key in params}
    return params


def adam():
    """PyTorch's Adam at rate 0.01 on the clients' mean move."""
    m, v = {}, {}

    def server(params, mean, t):
        new = {}
        for key, w in params.items():
            d = mean[key] - w
            m[key] = 0.9 * m.get(key, 0) + 0.1 * d
            v[key] = 0.999 * v.get(key, 0) + 0.001 * d * d
            new[key] = w + 0.01 * (m[key] / (1 - 0.9**t)) / (np.sqrt(v[key] / (1 - 0.999**t)) + 1e-8)
        return new

    return server


SLOW = {
    "fedavg": slow_rounds,
    "fedprox": lambda work, rounds: slow_rounds(work, rounds, mu=0.01),
    "fedadam": lambda work, rounds: slow_rounds(work, rounds, server=adam()),
    "scaffold": slow_scaffold,
}


@pytest.mark.parametrize("algorithm", SLOW)
def test_our_peer_does_what_a_loop_does(load, small, algorithm):
    peer, clock = load("peers.jaxfed_rounds"), load("timing").Clock()
    simulation = peer.make_simulation(small, algorithm, shuffle=False, lanes=2)
    state = peer.train(simulation, small, 4, clock)
    assert len(clock.seconds) == 4
    for key, expected in SLOW[algorithm](small, 4).items():
        np.testing.assert_allclose(state.params[key], expected, atol=2e-6)


@pytest.mark.parametrize("variant", ["scan", "vmap", "step"])
def test_plain_jax_does_what_a_loop_does(load, small, variant):
    plain, clock = load("peers.plain_jax"), load("timing").Clock()
    params = plain.train(small, 2, clock, variant=variant, shuffle=False)
    for key, expected in slow_rounds(small, 2).items():
        np.testing.assert_allclose(params[key], expected, atol=2e-6)


def test_option_that_the_simulation_does_not_take_is_refused(load, small):
    with pytest.raises(SystemExit, match="takes no wings"):
        load("peers.jaxfed_rounds").make_simulation(small, wings=2)


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["W2", "W3"])
def test_layers_are_one_function(load, workload):
    """The formulations of the peers and our own layers give one loss and one gradient."""
    peers, models, data = load("peers.jaxfed_rounds"), load("peers.models_jax"), load("workloads")
    draw = {"W2": data.draw_images, "W3": data.draw_letters}[workload]
    work = draw(np.random.default_rng(4), clients=2, cohort=1)
    x, y = work.x[:3], work.y[:3]
    losses = [lambda p, name=name: models.example_losses(workload, name)(p, x, y).mean() for name in models.LAYERS]
    losses.append(lambda p: peers.make_loss(workload)(peers.own_layout(p), {"x": x, "y": y}, None).mean())
    found = [jax.jit(jax.value_and_grad(loss))(work.params) for loss in losses]
    for value, slope in found[1:]:
        np.testing.assert_allclose(value, found[0][0], rtol=1e-6)
        for key in slope:
            np.testing.assert_allclose(slope[key], found[0][1][key], atol=2e-6)


def line(sweep, label, seconds, **more):
    machine = {"cpu": "one", "cores": 2, "memory_gb": 8, "system": "any"}
    run = {"sweep": sweep, "label": label, "workload": "W1", "algorithm": "fedavg", "round_s": seconds, "loss": 2.0}
    return run | {"rss_mb": 100.0, "first_round_s": 1.0, "examples_per_s": 10.0, "machine": machine, "versions": {}} | more


def test_ratios_are_taken_within_a_sweep(load):
    report = load("report")
    lines = [line(0, "jaxfed", 1.0), line(0, "pfl", 4.0), line(1, "jaxfed", 2.0), line(1, "pfl", 4.0, pss_mb=50.0)]
    text = report.page([*lines, line(1, "fedjax", 0.0, error="killed")], "some.png")
    assert "| pfl | 4.00 (4.00 - 4.00) | 3.00 (2.00 - 4.00) | - | 1.00 | 75.0 |" in text
    assert "- sweep 1, fedjax, W1, fedavg" in text
    assert text.index("| jaxfed |") < text.index("| pfl |")


def test_figure_is_drawn(load, tmp_path):
    load("report").draw([line(0, "jaxfed", 1.0), line(0, "pfl", 4.0)], tmp_path / "some.png")
    assert (tmp_path / "some.png").stat().st_size > 10_000


def test_sweep_goes_on_where_it_was_killed(load, tmp_path):
    sweep, path = load("sweep"), tmp_path / "some.jsonl"
    runs = list(sweep.planned(2, ["jaxfed", "pfl", "drjax"], ["W1", "W2"], ["fedavg", "scaffold"]))
    assert [run.label for run in runs[:5]] == ["jaxfed", "pfl", "drjax", "jaxfed", "pfl"]
    assert [run.algorithm for run in runs[3:8]] == ["scaffold", "scaffold", "fedavg", "fedavg", "fedavg"]
    assert runs[8].label == "pfl"
    path.write_text(json.dumps(line(0, "jaxfed", 1.0)) + "\n" + json.dumps(line(0, "pfl", 1.0))[:40])
    assert sweep.done(path) == {runs[0].key}
    assert path.read_text().count("\n") == 1
    assert sweep.done(tmp_path / "absent.jsonl") == set()


def precision_line(seed, precision, accuracy, seconds):
    machine = {"cpu": "one", "cores": 2, "memory_gb": 8}
    about = {"model": "softmax", "seed": seed, "precision": precision, "machine": machine, "versions": {"jax": "0"}}
    return about | {"accuracy": accuracy, "round_s": seconds, "rss_mb": 100.0}


def test_points_and_ratios_of_a_precision_are_taken_within_a_seed(load):
    precision = load("precision")
    lines = [precision_line(0, "float32", 0.5, 1.0), precision_line(1, "float32", 0.7, 2.0)]
    lines += [precision_line(0, "bfloat16 products", 0.51, 3.0), precision_line(1, "bfloat16 products", 0.69, 4.0)]
    text = precision.page([*lines, precision_line(2, "bfloat16 products", 0.1, 9.0)], "some")
    expected = "60.00 | +0.00 (-1.00 to +1.00) | 3.5000 | 2.50 (2.00 to 3.00) | 100 | 2 |"
    assert f"| softmax | bfloat16 products | {expected}" in text


def writers():
    """Three writers of 62 letters' images, one row in four for testing."""
    rng = np.random.default_rng(0)
    arrays = {"x": rng.integers(0, 256, (24, 28, 28)).astype(np.uint8), "y": rng.integers(0, 62, 24).astype(np.int32)}
    return arrays, np.arange(24) % 3


@pytest.mark.parametrize("model", ["softmax", "lenet"])
def test_precisions_begin_alike_and_do_what_they_are_called(load, monkeypatch, model):
    import jaxfed

    precision = load("precision")
    monkeypatch.setattr(precision, "COHORT", 2)
    train = jaxfed.FederatedData.from_arrays(*writers())
    states = {}
    for name in precision.PRECISIONS:
        simulation = precision.make_simulation(model, name, train)
        begin = precision.first_state(simulation, name, 0)
        states[name] = begin, simulation.run(begin, rounds=1)[0]
    wide, half, narrow = states.values()
    for a, b, c in zip(*(jax.tree.leaves(begin.params) for begin, _ in states.values())):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, np.asarray(c, np.float32), rtol=2**-8, atol=1e-30)
    types = [jax.tree.leaves(end.params)[0].dtype.name for _, end in (wide, half, narrow)]
    assert types == ["float32", "float32", "bfloat16"]
    apart = [np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in zip(*(jax.tree.leaves(s[1].params) for s in (wide, half)))]
    assert 0 < max(apart) < 0.05


def test_femnist_is_read_as_ink_on_paper(load, tmp_path):
    arrays, client = writers()
    path = tmp_path / "femnist_leaf" / "femnist_leaf155.npz"
    path.parent.mkdir()
    np.savez(path, **arrays, client=client, is_test=np.arange(24) % 4 == 0)
    train, test = load("precision").load(tmp_path)
    assert (train.num_clients, train.num_examples, test.num_examples) == (3, 18, 6)
    np.testing.assert_array_equal(train.arrays["x"][0], 255 - arrays["x"][3])


def test_a_sweep_ends_where_the_runs_end(load, small):
    sweeping = load("sweeping")
    for kind in sweeping.KINDS:
        rates, seeds = sweeping.axes(kind)
        assert len(set(rates)) * len(set(seeds)) == 16
    both = sweeping.ways(small, "grid", 1)
    side_by_side, one_by_one = both["sweep"](), both["runs"]()
    assert side_by_side.keys() == one_by_one.keys() == {(r, s) for r in (0.01, 0.0125, 0.015, 0.0175) for s in range(4)}
    for setting, params in one_by_one.items():
        for key in params:
            np.testing.assert_allclose(side_by_side[setting][key], params[key], atol=2e-6)


def test_ratios_of_a_sweep_are_taken_within_a_process(load):
    def line(repeat, sweep, runs):
        seconds = {"sweep_warm_s": sweep, "runs_warm_s": runs, "sweep_cold_s": 2 * sweep, "runs_cold_s": runs}
        machine = {"cpu": "one", "cores": 2, "memory_gb": 8}
        return {"kind": "grid", "rounds": 5, "repeat": repeat, "machine": machine, "versions": {"jax": "0"}} | seconds

    text = load("sweeping").page([line(0, 1.0, 4.0), line(1, 3.0, 4.0), line(2, 2.0, 4.0)], "some")
    assert "| grid | 2.00 | 4.00 | 0.50 (0.25 to 0.75) | 4.00 | 4.00 | 1.00 (0.50 to 1.50) |" in text


def test_a_scaling_point_reports_what_it_ran(load):
    scaling = load("scaling")
    found = {what: len(scaling.points([what])) for what in ("cohort", "population", "devices")}
    assert found == {"cohort": 6, "population": 2 * 2 * 3, "devices": 2}
    point = scaling.points(["population"])[6] | {"population": 20, "cohort": 5}
    line = scaling.measure(point, 2)
    assert point["algorithm"] == "scaffold"
    assert line["clients_per_s"] == pytest.approx(5 / line["round_s"], rel=0.02)
    assert line["kept_mb"] == round(20 * 4 * (10 * 10 + 10) / 2**20, 1)


def test_populations_take_turns(load, monkeypatch):
    scaling = load("scaling")
    monkeypatch.setattr(scaling, "POPULATIONS", (10, 20))
    point = scaling.points(["population"])[0] | {"cohort": 5}
    # Five calls of ten rounds for each population, in turn, then five of one.
    seconds = iter([10, 90, 20, 80, 30, 70, 40, 60, 50, 50, 1, 9, 2, 8, 3, 7, 4, 6, 5, 5])
    monkeypatch.setattr(scaling, "_seconds_of", lambda call: next(seconds))
    assert scaling.take_turns(point, 1) == {"in_turn_s": [3, 7], "one_in_turn_s": [3, 7]}


def test_scaling_goes_on_where_it_was_killed_and_draws(load, tmp_path):
    scaling, path = load("scaling"), tmp_path / "some.jsonl"
    [first, *_] = scaling.points(["cohort"])
    measured = {"clients_per_s": 10.0, "rss_mb": 100.0, "machine": {"cpu": "one", "cores": 2, "memory_gb": 8}}
    path.write_text(json.dumps(first | measured) + "\n" + json.dumps(first)[:20])
    assert scaling.read_lines(path) == [first | measured]
    assert path.read_text().count("\n") == 1
    scaling.draw([first | measured], tmp_path / "some.png")
    assert (tmp_path / "some.png").stat().st_size > 10_000


@pytest.mark.parametrize(("plain", "expected"), [(2.24216, True), (2.2423, False)])
def test_agreement_is_to_four_decimals(load, monkeypatch, plain, expected):
    agree = load("agree")
    data, loss = agree.EXPECTED["W1"]
    losses = {"jaxfed": loss - 3e-5, "plain_jax": plain}
    monkeypatch.setattr(agree, "line_of", lambda environment, *_: {"loss": losses[environment], "data": data})
    assert agree.agrees("W1", "float32") == expected
    assert not agree.agrees("W1", "float64")


def test_hot_parts_are_those_of_today(load):
    """They need pytest-benchmark to run, and none to be loaded."""
    for path in sorted((FOLDER / "hot").glob("test_*.py")):
        load(f"hot.{path.stem}")
    fold = load("hot.test_lanes").fold
    table = jax.numpy.zeros((200, 3))
    total, kept, outcome = fold(10, 200, table)
    assert total.tolist() == [100] * 610
    np.testing.assert_array_equal(kept[::2], 1)
    np.testing.assert_array_equal(kept[1::2], 0)
    assert outcome.counts.all()
