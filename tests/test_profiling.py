"""Profiles against counts by hand: operations, local steps, collectives; and what is said to limit a run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine.oracle import SIZES, Planned, flat, softmax_data, softmax_loss, softmax_params

import jaxfed
from jaxfed import Simulation, profile_rounds, profiling
from jaxfed.bottleneck import Shares, Work, sentence_of, work_of
from jaxfed.costs import Collective, collectives, cost_of, measure_peak, process_memory
from jaxfed.engine.mesh import make_devices
from jaxfed.profiling import _Paced, _with_selector
from jaxfed.reports import RoundReport
from jaxfed.run import commands
from jaxfed.run.cli import main
from jaxfed.run.config import RunConfig

SIDE = 64


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "Console", lambda **options: commands_console(width=300, **options))
    table = {
        "run": {"rounds": 3, "seed": 3, "eval_every": 2},
        "data": {"name": "digits", "partition": {"name": "iid", "clients": 6}},
        "model": {"name": "logistic-regression"},
        "algorithm": {"name": "fedavg", "lrate": 0.1, "batch_size": 50},
        "simulation": {"cohort_size": 2},
    }
    (tmp_path / "digits.toml").write_text(RunConfig.from_dict(table).to_toml())
    return str(tmp_path / "digits.toml")


commands_console = commands.Console


def linear_loss(params, batch, key):
    return jnp.square(batch["x"] @ params).sum(1)


def profile(algorithm, data, params, cohort_size=None, **options):
    simulation = Simulation(algorithm, data, cohort_size, chunk=2, **options)
    return profile_rounds(simulation, simulation.init(params, key=jax.random.key(0)), repetitions=1)


def square_data(clients=6):
    x = np.random.default_rng(0).normal(size=(2 * clients, SIDE)).astype(np.float32)
    return jaxfed.FederatedData.from_arrays({"x": x}, np.arange(2 * clients) // 2)


def test_operations_of_logistic_regression_by_hand():
    batch, features, classes = 64, 50, 10
    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(256, features)).astype(np.float32), "y": rng.integers(0, classes, 256)}
    data = jaxfed.FederatedData.from_arrays(arrays, np.arange(256) // 128)
    params = {"bias": jnp.zeros(classes), "weight": jnp.zeros((features, classes))}
    found = profile(jaxfed.fedavg(softmax_loss, lrate=0.1, batch_size=batch), data, params)

    # Logits and the gradient of the weights are a matrix product each; the weights are scaled and added.
    products, update = 4 * batch * features * classes, 2 * features * classes
    softmax = 20 * batch * classes
    assert products + update <= found.step.flops <= products + update + softmax
    assert found.work.steps == 4
    # The server scales and subtracts, tests for nobody and casts: a few operations for each weight.
    assert features * classes <= found.server.flops <= 10 * (features + 1) * classes
    assert found.cost.flops == 4 * found.step.flops + found.server.flops
    assert found.peak.flops > 1e8
    assert found.peak.bytes > 1e7
    assert found.flops_fraction >= 0
    assert sum(found.seconds.values()) > 0
    assert all(seconds > 0 for seconds in found.compiling.values())
    assert found.placing["bytes"] == data.arrays["x"].nbytes + 4 * 256


def test_steps_too_short_to_be_told_from_noise_have_no_fraction(monkeypatch):
    whole = profiling._parts
    monkeypatch.setattr(profiling, "_parts", lambda times: whole(times) | {"local steps": 0.0})
    found = profile(jaxfed.fedavg(linear_loss, lrate=0.1, batch_size=2), square_data(), jnp.zeros((SIDE, SIDE)))
    assert (found.flops_fraction, found.bytes_fraction) == (0, 0)


def test_a_scan_inside_the_model_counts_as_often_as_it_runs():
    def loss(weights, x):
        state = jax.lax.scan(lambda h, row: (jnp.tanh(h @ weights + row), None), jnp.zeros((8, 16)), x)[0]
        return state.sum()

    found = cost_of(jax.grad(loss), jnp.ones((16, 16)), jnp.ones((20, 8, 16)))
    # One product forward, two backward, of 8 x 16 x 16 in each of 20 steps; the rest is elementwise.
    products = 3 * 2 * 20 * 8 * 16 * 16
    assert products <= found.flops <= 1.3 * products


def test_steps_of_ragged_clients():
    by_hand = 2 * sum(-(-int(size) // 4) for size in SIZES)
    algorithm = jaxfed.fedavg(softmax_loss, lrate=0.1, batch_size=4, epochs=2)
    found = profile(algorithm, softmax_data(dtype=np.float32), softmax_params(np.float32), lanes=1)
    assert (found.work.steps, found.work.longest, found.work.executed) == (by_hand,) * 3
    assert found.work.imbalance == 1


def test_work_is_dealt_like_cards():
    # Devices get 8, 3, 2 and 5, 4; two lanes of one device wait 8 + 4 + 2 steps.
    steps = np.array([3.0, 8.0, 5.0, 4.0, 2.0])
    report = RoundReport(1, np.arange(5), np.ones(5, bool), {"steps": steps}, 0.0)
    assert work_of([report], 2, 1) == Work(22, 13, 11, 22)
    assert work_of([report], 1, 2) == Work(22, 14, 14, 28)
    assert work_of([report], 2, 1).imbalance == pytest.approx(13 / 11)
    idle = RoundReport(1, np.arange(1), np.zeros(1, bool), {"steps": np.zeros(1)}, 0.0)
    assert (work_of([idle], 2, 1).imbalance, work_of([idle], 2, 1).used) == (1, 1)


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_collectives_of_a_split_server(devices):
    algorithm = jaxfed.fedavg(linear_loss, lrate=0.1, batch_size=2)
    found = profile(algorithm, square_data(), jnp.zeros((SIDE, SIDE)), devices=devices).collectives
    size = 4 * SIDE * SIDE
    if devices == 1:
        assert found == {}
    elif devices == 2:  # each device has the sum of its half, and gathers the new weights
        assert found["reduce-scatter"] == found["all-gather"] == Collective(1, size)
        assert found["all-reduce"].bytes < size
    else:  # 64 rows do not divide
        assert found["all-reduce"].bytes >= size
        assert "reduce-scatter" not in found


def test_a_median_exchanges_coordinates():
    algorithm = jaxfed.fedavg(linear_loss, lrate=0.1, batch_size=2).replace(aggregator=jaxfed.Median())
    found = profile(algorithm, square_data(4), jnp.zeros((SIDE, SIDE)), devices=2, lanes=1).collectives
    # Two clients on each device.
    assert found["all-to-all"].bytes == 2 * 4 * SIDE * SIDE


def test_collectives_are_read_from_any_text():
    text = """
      %a = (f32[4,3]{1,0}, bf16[8]{0}) all-reduce(%x, %y), to_apply=%sum
      %b = f32[2]{0} reduce-scatter(%x), dimensions={0}
      %c = (f32[2]{0}, f32[6]{0}) all-gather-start(%x), dimensions={0}
      %d = f32[6]{0} all-gather-done(%c)
      %e = pred[] all-reduce(%p), to_apply=%or
      %f = f32[6]{0} add(%all-reduce.1, %d)
    """
    assert collectives(text, 3) == {
        "all-reduce": Collective(2, 48 + 16 + 1),
        "reduce-scatter": Collective(1, 24),
        "all-gather": Collective(1, 24),
    }


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("paged", [None, True])
def test_profiling_changes_nothing(paged):
    algorithm = jaxfed.scaffold(softmax_loss, lrate=0.1, batch_size=4, option="I")
    simulation = Simulation(algorithm, softmax_data(), 5, lanes=2, chunk=2, paged=paged)
    state, _ = simulation.run(simulation.init(softmax_params(), key=jax.random.key(0)), rounds=2)
    expected, _ = simulation.run(state, rounds=3)
    found = profile_rounds(simulation, state, rounds=3, repetitions=1)
    after, _ = simulation.run(state, rounds=3)
    np.testing.assert_array_equal(flat(after.params), flat(expected.params))
    assert (found.rounds, found.setting["paged"], found.setting["chunk"]) == (3, bool(paged), 1 if paged else 2)


@pytest.mark.usefixtures("x64")
def test_a_cohort_without_work_takes_no_step():
    algorithm = jaxfed.fedavg(softmax_loss, lrate=0.1, batch_size=4)
    selector = Planned(np.array([[0, 3, 4], [5, 1, 9]]), np.array([[1.0, 0.5, 1.0], [1.0, 1.0, 1.0]]))
    simulation = Simulation(algorithm, softmax_data(), selector=selector)
    state = simulation.init(softmax_params(), key=jax.random.key(0))
    plain, _ = simulation.run(state, rounds=2)
    whole, _ = _with_selector(simulation, _Paced(selector, 1.0)).run(state, rounds=2)
    idle, reports = _with_selector(simulation, _Paced(selector, 0.0)).run(state, rounds=2)
    np.testing.assert_array_equal(flat(whole.params), flat(plain.params))
    np.testing.assert_array_equal(flat(idle.params), flat(state.params))
    assert reports["steps"].tolist() == [0, 0]


@pytest.mark.parametrize("recipe", [jaxfed.mime, jaxfed.ditto, jaxfed.pfedme])
def test_recipes_with_surveys_and_models_of_their_own(recipe):
    algorithm = recipe(softmax_loss, lrate=0.1, batch_size=4)
    # Evaluation of personal models takes a key from an array in a loop, where the check for reuse cannot tell keys apart.
    with jax.debug_key_reuse(False):
        found = profile(algorithm, softmax_data(dtype=np.float32), softmax_params(np.float32), 4, devices=2, lanes=1)
    # At least the products of one batch, for each weight.
    assert found.step.flops >= 4 * 4 * 4 * 3
    assert found.work.steps > 0


EVEN = Work(10, 10, 10, 10)


def shares(work=EVEN, once=None, flops=0.1, traffic=0.1, working_set=0.0, paged=False, **seconds):
    names = {"local": "local steps", "aggregation": "selection and aggregation", "server": "server step"}
    parts = dict.fromkeys((*names.values(), "call", "host"), 0.001)
    parts |= {names.get(name, name): value for name, value in seconds.items()}
    return Shares(parts, once or {}, work, flops, traffic, working_set, paged)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (shares(local=1.0, flops=0.6), "Arithmetic limits"),
        (shares(local=1.0, traffic=0.9, working_set=1e9), "Memory traffic limits"),
        # What fits into caches is not read from memory.
        (shares(local=1.0, traffic=0.9, working_set=1e5), "Slow operations limit"),
        (shares(local=0.005), "many small operations limits"),
        (shares(local=1.0, work=Work(40, 30, 10, 40)), "Waiting for the longest clients limits a round: 66% of its time"),
        (shares(local=1.0, work=Work(20, 10, 10, 80)), "Waiting lanes limit"),
        (shares(aggregation=1.0), "Selection and aggregation limit"),
        (shares(server=1.0), "The server's step limits"),
        (shares(host=1.0), "The host between compiled calls limits"),
        (shares(host=1.0, paged=True), "Data travelling from the host limit"),
        (shares(local=0.005, once={"compile": 1.0}), "Compiling limits"),
        (shares(local=0.005, once={"evaluation": 1.0}), "Evaluation limits"),
        (shares(local=0.005, once={"placing": 1.0}), "Placing the data on the devices limits"),
    ],
)
def test_the_largest_share_limits(given, said):
    assert said in sentence_of(given)
    assert sentence_of(given).endswith("would help.")


def test_peak_of_several_devices():
    found = measure_peak(make_devices(jax.devices()[:2]), repetitions=1)
    assert found.flops > 1e8
    assert found.bytes > 1e7
    assert (process_memory() or 2**30) > 2**20


def test_the_command_says_what_limits_and_writes_a_file(config, tmp_path, capsys, monkeypatch):
    """On the devices of a run, which commands make."""
    out, made = tmp_path / "profile.json", []
    monkeypatch.setattr(commands, "make_devices", made.append)
    assert main(["profile", config, "--rounds", "2", "--repetitions", "1", "--out", str(out)]) == 0
    assert made == [None]
    said = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["limit"] in said
    assert found["limit"].endswith("would help.")
    assert "local steps" in said
    assert "compiling: xla" in said
    # Each client has some 240 training rows, which are 5 batches of 50; two clients take part.
    assert found["work"]["steps"] == 10
    assert set(found["seconds"]) == {"local steps", "selection and aggregation", "server step", "call", "host"}
    assert found["memory"]["peak"] > 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--rounds", "0"], "rounds: expected an integer at least 1, got 0."),
        (["--repetitions", "0"], "repetitions: expected an integer at least 1, got 0."),
        (["--out", "nowhere/profile.json"], "--out nowhere/profile.json: expected a file in a folder that exists"),
        (["--set", "algorithm.lrate=fast"], "algorithm.lrate"),
    ],
)
def test_wrong_input_of_the_command(config, more, said, capsys):
    assert main(["profile", config, *more]) == 2
    assert said in capsys.readouterr().err


def test_wrong_input():
    simulation = Simulation(jaxfed.fedavg(softmax_loss, lrate=0.1, batch_size=4), softmax_data())
    state = simulation.init(softmax_params(np.float32), key=jax.random.key(0))
    with pytest.raises(TypeError, match="simulation: expected Simulation"):
        profile_rounds(simulation.algorithm, state)
    with pytest.raises(TypeError, match=r"state: expected RunState.*Make it with simulation.init"):
        profile_rounds(simulation, state.params)
    with pytest.raises(ValueError, match="eval_every: expected an integer at least 0, got -1"):
        profile_rounds(simulation, state, eval_every=-1)
    with pytest.raises(ValueError, match="planned: expected an integer at least 1, got 0"):
        profile_rounds(simulation, state, planned=0)
