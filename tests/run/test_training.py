"""Runs in their folders, stopped and resumed in one process; test_kill.py kills them."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from jaxfed.run import training
from jaxfed.run.config import RunConfig
from jaxfed.run.training import Run, load


def start(table, out=None, **changes):
    run = table["run"] | changes | ({} if out is None else {"out": str(out)})
    return Run.start(RunConfig.from_dict(table | {"run": run}))


def complete(run):
    """Trains to the end and returns the folder."""
    with run:
        list(run.train())
        run.finish()
    return run.folder.path


def stop_after(run, calls):
    """Leaves a run after some compiled calls, as a process that ends without a word does."""
    with run:
        for _, _ in zip(range(calls), run.train()):
            pass
    return run.folder.path


def weights(path):
    _, _, state = load(path)
    return [np.asarray(x).tobytes() for x in jax.tree.leaves((state.params, state.server, state.kept, state.seen))]


@pytest.fixture
def whole(table, tmp_path):
    """The folder of a run that was never stopped."""
    return complete(start(table, tmp_path / "whole"))


def same(path, whole):
    for name in ("history.jsonl", "clients.csv", "result.json"):
        assert (path / name).read_bytes() == (whole / name).read_bytes(), name
    assert weights(path) == weights(whole)


def test_a_run_leaves_its_files(whole):
    written = ["client_curves.npy", "clients.csv", "config.toml", "history.jsonl", "result.json", "run.json", "timings.jsonl"]
    assert sorted(os.listdir(whole)) == sorted([".lock", "checkpoints", *written])
    rows = [json.loads(line) for line in (whole / "history.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["round"] for row in rows if "eval_accuracy" in row] == [2, 4, 6]
    result = json.loads((whole / "result.json").read_text())
    assert (result["rounds"], result["accuracy"]) == (6, rows[-1]["eval_accuracy"])
    assert len((whole / "clients.csv").read_text().splitlines()) == 6


def test_two_runs_of_one_config_write_the_same_bytes(table, whole, tmp_path):
    same(complete(start(table, tmp_path / "again")), whole)


def test_the_stored_config_runs_again_to_the_same_bytes(whole, tmp_path):
    config = RunConfig.read(whole / "config.toml", [f"run.out={tmp_path / 'again'}"])
    assert config.simulation.lanes == 3
    same(complete(Run.start(config)), whole)


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_a_resumed_run_is_the_one_that_was_never_stopped(table, whole, calls):
    path = stop_after(start(table), calls)
    run = Run.resume(path)
    assert run.done == 2 * calls
    same(complete(run), whole)


def test_rounds_after_the_checkpoint_are_cut_and_run_again(table, whole):
    path = stop_after(start(table, checkpoint_every=4), 3)
    shutil.rmtree(path / "checkpoints" / "00000006")
    with open(path / "history.jsonl", "a") as file:
        file.write('{"round": 7, "lo')
    run = Run.resume(path)
    assert run.done == 4
    assert len((path / "history.jsonl").read_text().splitlines()) == 4
    complete(run)
    assert (path / "history.jsonl").read_bytes() == (whole / "history.jsonl").read_bytes()


@pytest.mark.parametrize(("every", "rounds"), [(1, [3, 4]), (3, [4]), (100, [4])])
def test_checkpoints_come_at_the_end_of_a_call_and_at_the_end(table, every, rounds):
    path = complete(start(table, rounds=4, eval_every=3, checkpoint_every=every))
    stored = [int(name) for name in sorted(os.listdir(path / "checkpoints"))]
    assert stored == ([3, 4] if every <= 3 else [4])
    assert stored[-len(rounds) :] == rounds


def test_without_evaluation_only_the_end_is_evaluated(table):
    path = complete(start(table, eval_every=0))
    assert "eval_" not in (path / "history.jsonl").read_text()
    assert "accuracy_worst_decile" in (path / "result.json").read_text()


def test_a_finished_run_says_so_and_goes_on_with_more_rounds(table, whole, tmp_path):
    with pytest.raises(ValueError, match=r"is finished: it has done all its 6 rounds\..*--rounds 12"):
        Run.resume(whole)
    with pytest.raises(ValueError, match=r"--rounds 5: the run .* has done 6 rounds already\. Give 7 or more\."):
        Run.resume(whole, rounds=5)
    longer = complete(start(table, tmp_path / "longer", rounds=10))
    complete(Run.resume(whole, rounds=10))
    assert (longer / "history.jsonl").read_bytes() == (whole / "history.jsonl").read_bytes()


def test_a_run_that_died_before_its_result_is_finished(whole):
    result = (whole / "result.json").read_bytes()
    (whole / "result.json").unlink()
    complete(Run.resume(whole))
    assert (whole / "result.json").read_bytes() == result


def test_a_moved_folder_can_be_resumed(table, whole, tmp_path):
    path = stop_after(start(table), 1)
    same(complete(Run.resume(path.rename(tmp_path / "moved"))), whole)


def test_a_folder_that_exists_is_left_alone(table, whole):
    before = sorted((p, p.stat().st_mtime_ns) for p in whole.rglob("*"))
    with pytest.raises(FileExistsError, match=r"exists already\. Go on with  jaxfed resume .*--set run\.out=FOLDER"):
        start(table, whole)
    assert sorted((p, p.stat().st_mtime_ns) for p in whole.rglob("*")) == before


def test_nothing_is_made_for_a_config_that_cannot_run(table, tmp_path):
    table["algorithm"] = {"name": "fedavg", "lrate": {"*/scale": 0.1}, "batch_size": 4}
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match="no rate for"):
        start(table)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_folder_that_cannot_be_made_is_named(table, tmp_path):
    with pytest.raises(OSError, match=r"The run folder .*rows\.npz/run cannot be made: Not a directory\."):
        start(table, tmp_path / "rows.npz" / "run")


def test_two_processes_cannot_write_to_one_folder(table):
    with start(table) as run, pytest.raises(BlockingIOError, match="Another process is writing to"):
        Run.resume(run.folder.path)
    Run.resume(run.folder.path).__exit__()


def edit(name, old, new):
    def change(path):
        text = (path / name).read_text()
        assert old in text
        (path / name).write_text(text.replace(old, new, 1))

    return change


def cut(name):
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-20])


DAMAGED = [
    (edit("config.toml", "seed = 3", "seed = 4"), r"config\.toml was changed since the run began\. Undo the change"),
    (edit("config.toml", "lanes = 3", "lanes = 2"), r"config\.toml was changed"),
    (edit("config.toml", "rounds = 6", "rounds = -6"), r"run\.rounds: expected an integer at least 1, got -6"),
    (cut("config.toml"), r"config\.toml"),
    (lambda path: (path / "config.toml").unlink(), r"is not a run folder: it has no config\.toml"),
    (lambda path: (path / "run.json").unlink(), r"has no run\.json, which says how the run was started"),
    (cut("run.json"), r"run\.json, which says how the run was started, is cut short or altered"),
    (edit("run.json", '"jax": "', '"jax": "9'), r"run\.json, which says how the run was started, was altered"),
    (lambda path: (path / "run.json").write_text("[1]"), r"expected a table, got a list"),
    (lambda path: (path / "history.jsonl").unlink(), r"No checkpoint .*history\.jsonl was cut short"),
    (edit("history.jsonl", '"round": 1', '"round": 2'), r"No checkpoint .*history\.jsonl was altered"),
    (shutil.rmtree, "There is no run folder"),
]


@pytest.mark.parametrize(("damage", "text"), DAMAGED, ids=[text for _, text in DAMAGED])
def test_a_damaged_run_folder_gets_a_sentence(table, damage, text):
    path = stop_after(start(table), 1)
    damage(path)
    with pytest.raises((ValueError, TypeError), match=text):
        Run.resume(path)


def test_a_history_cut_short_leads_back_to_the_checkpoint_that_it_holds(table, whole):
    path = stop_after(start(table), 2)
    lines = (path / "history.jsonl").read_text().splitlines(keepends=True)
    (path / "history.jsonl").write_text("".join(lines[:3]))
    with pytest.warns(UserWarning, match=r"history\.jsonl was cut short.* Going back to round 2\."):
        run = Run.resume(path)
    same(complete(run), whole)


def test_data_that_changed_is_noticed(table, tmp_path):
    path = stop_after(start(table), 1)
    arrays = dict(np.load(tmp_path / "rows.npz"))
    np.savez(tmp_path / "rows.npz", **(arrays | {"x": -arrays["x"]}))
    with pytest.raises(ValueError, match=r"data: the data set 'npz' has changed since the run .* began"):
        Run.resume(path)


def test_a_checkpoint_of_another_run_is_passed_over(table, tmp_path):
    path, other = stop_after(start(table), 1), stop_after(start(table, tmp_path / "other", seed=4), 2)
    shutil.copytree(other / "checkpoints" / "00000004", path / "checkpoints" / "00000004")
    with pytest.warns(UserWarning, match=r"00000004 belongs to another run\. Going back to round 2\."):
        Run.resume(path).__exit__()


def test_another_environment_is_told(table, monkeypatch):
    path = stop_after(start(table), 1)
    monkeypatch.setattr(training, "environment", lambda: {"jax": "99.0"})
    with pytest.warns(UserWarning, match=r"another environment \(jax .* then, 99\.0 now\)"):
        Run.resume(path).__exit__()


def test_clients_without_test_rows_have_empty_metrics(table, tmp_path):
    rows = dict(np.load(tmp_path / "rows.npz"))
    owners = np.where(np.arange(40) < 3, np.arange(40), 3 + np.arange(40) % 2)
    np.savez(tmp_path / "rows.npz", **(rows | {"client": owners}))
    path = complete(start(table))
    lines = (path / "clients.csv").read_text().splitlines()
    assert lines[0] == "client,name,examples,accuracy,loss"
    assert lines[1] == "0,0,0,,"
    assert lines[4].startswith("3,3,5,")
    assert "NaN" not in (path / "history.jsonl").read_text()


def test_a_run_without_a_checkpoint_cannot_be_evaluated(table):
    path = stop_after(start(table), 0)
    with pytest.raises(ValueError, match=r"has no checkpoint yet\. Go on with  jaxfed resume"):
        load(path)
