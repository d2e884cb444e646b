"""Runs that stop early and keep their best model, against runs of chosen lengths; test_kill.py kills them.

The run of these tests overfits: its loss falls up to round 8, but for round 6, and rises from there.
"""

import json
import os

import jax
import numpy as np
import pytest
from run.test_training import complete, start, stop_after

from jaxfed.run import build
from jaxfed.run.cli import main
from jaxfed.run.client_curves import read_client_curves
from jaxfed.run.history import read_history
from jaxfed.run.sweeping import SweepRun
from jaxfed.run.training import Run, RunConfig, load, load_best
from jaxfed.stopping import EarlyStopping

STOP = {"metric": "loss", "patience": 2, "tolerance": 0.001}
FILES = ("history.jsonl", "client_curves.npy", "clients.csv", "result.json")


@pytest.fixture
def stopping(table):
    """The table of a run that stops early."""
    table["run"] |= {"rounds": 30, "stop": STOP}
    return table


@pytest.fixture
def stopped(stopping, tmp_path):
    """The folder of one that was never interrupted."""
    return complete(start(stopping, tmp_path / "stopped"))


def weights(state):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves((state.params, state.kept))]


def length(table, tmp_path, rounds):
    """The folder of a run of so many rounds that neither stops nor keeps a best model."""
    table = table | {"run": {key: value for key, value in table["run"].items() if key != "stop"}}
    return complete(start(table, tmp_path / f"of-{rounds}", rounds=rounds))


def test_it_stops_after_the_round_that_the_whole_history_says_and_keeps_the_best(stopping, stopped, tmp_path):
    whole = (length(stopping, tmp_path, 30) / "history.jsonl").read_text().splitlines(keepends=True)
    losses = {row["round"]: row["eval_loss"] for row in map(json.loads, whole) if "eval_loss" in row}
    best, last, stuck = np.inf, 0, 0
    for round, loss in losses.items():
        stuck = 0 if best - loss > 0.001 else stuck + 1
        best, last = min(best, loss), round
        if stuck == 2:
            break
    best_round = next(round for round, loss in losses.items() if loss == best)
    assert best_round < last < 30
    assert (stopped / "history.jsonl").read_text() == "".join(whole[:last])
    result = json.loads((stopped / "result.json").read_text())
    assert result["rounds"] == last
    assert result["best"] == {"round": best_round, "metric": "loss", "value": best}
    reason = "loss has not improved by more than 0.001 for 2 evaluations"
    assert result["early_end"] == f"stopped after round {last} of 30, as {reason}"
    _, built, state = load_best(stopped)
    assert weights(state) == weights(load(length(stopping, tmp_path, best_round))[2])
    assert built.simulation.evaluate(state, built.test).metrics["loss"] == best


@pytest.mark.parametrize("calls", [1, 3, 4])
def test_a_resumed_run_stops_at_the_same_round(stopping, stopped, calls):
    path = complete(Run.resume(stop_after(start(stopping), calls)))
    assert all((path / name).read_bytes() == (stopped / name).read_bytes() for name in FILES)
    assert sorted(os.listdir(path / "checkpoints")) == sorted(os.listdir(stopped / "checkpoints"))
    assert weights(load_best(path)[2]) == weights(load_best(stopped)[2])


def test_a_stopped_run_is_finished_and_goes_on_with_more_patience(stopping, stopped, tmp_path):
    with pytest.raises(ValueError, match=r"is finished: it stopped after round 12 of 30.* raise run\.stop\.patience"):
        Run.resume(stopped)
    text = (stopped / "config.toml").read_text()
    (stopped / "config.toml").write_text(text.replace("patience = 2", "patience = 4"))
    stopping["run"]["stop"] = STOP | {"patience": 4}
    longer = complete(start(stopping, tmp_path / "longer"))
    complete(Run.resume(stopped))
    assert all((stopped / name).read_bytes() == (longer / name).read_bytes() for name in FILES)
    (stopped / "config.toml").write_text(text.replace('metric = "loss"', 'metric = "accuracy"'))
    with pytest.raises(ValueError, match=r"config\.toml was changed since the run began"):
        Run.resume(stopped)


def test_a_checkpoint_comes_with_each_best_evaluation_and_stays(table):
    table["run"] |= {"rounds": 16, "best": "loss", "checkpoint_every": 12}
    path = complete(start(table))
    assert sorted(os.listdir(path / "checkpoints")) == ["00000008", "00000012", "00000016"]


def test_whoever_goes_back_finds_the_best_of_that_time(table):
    table["run"] |= {"rounds": 8, "best": "loss"}
    path = complete(start(table))
    assert sorted(os.listdir(path / "checkpoints")) == ["00000004", "00000006", "00000008"]
    assert int(load_best(path)[2].round) == 8
    (path / "checkpoints" / "00000008" / "manifest.json").write_text("")
    (path / "result.json").unlink()
    with pytest.warns(UserWarning, match=r"Going back to round 6\."):
        assert int(load_best(path)[2].round) == 4
    with pytest.warns(UserWarning, match=r"Going back to round 6\."):
        complete(Run.resume(path))
    assert int(load_best(path)[2].round) == 8


def test_personal_models_are_watched_as_they_are_used(table):
    algorithm = {"name": "ditto", "lrate": 0.3, "batch_size": 4, "strength": 0.1}
    table["run"] |= {"rounds": 16, "stop": {"metric": "loss_worst_decile", "patience": 3}}
    path = complete(start(table | {"algorithm": algorithm}))
    curves = read_client_curves(path)
    by_hand = [np.percentile(values, 90) for values in curves.metrics["loss"].astype(float)]
    best = json.loads((path / "result.json").read_text())["best"]
    assert best["round"] == curves.rounds[np.argmin(by_hand)]
    assert best["value"] == pytest.approx(min(by_hand), rel=1e-6)
    _, built, state = load_best(path)
    found = built.simulation.evaluate_personal(state, built.test).by_client["loss"]
    np.testing.assert_array_equal(found.astype(np.float32), curves.metrics["loss"][np.argmin(by_hand)])


def test_the_curves_are_what_each_client_was_evaluated_at(table, tmp_path):
    path = complete(start(table))
    curves = read_client_curves(path)
    assert curves.rounds.tolist() == [2, 4, 6]
    for number, round in enumerate(curves.rounds):
        _, built, state = load(length(table, tmp_path, int(round)))
        for name, values in built.simulation.evaluate(state, built.test).by_client.items():
            np.testing.assert_array_equal(curves.metrics[name][number], values.astype(np.float32))
    lines = (path / "clients.csv").read_text().splitlines()
    assert lines[0].split(",")[3:] == sorted(curves.metrics)
    np.testing.assert_allclose([float(line.split(",")[4]) for line in lines[1:]], curves.metrics["loss"][-1], rtol=1e-6)


def test_damaged_and_missing_curves_are_told(table, tmp_path):
    path = stop_after(start(table), 2)
    (path / "client_curves.npy").write_bytes((path / "client_curves.npy").read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"client_curves\.npy was cut short or altered"):
        read_client_curves(path)
    with pytest.warns(UserWarning, match=r"client_curves\.npy was cut short.* Going back to round 2"):
        Run.resume(path).__exit__()
    never = complete(start(table, tmp_path / "never", eval_every=0))
    with pytest.raises(ValueError, match=r"was not evaluated yet; run\.eval_every says when it is"):
        read_client_curves(never)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"best": "acuracy"}, r"run\.best: No evaluated metric is called 'acuracy'\. Did you mean 'accuracy'\?"),
        ({"stop": {"metric": "eval_loss"}}, r"run\.stop\.metric: No evaluated metric is called 'eval_loss'"),
        ({"stop": {"metric": "loss", "patience": 0}}, r"run\.stop\.patience: expected an integer at least 1, got 0"),
        ({"stop": {"metric": "loss", "tolerance": -1}}, r"run\.stop\.tolerance: expected a finite number at least 0, got -1"),
        ({"stop": {}}, r"run\.stop\.metric is missing\. \[run\.stop\] names a metric"),
        ({"stop": {"metric": "loss"}, "eval_every": 0}, r"run\.stop: expected a run that is evaluated, got run\.eval_every = 0"),
        ({"best": "loss", "eval_every": 0}, r"run\.best: expected a run that is evaluated"),
    ],
)
def test_what_cannot_be_watched_is_refused_before_anything_is_written(table, tmp_path, changes, text):
    with pytest.raises(ValueError, match=text):
        start(table, **changes)
    assert not (tmp_path / "run").exists()


def test_a_sweep_neither_stops_nor_keeps_a_best_model(table, tmp_path):
    table["run"]["best"] = "loss"
    with pytest.raises(ValueError, match=r"run\.best: expected none for a sweep"):
        SweepRun.start(RunConfig.from_dict(table), ["seed=0:2"], tmp_path / "sweep")


def run_by_command(table, tmp_path, monkeypatch):
    """Trains with no compilation cache, and lines wide enough for whole sentences."""
    monkeypatch.setattr("jaxfed.run.commands.use_compilation_cache", lambda: None)
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "run.toml").write_text(RunConfig.from_dict(table).to_toml())
    assert main(["run", str(tmp_path / "run.toml")]) == 0


def test_the_command_says_why_it_stopped_and_takes_the_best(stopping, tmp_path, capsys, monkeypatch):
    run_by_command(stopping, tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert "The run stopped after round 12 of 30, as loss has not improved by more than 0.001 for 2 evaluations." in said
    best = next(row for row in read_history(tmp_path / "run" / "history.jsonl") if row["round"] == 8)
    assert f"Best loss {best['eval_loss']:.4g} after round 8:  jaxfed evaluate {tmp_path / 'run'} --best" in said
    assert main(["evaluate", str(tmp_path / "run"), "--best"]) == 0
    said = capsys.readouterr().out
    assert "After 8 rounds, on the test rows" in said
    assert f"{best['eval_loss']:.4g}" in said
    assert main(["export", str(tmp_path / "run"), "--best"]) == 0
    assert main(["plot", str(tmp_path / "run"), "--clients"]) == 0
    assert (tmp_path / "run" / "clients.png").read_bytes().startswith(b"\x89PNG")
    other = str(tmp_path / "other")
    assert (
        main(["run", str(tmp_path / "run.toml"), "--set", "run.stop=none", "--set", "run.rounds=2", "--set", f"run.out={other}"])
        == 0
    )
    assert main(["evaluate", other, "--best"]) == 2
    assert "has kept no best model: it was not asked to. A run with  --set run.best=accuracy  does." in capsys.readouterr().err


# ---- validation rows


@pytest.fixture
def validated(stopping):
    """The table of a run that stops by validation rows."""
    stopping["data"]["valid_fraction"] = 0.25
    return stopping


def test_validation_rows_are_of_the_training_rows_alone(table):
    table["data"]["valid_fraction"] = 0.25
    built, before = (build.build(RunConfig.from_dict(table | {"data": data})) for data in (table["data"], without(table)))
    train, valid, test = built.simulation.data, built.valid, built.test
    np.testing.assert_array_equal(test.arrays["x"], before.test.arrays["x"])
    assert before.valid is None
    assert built.digest == before.digest
    # Of 8 rows 2 are for testing, and of the 6 others floor(0.75 * 6) = 4 stay for training.
    assert [data.sizes.tolist() for data in (train, valid, test)] == [[4] * 5, [2] * 5, [2] * 5]
    for client in range(5):
        rest = before.simulation.data.client(client)["x"]
        parted = np.concatenate([train.client(client)["x"], valid.client(client)["x"]])
        np.testing.assert_array_equal(np.sort(parted, axis=0), np.sort(rest, axis=0))


def without(table):
    return {key: value for key, value in table["data"].items() if key != "valid_fraction"}


def test_without_test_rows_training_rows_are_evaluated_and_others_watched(table):
    table["data"] |= {"test_fraction": 0, "valid_fraction": 0.25}
    built = build.build(RunConfig.from_dict(table))
    assert built.test is built.simulation.data
    assert (built.test.num_examples, built.valid.num_examples) == (30, 10)


def test_a_run_stops_by_its_validation_rows_and_reports_its_test_rows(validated, tmp_path):
    """By hand from a run of the same config that never stops: the rule over the validation losses says when and what."""
    run = {key: value for key, value in validated["run"].items() if key != "stop"}
    whole = complete(start(validated | {"run": run}, tmp_path / "whole"))
    lines = (whole / "history.jsonl").read_text().splitlines(keepends=True)
    losses = {row["round"]: row["valid_loss"] for row in map(json.loads, lines) if "valid_loss" in row}
    assert list(losses) == list(range(2, 31, 2))
    last = EarlyStopping("loss", patience=2, tolerance=0.001)
    end = next(round for round, loss in losses.items() if last.observe(round, loss))
    path = complete(start(validated))
    assert (path / "history.jsonl").read_text() == "".join(lines[:end])
    result = json.loads((path / "result.json").read_text())
    assert (result["rounds"], result["early_end"][:19]) == (end, f"stopped after round {end}"[:19])
    assert result["best"] == {"round": last.best.round, "metric": "loss", "value": last.best.value, "rows": "validation"}
    _, built, state = load_best(path)
    assert built.simulation.evaluate(state, built.valid).metrics["loss"] == last.best.value
    assert result["loss"] == json.loads(lines[end - 1])["eval_loss"] != losses[end]


def test_the_test_rows_have_no_say(validated, tmp_path):
    """With other labels on the test rows alone, a run stops at the same round with the same weights."""
    first = complete(start(validated, tmp_path / "first"))
    config = RunConfig.from_dict(validated | {"run": validated["run"] | {"out": str(tmp_path / "second")}})
    with Run.start(config) as run:
        wrong = run.built.test.map(lambda rows: rows | {"y": 2 - rows["y"]})
        run.built = run.built._replace(test=wrong)
        list(run.train())
        run.finish()
    assert weights(load_best(tmp_path / "second")[2]) == weights(load_best(first)[2])
    one, other = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("first", "second"))
    assert (one["rounds"], one["best"]) == (other["rounds"], other["best"])
    assert one["loss"] != other["loss"]


@pytest.mark.parametrize("calls", [1, 3])
def test_a_resumed_run_stops_by_the_same_validation_rows(validated, tmp_path, calls):
    never = complete(start(validated, tmp_path / "never"))
    path = complete(Run.resume(stop_after(start(validated), calls)))
    assert all((path / name).read_bytes() == (never / name).read_bytes() for name in FILES)


def test_validation_rows_that_cannot_be_are_refused(table, tmp_path):
    table["data"] |= {"test_fraction": 0.8, "valid_fraction": 0.5}
    with pytest.raises(ValueError, match=r"data\.valid_fraction: every client has one training row, which leaves none to valid"):
        start(table)
    table["data"] |= {"test_fraction": 0.25, "valid_fraction": 1}
    with pytest.raises(ValueError, match=r"data\.valid_fraction: expected a finite number at least 0 and below 1, got 1"):
        start(table)
    table["data"]["valid_fraction"] = 0.25
    with pytest.raises(ValueError, match=r"data\.valid_fraction: expected none for a sweep"):
        SweepRun.start(RunConfig.from_dict(table), ["seed=0:2"], tmp_path / "sweep")


def test_the_command_evaluates_on_validation_rows(validated, tmp_path, capsys, monkeypatch):
    run_by_command(validated, tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert "20 training and 10 test rows, 10 more for validation" in said
    best = json.loads((tmp_path / "run" / "result.json").read_text())["best"]
    assert f"Best loss {best['value']:.4g} on the validation rows after round {best['round']}" in said
    assert main(["evaluate", str(tmp_path / "run"), "--best", "--split", "valid"]) == 0
    said = capsys.readouterr().out
    assert f"After {best['round']} rounds, on the valid rows" in said
    assert f"{best['value']:.4g}" in said
    other = str(tmp_path / "other")
    settings = ("data.valid_fraction=none", "run.rounds=2", f"run.out={other}")
    assert main(["run", str(tmp_path / "run.toml"), *(word for one in settings for word in ("--set", one))]) == 0
    assert main(["evaluate", other, "--split", "valid"]) == 2
    assert "--split valid: the run has no validation rows." in capsys.readouterr().err
