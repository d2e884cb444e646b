"""One run by two processes: what one process computes; a process that dies ends the other; resumed, all goes on."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.run import machines
from jaxfed.run.cli import main
from jaxfed.run.commands import INTERRUPTED
from jaxfed.run.config import RunConfig
from jaxfed.run.history import read_history
from jaxfed.run.machines import LOST, Machines

ROOT = Path(__file__).resolve().parents[2]
MORTAL = """
import os, signal, sys
from jaxfed.run import cli, training
whole, kind = training.row_of, sys.argv[2]

def row_of(report, *rest):
    if report.round == int(sys.argv[1]) + 1:
        if int(sys.argv[1]) == 0:
            raise OSError(28, "No space left on device")
        os.kill(os.getpid(), signal.Signals[kind])
    return whole(report, *rest)

training.row_of = row_of
sys.exit(cli.main(sys.argv[3:]))
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(tmp_path, number, port, *arguments, dies_after=None, of="SIGKILL"):
    """A process of a run of two."""
    program = ["-m", "jaxfed.run"] if dies_after is None else ["-c", MORTAL, str(dies_after), of]
    where = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process-id", str(number)]
    # Each has a cache of its own: a process that waits for a collective must not wait for a file too.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / f"cache{number}"), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    call = [sys.executable, *program, *arguments, *where]
    return subprocess.Popen(call, env=os.environ | cache, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def together(tmp_path, *arguments, dies_after=None, of="SIGKILL", seconds=240):
    """Both processes' exit status and what they said; the second may die, or get another signal."""
    port = free_port()
    deaths = (None, dies_after)
    processes = [start(tmp_path, number, port, *arguments, dies_after=deaths[number], of=of) for number in range(2)]
    try:
        said = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_two_processes_are_one_and_go_on_after_a_death(table, tmp_path, capsys):
    # Both must decide to stop after round 8: the loss rises at round 6, and falls by 0.003 below that of round 4 then.
    table["run"] |= {"rounds": 20, "checkpoint_every": 4, "stop": {"metric": "loss", "patience": 2, "tolerance": 0.004}}
    (tmp_path / "run.toml").write_text(RunConfig.from_dict(table).to_toml())
    config = str(tmp_path / "run.toml")
    assert main(["run", config, "--set", f"run.out={tmp_path / 'one'}"]) == 0
    codes, said = together(tmp_path, "run", config, dies_after=4)
    assert codes == [LOST, -9], said
    assert "process 0: Another process of this run has ended" in said[0][1]
    assert [row["round"] for row in read_history(tmp_path / "run" / "history.jsonl")][:4] == [1, 2, 3, 4]
    codes, said = together(tmp_path, "resume", str(tmp_path / "run"))
    assert codes == [0, 0], said
    # Only process 0 speaks, and only it writes.
    assert "After 8 rounds" in said[0][0]
    assert [line for line in said[1][0].splitlines() if not line.startswith("[Gloo]")] == []
    one, two = (read_history(tmp_path / name / "history.jsonl") for name in ("one", "run"))
    assert [row["excluded"] for row in two] == [row["excluded"] for row in one]
    for name in ("loss", "update_norm"):
        np.testing.assert_allclose([row[name] for row in two], [row[name] for row in one], rtol=2e-5)
    # Each process has read the rows of its own clients alone; the data are the same.
    assert len({json.loads((tmp_path / name / "run.json").read_text())["data"] for name in ("one", "run")}) == 1
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "run")]
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=2e-5)


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_one_that_is_asked_to_stop_stops_both_with_a_checkpoint(table, tmp_path):
    (tmp_path / "run.toml").write_text(RunConfig.from_dict(table | {"run": table["run"] | {"rounds": 200}}).to_toml())
    codes, said = together(tmp_path, "run", str(tmp_path / "run.toml"), dies_after=4, of="SIGINT", seconds=120)
    assert codes == [INTERRUPTED, INTERRUPTED], said
    done = max(int(folder.name) for folder in (tmp_path / "run" / "checkpoints").iterdir())
    assert 4 < done < 200
    assert f"Stopped after round {done}. Go on with" in said[0][1]
    assert len(read_history(tmp_path / "run" / "history.jsonl")) == done


@pytest.mark.skipif(os.name != "posix", reason="ends a process at once")
def test_a_process_that_fails_ends_the_other(table, tmp_path):
    """On the way out through Python each would wait for the other."""
    (tmp_path / "run.toml").write_text(RunConfig.from_dict(table).to_toml())
    codes, said = together(tmp_path, "run", str(tmp_path / "run.toml"), dies_after=0, seconds=120)
    assert codes == [LOST, 2], said
    assert "process 0: Another process of this run has ended" in said[0][1]
    assert "jaxfed: No space left on device." in said[1][1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"coordinator": "here:1"}, "--processes, --process-id is missing"),
        ({"processes": 2, "process_id": 0}, "--coordinator is missing"),
        ({"coordinator": "here:1", "processes": 2, "process_id": 2}, "expected 0 to 1, got 2"),
        ({"coordinator": "here", "processes": 2, "process_id": 0}, "--coordinator: expected HOST:PORT, got 'here'"),
        ({"coordinator": "here:", "processes": 2, "process_id": 0}, "expected HOST:PORT"),
        ({"cluster": True, "processes": 2}, "Leave out"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_starts(arguments, text):
    with pytest.raises(ValueError, match=text), Machines(**arguments).joined():
        pass


@pytest.mark.parametrize(
    "rows", [np.arange(6).reshape(3, 2) << 40, np.arange(3) > 1, np.ones((3, 0)), np.ones((0, 2), np.float16)]
)
def test_rows_of_all_processes_keep_shape_and_type(rows, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    # What arrives has gone through an array of JAX's.
    monkeypatch.setattr(machines.multihost_utils, "process_allgather", lambda x: np.asarray(jnp.stack([jnp.asarray(x)] * 2)))
    found = machines.everyones(rows)
    assert found.dtype == rows.dtype
    np.testing.assert_array_equal(found, np.concatenate([rows, rows]))
