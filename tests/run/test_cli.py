"""The command in this process; test_kill.py runs it in processes of its own."""

import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

import jaxfed.run
from jaxfed.reports import Evaluation
from jaxfed.run import commands, history
from jaxfed.run.cli import main
from jaxfed.run.config import RunConfig
from jaxfed.run.show import results


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """The compilation cache is a setting of the whole process, and wide tables are easier to read."""
    monkeypatch.setattr(commands, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(commands, "Console", lambda **options: Console(width=300, **options))


@pytest.fixture
def config(table, tmp_path):
    """The config's file."""
    (tmp_path / "run.toml").write_text(RunConfig.from_dict(table).to_toml())
    return str(tmp_path / "run.toml")


@pytest.fixture
def finished(config, tmp_path, capsys):
    """The folder of a finished run."""
    assert main(["run", config]) == 0
    capsys.readouterr()
    return tmp_path / "run"


def test_run_shows_results_and_leaves_a_picture(config, tmp_path, capsys):
    assert main(["run", config, "--set", "run.rounds=2", "--set", f"run.out={tmp_path / 'two'}"]) == 0
    said = capsys.readouterr()
    assert "5 clients with 30 training and 10 test rows; 3 clients in each round" in said.out
    assert "After 2 rounds, on the test rows" in said.out
    assert "worst decile" in said.out
    assert (tmp_path / "two" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert said.err == ""


def test_evaluate_shows_splits_and_clients(finished, capsys):
    assert main(["evaluate", str(finished)]) == 0
    test = capsys.readouterr().out
    assert main(["evaluate", str(finished), "--split", "train", "--clients"]) == 0
    train = capsys.readouterr().out
    assert "After 6 rounds, on the test rows" in test
    assert "After 6 rounds, on the train rows" in train
    assert "Results by client" in train
    lines = (finished / "clients-train-00000006.csv").read_text().splitlines()
    assert (len(lines), lines[1][:6]) == (6, "0,0,6,")


def test_plot_draws_several_runs(finished, config, tmp_path, capsys, monkeypatch):
    main(["run", config, "--set", f"run.out={tmp_path / 'other'}"])
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["plot", str(finished), str(tmp_path / "other")]) == 0
    assert capsys.readouterr().out == "curves.png\n"
    assert main(["plot", str(finished), "--out", str(tmp_path / "one.png")]) == 0
    assert (tmp_path / "one.png").stat().st_size > 10_000


def test_export_writes_the_weights(finished, capsys):
    assert main(["export", str(finished)]) == 0
    assert capsys.readouterr().out == f"{finished / 'weights.safetensors'}\n"
    assert main(["export", str(finished), "--out", str(finished / "w.msgpack")]) == 0
    assert (finished / "w.msgpack").stat().st_size > 0


def test_list_shows_all_kinds(capsys):
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    for name in ("adam", "fedprox", "cosine-annealing", "averaging", "scaffold", "digits", "dirichlet", "mlp", "uniform"):
        assert name in said


def test_resume_of_a_finished_run_and_more_rounds(finished, capsys):
    assert main(["resume", str(finished)]) == 2
    assert "is finished: it has done all its 6 rounds." in capsys.readouterr().err
    assert main(["resume", str(finished), "--rounds", "8"]) == 0
    assert "After 8 rounds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run", "nowhere.toml"], "jaxfed: nowhere.toml: No such file or directory."),
        (["run", "{config}", "--set", "run.rounds=0"], "jaxfed: run.rounds: expected an integer at least 1, got 0."),
        (["run", "{config}", "--set", "model.name=x"], "jaxfed: model.name: No model is called 'x'."),
        (["run", "{config}", "--set", "rounds"], "jaxfed: --set rounds: expected key=value"),
        (["run", "{finished}"], "Is a directory."),
        (["resume", "{here}"], "is not a run folder: it has no config.toml."),
        (["evaluate", "{here}/none"], "There is no run folder"),
        (["evaluate", "{config}"], "There is no run folder"),
        (["plot"], "jaxfed plot: expected one run folder or more, got none."),
        (["plot", "{here}"], "has no history.jsonl, the history of a run."),
        (["export", "{finished}", "--out", "w.npz"], "expected one of '.safetensors', '.msgpack', got '.npz'."),
        (["list", "models", "things"], "No kind of parts is called 'things'."),
    ],
)
def test_wrong_input_gets_one_sentence_and_status_2(arguments, text, config, finished, tmp_path, capsys):
    places = {"config": config, "finished": finished, "here": tmp_path}
    assert main([argument.format(**places) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert text in said.err
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    "arguments", [["bogus"], [], ["run"], ["evaluate", "x", "--split", "all"], ["resume", "x", "--rounds", "y"]]
)
def test_arguments_that_the_parser_refuses_have_status_2(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err


def test_help_has_status_0(capsys):
    assert main(["--help"]) == 0
    assert "resume" in capsys.readouterr().out


def test_a_traceback_is_shown_where_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("JAXFED_DEBUG", "1")
    assert main(["run", "nowhere.toml"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_warnings_are_lines(config, tmp_path, capsys):
    settings = ["--set", "algorithm.option=II", "--set", "run.rounds=2", "--set", f"run.out={tmp_path / 'warned'}"]
    assert main(["run", config, *settings]) == 0
    assert capsys.readouterr().err.startswith("jaxfed: warning: scaffold-client (option II) is exact for plain SGD")


def test_a_full_disk_says_how_to_go_on(config, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "history.jsonl")

    monkeypatch.setattr(history.HistoryFile, "append", full)
    assert main(["run", config]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Stopped after round 0. When there is room, go on with  jaxfed resume ")
    assert lines[1] == "jaxfed: history.jsonl: No space left on device."


def test_a_missing_extra_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    monkeypatch.delitem(sys.modules, "jaxfed.run.commands")
    monkeypatch.delattr(jaxfed.run, "commands")
    assert main(["list"]) == 2
    assert capsys.readouterr().err == 'jaxfed: The command needs tyro. Install it with  pip install "jaxfed[run]"\n'


def test_the_library_does_not_import_the_command():
    code = "import sys, jaxfed; print([m for m in sys.modules if m.startswith(('jaxfed.run', 'flax', 'orbax', 'tyro', 'rich'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_results_have_a_row_for_each_metric():
    examples = np.full(11, 2)
    evaluation = Evaluation.from_sums({"loss": np.arange(11) * 2.0, "accuracy": np.arange(11) * 0.2}, examples)
    console = Console(width=80)
    with console.capture() as captured:
        console.print(results(evaluation, "After all"))
    words = [line.split() for line in captured.get().splitlines()]
    assert ["accuracy", "0.5", "0.5", "0.1"] in words
    assert ["loss", "5", "5", "9"] in words
