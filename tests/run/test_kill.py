"""Runs killed by SIGKILL, each resumed in a new process, against one that was never killed: the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxfed.run.config import RunConfig
from jaxfed.run.export import export_weights
from jaxfed.run.history import read_history
from jaxfed.run.training import load, load_best

ROOT = Path(__file__).resolve().parents[2]
FILES = ("history.jsonl", "client_curves.npy", "clients.csv", "result.json", "weights.safetensors")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")

KILLER = """
import os, signal, sys
from jaxfed import files
from jaxfed.run import checkpoint, cli, history, journal, training

moment, checkpoint.JOURNAL_BYTES = sys.argv[1], int(sys.argv[2])

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def at(owner, name, count, last=die, counts=lambda *_: True):
    '''Replaces the count-th call of a function by something deadly.'''
    whole, calls = getattr(owner, name), iter(range(count - 1))
    setattr(owner, name, lambda *a, **k: last(*a, **k) if counts(*a) and next(calls, None) is None else whole(*a, **k))

def half_a_line(self, rows):
    with open(self.path, "a") as file:
        file.write("".join(map(history.line_of, rows))[:-40])
    die()

def half_a_record(file, position, *_):
    file.write(b"rows" + bytes(60))
    file.flush()
    die()

def is_record(file, position, kind, *_):
    return position.size > 0 and "partial" not in file.name

def is_segment(old, new):
    return str(new).endswith(".journal")

def is_checkpoint(old, new):  # Orbax renames folders too
    return "checkpoints/0" in str(new) and "state" not in str(new)

if moment == "before-the-first-round": at(training, "row_of", 1)
if moment == "in-the-history": at(history.HistoryFile, "append", 2, half_a_line)
if moment == "in-the-state": at(checkpoint, "_write_manifest", 2)
if moment == "before-the-rename": at(files.os, "rename", 2, counts=is_checkpoint)
if moment == "before-the-removal": at(files, "discard", 1)
if moment == "in-a-record": at(journal, "_append", 1, half_a_record, counts=is_record)
if moment == "before-a-segment": at(files.os, "replace", 1, counts=is_segment)
if moment == "after-a-segment": at(checkpoint, "_write_manifest", 1)
if moment == "before-segments-go": at(journal, "remove_unneeded", 1)
if moment == "before-the-result": at(training, "write_clients", 1)
sys.exit(cli.main(sys.argv[3:]))
"""


def environment(cache):
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu"}


def command(cache, *arguments, program=("-m", "jaxfed.run")):
    return subprocess.run(
        [sys.executable, *program, *arguments], env=environment(cache), capture_output=True, text=True, timeout=120
    )


def done(cache, *arguments):
    result = command(cache, *arguments)
    assert result.returncode == 0, result.stderr
    return result


def content(path):
    """The files that must not differ, the weights, and the weights of the best model."""
    export_weights(load(path)[2], path / "weights.safetensors")
    best = export_weights(load_best(path)[2], path / "best.safetensors")
    return {name: (path / name).read_bytes() for name in (*FILES, best.name)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs, shared by all processes of this file."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(table, tmp_path):
    """The config's file. The run stops after 14 of its rounds, since its loss rises after 8."""
    table["run"] |= {"rounds": 20, "stop": {"metric": "loss", "patience": 3}}
    (tmp_path / "run.toml").write_text(RunConfig.from_dict(table).to_toml())
    return str(tmp_path / "run.toml")


def killed(moment, cache, *arguments, journal_bytes=2**24):
    result = command(cache, moment, str(journal_bytes), *arguments, program=("-c", KILLER))
    assert result.returncode == -signal.SIGKILL, result.stderr


MOMENTS = {
    "before-the-first-round": 0,
    "in-the-history": 2,
    "in-the-state": 4,
    "before-the-rename": 6,
    "before-the-removal": 10,
    "before-the-result": 14,
}
"""Where to kill, and the newest checkpoint that is there afterwards; each goes on from the one before."""


def test_a_run_killed_at_every_moment_ends_as_if_it_had_not_been_killed(config, cache, tmp_path):
    done(cache, "run", config, "--set", f"run.out={tmp_path / 'whole'}")
    path = tmp_path / "killed"
    arguments = ["run", config, "--set", f"run.out={path}"]
    for moment, round in MOMENTS.items():
        killed(moment, cache, *arguments)
        assert max((int(p.name) for p in (path / "checkpoints").glob("0*")), default=0) == round, moment
        arguments = ["resume", str(path)]
    done(cache, *arguments)
    assert content(path) == content(tmp_path / "whole")
    assert sorted(os.listdir(path / "checkpoints")) == ["00000008", "00000012", "00000014"]
    result = json.loads((path / "result.json").read_text())
    assert (result["rounds"], result["best"]["round"]) == (14, 8)


JOURNALED = {
    "before-a-segment": 0,
    "after-a-segment": 0,
    "in-a-record": 2,
    "in-the-state": 4,
    "before-segments-go": 6,
}
"""What a journal of what clients keep adds; the first two and the last fall into the first checkpoint that follows.

``test_journal.py`` kills at every operation on the disk, within one process.
"""


def test_a_run_with_a_journal_killed_at_every_moment_ends_as_if_it_had_not_been_killed(table, cache, tmp_path):
    """Its clients are more than a cohort, so that checkpoints go on in a segment, and the run without a kill has no journal."""
    table["run"] |= {"rounds": 10, "best": "loss_worst_decile"}
    table["data"]["path"] = str(tmp_path / "many.npz")
    table["simulation"]["cohort_size"] = 2
    rows = np.random.default_rng(1).normal(size=(60, 4)).astype(np.float32)
    np.savez(tmp_path / "many.npz", x=rows, y=np.arange(60) % 3, client=np.arange(60) % 20)
    (tmp_path / "run.toml").write_text(RunConfig.from_dict(table).to_toml())
    config, path = str(tmp_path / "run.toml"), tmp_path / "killed"
    done(cache, "run", config, "--set", f"run.out={tmp_path / 'whole'}")
    arguments = ["run", config, "--set", f"run.out={path}"]
    for moment, round in JOURNALED.items():
        killed(moment, cache, *arguments, journal_bytes=0)
        assert max((int(p.name) for p in (path / "checkpoints").glob("0*")), default=0) == round, moment
        arguments = ["resume", str(path)]
    result = command(cache, "never", "0", *arguments, program=("-c", KILLER))
    assert result.returncode == 0, result.stderr
    assert content(path) == content(tmp_path / "whole")
    left = {p.name for p in (path / "checkpoints").iterdir()}
    best = json.loads((path / "result.json").read_text())["best"]["round"]
    assert {f"{round:08d}" for round in (best, 8, 10)} < left
    assert best < 8
    assert all(name.startswith(("0", "clients-")) for name in left)


def test_ctrl_c_says_how_to_go_on_and_loses_no_round(config, cache, tmp_path):
    path = tmp_path / "stopped"
    settings = ["--set", f"run.out={path}", "--set", "run.rounds=100000", "--set", "run.checkpoint_every=90000"]
    settings += ["--set", "run.stop=none"]
    arguments = [sys.executable, "-m", "jaxfed.run", "run", config, *settings]
    process = subprocess.Popen(arguments, env=environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_rounds(path, 6)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    rounds = len(read_history(path / "history.jsonl"))
    first, second = said.splitlines()
    assert first == "Stopping after the rounds that are under way; once more stops at once."
    assert second == f"Stopped after round {rounds}. Go on with  jaxfed resume {path}"
    assert (process.returncode, int(load(path)[2].round)) == (130, rounds)


def wait_for_rounds(path, rounds):
    for _ in range(600):
        if (path / "history.jsonl").exists() and len(read_history(path / "history.jsonl")) >= rounds:
            return
        time.sleep(0.1)
    raise TimeoutError(f"{path} did not reach round {rounds}.")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_run_killed_at_random_moments_again_and_again(config, cache, tmp_path, seed):
    longer = [
        "--set",
        "run.rounds=120",
        "--set",
        "run.stop.patience=100",
        "--set",
        "run.eval_every=7",
        "--set",
        "run.checkpoint_every=1",
    ]
    done(cache, "run", config, *longer, "--set", f"run.out={tmp_path / 'whole'}")
    path, draw = tmp_path / "killed", random.Random(seed)
    arguments = ["run", config, *longer, "--set", f"run.out={path}"]
    kills = 0
    while not (path / "result.json").exists():
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxfed.run", *arguments], env=environment(cache), stdout=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=draw.uniform(1, 9))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        if path.exists():
            arguments = ["resume", str(path)]
    assert kills > 2
    assert content(path) == content(tmp_path / "whole")
    rows = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(1, 121))
