"""The command in this process: a folder with tables and a picture, stopped and gone on with."""

import csv
import json

import jax
import pytest
from rich.console import Console

from jaxfed.run import build, commands, sweeping
from jaxfed.run.cli import main
from jaxfed.run.config import RunConfig


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setattr(commands, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(commands, "Console", lambda **options: Console(width=300, **options))


@pytest.fixture
def config(tmp_path):
    table = {
        "run": {"rounds": 3, "seed": 3, "eval_every": 2},
        "data": {"name": "digits", "partition": {"name": "iid", "clients": 6}},
        "model": {"name": "logistic-regression"},
        "algorithm": {"name": "fedavg", "lrate": 0.1, "batch_size": 50},
        "simulation": {"cohort_size": 2},
    }
    (tmp_path / "digits.toml").write_text(RunConfig.from_dict(table).to_toml())
    return str(tmp_path / "digits.toml")


def arguments(config, folder, *more):
    return ["sweep", config, "--out", str(folder), "--over", "client.lrate=0.02,0.5", "--over", "seed=3:5", *more]


def test_sweep_leaves_tables_and_a_picture(config, tmp_path, capsys, monkeypatch):
    folder, real = tmp_path / "swept", sweeping.outcomes

    def stopped(*given, **options):
        for i, one in enumerate(real(*given, **options)):
            if i == 1:
                raise KeyboardInterrupt
            yield one

    monkeypatch.setattr(sweeping, "outcomes", stopped)
    assert main(arguments(config, folder)) == commands.INTERRUPTED
    assert [path.name for path in (folder / "settings").iterdir()] == ["000000.json"]
    assert not (folder / "results.csv").exists()
    first = (folder / "settings" / "000000.json").read_bytes()

    monkeypatch.setattr(sweeping, "outcomes", real)
    assert main(arguments(config, folder, "--at-once", "1")) == 0
    assert (folder / "settings" / "000000.json").read_bytes() == first
    said = capsys.readouterr().out
    assert "After 3 rounds" in said
    assert "±" in said
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert [(row["client.lrate"], row["seed"], row["round"]) for row in rows] == [
        ("0.02", "3", "3"),
        ("0.02", "4", "3"),
        ("0.5", "3", "3"),
        ("0.5", "4", "3"),
    ]
    assert len((folder / "history.csv").read_text().splitlines()) == 1 + 4 * 3
    # The third setting is the run of a config with this rate.
    built = build.build(RunConfig.read(config, ["algorithm.lrate=0.5"]))
    state = built.simulation.init(key=jax.random.key(3))
    _, history = built.simulation.run(state, rounds=3, eval_every=2, eval_data=built.test)
    assert float(rows[2]["eval_accuracy"]) == pytest.approx(history["eval_accuracy"][-1], abs=1e-6)
    assert float(rows[2]["loss"]) == pytest.approx(history["loss"][-1], rel=1e-4)

    assert main(arguments(config, folder)) == 2
    assert "is finished" in capsys.readouterr().err
    assert main(arguments(config, folder, "--set", "algorithm.lrate=0.2")) == 2
    assert "holds a sweep whose config differ" in capsys.readouterr().err
    (folder / "results.csv").unlink()
    content = json.loads(first) | {"setting": {"seed": 9}}
    (folder / "settings" / "000000.json").write_text(json.dumps(content))
    assert main(arguments(config, folder)) == 2
    assert "000000.json, a setting's history, was altered." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("over", "text"),
    [
        ("client.lrate", "--over client.lrate: expected numbers as in"),
        ("client.lrate=a", "--over client.lrate=a: expected numbers as in"),
        ("client.lrate=-1", "over: client.lrate: Optimizer.lrate: expected a finite number at least 0"),
        ("client.lrte=1", "Did you mean 'client.optimizer.lrate'?"),
        ("batch_size=1,2", "belongs to the compiled program"),
        ("seed=2:2", "over: seed: expected at least one value"),
    ],
)
def test_wrong_axes_write_nothing(over, text, config, tmp_path, capsys):
    assert main(["sweep", config, "--out", str(tmp_path / "swept"), "--over", over]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "swept").exists()


def test_a_folder_of_something_else_is_refused(config, tmp_path, capsys):
    assert main(arguments(config, tmp_path)) == 2
    assert "holds no sweep" in capsys.readouterr().err
