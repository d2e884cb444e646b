import json
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxfed.run.config import RunConfig, change
from jaxfed.run.section import located

BASE = {
    "run": {"rounds": 5},
    "data": {"name": "digits", "partition": {"name": "iid", "clients": 4}},
    "model": {"name": "mlp", "hidden": [8]},
    "algorithm": {"name": "fedavg", "lrate": 0.1, "batch_size": None},
}


def with_setting(*settings):
    table = json.loads(json.dumps(BASE))
    for setting in settings:
        change(table, setting)
    return table


BAD = [
    ("run.rounds=0", ValueError, "run.rounds: expected an integer at least 1, got 0."),
    ("run.rounds=2.5", TypeError, "run.rounds: expected an integer, got 2.5."),
    ('run.rounds="10"', TypeError, "run.rounds: expected an integer, got '10' (str)."),
    ("run.rounds=true", TypeError, "run.rounds: expected an integer, got True (bool)."),
    ("run.rounds=[1, 2]", TypeError, "run.rounds: expected one number, got [1, 2] (list)."),
    ("run.round=3", ValueError, "run.round: unknown key. Did you mean 'rounds'? Known here: rounds, seed,"),
    ("run.seed=-1", ValueError, "run.seed: expected an integer at least 0 and below"),
    ("run.eval_every=-2", ValueError, "run.eval_every: expected an integer at least 0, got -2."),
    ("run.checkpoint_every=0", ValueError, "run.checkpoint_every: expected an integer at least 1, got 0."),
    ("run.out=3", TypeError, "run.out: expected a text, got 3 (int)."),
    ('run.out=""', TypeError, "run.out: expected a text, got '' (str)."),
    ("run=3", TypeError, "run: expected a table, got 3 (int)."),
    ("runs.rounds=3", ValueError, "runs: unknown key. Did you mean 'run'? Known here: run, data, model, algorithm, simulation."),
    ("data=[]", TypeError, "data: expected a table, got [] (list)."),
    ("data.name=7", TypeError, "data.name: expected a text, got 7 (int)."),
    ("data.test_fraction=1", ValueError, "data.test_fraction: expected a finite number at least 0 and below 1, got 1."),
    ("data.test_fraction=nan", ValueError, "data.test_fraction: expected a finite number at least 0 and below 1, got nan."),
    ("data.label_key=1", TypeError, "data.label_key: expected a text, got 1 (int)."),
    ('data.partition="iid"', TypeError, "data.partition: expected a table, got 'iid' (str)."),
    ("data.partition={clients=3}", ValueError, "data.partition.name is missing."),
    ("data.partition.seed=inf", ValueError, "data.partition.seed: expected a finite number, got inf."),
    ("model.name=none", TypeError, "model.name: expected a text, got None (NoneType)."),
    ("model.hidden=[1979-05-27]", TypeError, "model.hidden[0]: expected a number, a text, a list or a table, got datetime"),
    ("algorithm.lrate={base=nan}", ValueError, "algorithm.lrate.base: expected a finite number, got nan."),
    ("simulation.cohort=3", ValueError, "simulation.cohort: unknown key. Did you mean 'cohort_size'?"),
    ("simulation.cohort_size=0", ValueError, "simulation.cohort_size: expected an integer at least 1, got 0."),
    ("simulation.selector=[1, 2]", TypeError, 'simulation.selector: expected a name or ["name", {options}], got [1, 2]'),
    ("simulation.chunk=none", TypeError, "simulation.chunk: expected an integer, got None (NoneType)."),
    ("simulation.lanes=false", TypeError, "simulation.lanes: expected an integer, got False (bool)."),
]


@pytest.mark.parametrize(("setting", "kind", "text"), BAD, ids=[setting for setting, _, _ in BAD])
def test_bad_values_are_named_by_their_path(setting, kind, text):
    with pytest.raises(kind) as error:
        RunConfig.from_dict(with_setting(setting))
    assert text in str(error.value)


@pytest.mark.parametrize("section", ["run", "data", "model", "algorithm"])
def test_a_missing_section_is_named(section):
    table = {name: one for name, one in BASE.items() if name != section}
    with pytest.raises(ValueError, match=f"{section} is missing"):
        RunConfig.from_dict(table)


@pytest.mark.parametrize("value", [None, [], "run", 3])
def test_a_config_is_a_table(value):
    with pytest.raises(TypeError, match="The config: expected a table"):
        RunConfig.from_dict(value)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("rounds", "--set rounds: expected key=value with a dotted key"),
        ("=3", "expected key=value"),
        ("run..rounds=3", "expected key=value"),
        ("run.rounds=[1", "--set run.rounds=[1: the value is no TOML"),
        ("run.rounds.more=3", "--set run.rounds.more=3: run.rounds is 5 (int), which has no keys. Set run.rounds itself."),
    ],
)
def test_bad_settings_are_refused(setting, text):
    with pytest.raises(ValueError, match=r"^--set") as error:
        with_setting(setting)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("0.5", 0.5), ("true", True), ("fedprox", "fedprox"), ('"a b"', "a b"), ("none", None), ("[1, none]", None)],
)
def test_settings_are_toml_or_bare_words(text, value):
    table = {}
    if text == "[1, none]":
        with pytest.raises(ValueError, match="no TOML"):
            change(table, f"a.b={text}")
        return
    change(table, f"a.b = {text}")
    assert table == {"a": {"b": value}}


NAMES = st.text(min_size=1, max_size=8).filter(lambda name: name not in ("name", "options"))
SCALARS = st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(max_size=12).filter(lambda text: text != "none")
VALUES = st.recursive(
    SCALARS | TEXTS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=8
)
OPTIONS = st.dictionaries(NAMES, VALUES, max_size=4)
RUNS = st.fixed_dictionaries(
    {"rounds": st.integers(1, 10**6), "seed": st.integers(0, 2**32 - 1), "eval_every": st.integers(0, 50)},
    optional={"checkpoint_every": st.integers(1, 9), "out": st.text(min_size=1).filter(lambda text: text != "none")},
)
SIMULATIONS = st.fixed_dictionaries(
    {}, optional={"cohort_size": st.integers(1, 99), "lanes": st.integers(1, 9), "selector": st.just(["uniform", {"size": 3}])}
)


@given(RUNS, OPTIONS, OPTIONS, OPTIONS, SIMULATIONS)
def test_configs_survive_dict_json_and_toml(run, partition, model, algorithm, simulation):
    config = RunConfig.from_dict(
        {
            "run": run,
            "data": {"name": "digits", "partition": {"name": "iid"} | partition, "test_fraction": 0.125, "label_key": "z"},
            "model": {"name": "mlp"} | model,
            "algorithm": algorithm,
            "simulation": simulation,
        }
    )
    assert RunConfig.from_dict(config.to_dict()) == config
    assert RunConfig.from_json(config.to_json()) == config
    assert RunConfig.from_toml(config.to_toml()) == config
    assert config.to_dict()["model"] == {"name": "mlp"} | model


def test_defaults_are_written_out():
    config = RunConfig.from_dict(BASE)
    assert config.to_dict()["run"] == {"rounds": 5, "seed": 0, "eval_every": 10}
    assert config.to_dict()["simulation"] == {"chunk": 10}
    assert tomllib.loads(config.to_toml())["algorithm"]["batch_size"] == "none"


def test_the_text_none_is_refused_rather_than_changed():
    table = with_setting("model.hidden=[1]")
    table["model"]["mode"] = ["none"]
    with pytest.raises(ValueError, match="stands for None"):
        RunConfig.from_dict(table).to_toml()
    assert RunConfig.from_json(RunConfig.from_dict(table).to_json()).model.options["mode"] == ["none"]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.toml", b"[run\nrounds = 3", "a.toml: The config is no TOML: "),
        ("a.toml", b"\xff\xfe", "a.toml: 'utf-8' codec"),
        ("a.toml", b"", "run is missing"),
        ("a.toml", b"[run]\nrounds=1\n[run]\nrounds=2", "Cannot declare"),
        ("a.json", b'{"run": ', "a.json: "),
        ("a.json", b"[]", "The config: expected a table, got [] (list)."),
    ],
)
def test_bad_files_are_refused_with_their_name(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, TypeError)) as error:
        RunConfig.read(tmp_path / name)
    assert text in str(error.value)


def test_a_run_is_named_after_its_file(tmp_path):
    (tmp_path / "first.json").write_text(json.dumps(BASE))
    assert RunConfig.read(tmp_path / "first.json").run.out == "runs/first"
    assert RunConfig.read(tmp_path / "first.json", ["run.out=there"]).run.out == "there"


def test_options_cannot_hide_a_key_of_the_section():
    model = RunConfig.from_dict(BASE).model
    with pytest.raises(ValueError, match=r"model\.name: expected options of the part"):
        type(model)("mlp", {"name": "cnn"})


@pytest.mark.parametrize(
    ("message", "located_message"),
    [
        ("Adam.beta_1: expected less.", "a.b.beta_1: expected less."),
        ("Optimizer.modules[0]: expected more.", "a.b.modules[0]: expected more."),
        ("a.b.c: known already.", "a.b.c: known already."),
        ("Nothing fits.", "a.b: Nothing fits."),
    ],
)
def test_errors_of_parts_get_the_path_of_the_key(message, located_message):
    with pytest.raises(ValueError, match=r"^a\.b") as error, located("a.b"):
        raise ValueError(message)
    assert str(error.value) == located_message
