"""The benchmark of real federations: its table, its resuming, its rows, and how it reads data. Nothing long is trained."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
PARTS = ("federation", "ledger", "table", "federations", "training", "pictures", "__main__")


@pytest.fixture
def strict():
    """Replaces the tests' strictness: benchmarks broadcast as NumPy does."""


@pytest.fixture
def load(monkeypatch):
    """A module of the benchmark, forgotten afterwards: its name is not the package's."""
    monkeypatch.syspath_prepend(FOLDER)
    yield lambda name: importlib.import_module(f"reproduce.{name}")
    for name in [name for name in sys.modules if name.split(".")[0] == "reproduce"]:
        del sys.modules[name]


def line(method, seed, whole=True, **numbers):
    return {"method": method, "setting": "here", "seed": seed, "whole": whole, "numbers": numbers}


def toy(load, trained, rows=(), **options):
    """A federation of two methods and two seeds that notes what it trains."""
    federation = load("federation")
    runs = [federation.Run(method, "here", seed) for seed in (0, 1) for method in ("a", "b")]

    def train(run, folder, whole):
        trained.append((run.method, run.seed, whole))
        if len(trained) == options.get("dies_at"):
            raise KeyboardInterrupt
        return {"accuracy": 0.5 + run.seed / 10, "curve": [1, 2]}

    more = {key: value for key, value in options.items() if key != "dies_at"}
    return federation.Federation("toy", "A toy.", runs, train, list(rows), lambda figure, results: None, **more)


# ---- rules and rows


@pytest.mark.parametrize(
    ("rule", "arguments", "values", "holds"),
    [
        ("within", (0.1,), [0.4, 0.8], True),
        ("within", (0.07,), [0.4, 0.8], False),
        ("between", (0.5, 0.65), [0.4, 0.8], True),
        ("between", (0.61, 0.7), [0.4, 0.8], False),
        ("at_least", (0.6,), [0.4, 0.8], True),
        ("at_least", (0.61,), [0.4, 0.8], False),
        ("every_seed_at_least", (0.4,), [0.4, 0.8], True),
        ("every_seed_at_least", (0.5,), [0.4, 0.8], False),
        ("every_seed_at_most", (0.8,), [0.4, 0.8], True),
        ("every_seed_at_most", (0.7,), [0.4, 0.8], False),
    ],
)
def test_rules(load, rule, arguments, values, holds):
    assert getattr(load("federation"), rule)(*arguments).holds(values, 0.52) == holds


def test_differences_pair_seeds(load):
    federation = load("federation")
    results = federation.Results([line("a", 0, accuracy=0.5), line("a", 2, accuracy=0.7), line("b", 2, accuracy=0.4)])
    found = federation.differences(("a", "here"), ("b", "here"), "accuracy")(results)
    assert found == pytest.approx([0.3])


def test_a_row_counts_the_seeds_that_it_names(load):
    """What was run before a rule was written down is in the results, and does not count."""
    federation = load("federation")
    results = federation.Results([line(method, seed, accuracy=seed / 10) for method in "ab" for seed in (0, 1, 5, 6)])
    rule = federation.every_seed_at_least(0.5)
    everything = federation.Row("a", "here", "accuracy", None, "a paper", rule)
    fresh = federation.Row("a", "here", "accuracy", None, "a paper", rule, seeds=(5, 6))
    assert [rule.holds(row.values(results), None) for row in (everything, fresh)] == [False, True]
    gap = federation.differences(("a", "here"), ("b", "here"), "accuracy")
    assert federation.Row("a - b", "here", "accuracy", None, "a paper", rule, "", gap, (6,)).values(results) == [0.0]
    # As long as some are missing it does not count at all: whoever stops early would choose.
    assert federation.Row("a", "here", "accuracy", None, "a paper", rule, seeds=(5, 6, 7)).values(results) == []


# ---- the table


def cells(load, lines, missing=(), rule=None, reference=0.52, **options):
    federation = load("federation")
    row = federation.Row("a", "here", "accuracy", reference, "a paper", rule or federation.within(0.1), "Known.", **options)
    return load("table").cells(toy(load, [], [row]), lines, list(missing))[0]


def test_cells_of_a_row(load):
    found = cells(load, [line("a", 0, accuracy=0.4), line("a", 1, accuracy=0.8), line("b", 0, accuracy=0.0)])
    assert found["ours"] == pytest.approx(0.6)
    assert found["spread"] == pytest.approx(0.4 / np.sqrt(2))
    assert (found["seeds"], found["holds"], found["remark"]) == (2, "yes", "Known.")


def test_what_is_not_there_is_said(load):
    assert cells(load, [])["holds"] == "not run"
    skipped = cells(load, [], missing=["toy/data.npz"])
    assert (skipped["holds"], skipped["ours"]) == ("skipped", None)
    assert "toy/data.npz" in skipped["remark"]
    assert cells(load, [line("a", 0, accuracy=0.9)])["holds"] == "no"
    assert cells(load, [line("a", 0, accuracy=0.9)], rule=load("federation").SHOWN)["holds"] == "-"


def test_whole_runs_are_reported_before_shortened_ones(load):
    short = [line("a", 0, whole=False, accuracy=0.4)]
    assert "Shortened" in cells(load, short)["remark"]
    both = cells(load, [*short, line("a", 0, accuracy=0.6)])
    assert (both["ours"], both["remark"]) == (0.6, "Known.")


def test_a_few_whole_runs_do_not_hide_the_shortened_ones(load):
    """But for a row that asks for them."""
    lines = [line("a", 0, whole=False, accuracy=0.4), line("b", 0, whole=False, accuracy=0.4), line("a", 0, accuracy=0.6)]
    assert cells(load, lines)["ours"] == 0.4
    whole = cells(load, lines, whole=True)
    assert (whole["ours"], whole["setting"], whole["remark"]) == (0.6, "here, whole", "Known.")


def test_page_and_lines_hold_every_row(load):
    table, row = load("table"), cells(load, [line("a", 0, accuracy=0.55)])
    page = table.page([toy(load, [])], [row], {"toy": "toy.png"}, {"toy": "More of it."})
    assert "(toy.png)\n\nMore of it." in page
    assert "| toy | a | here | accuracy | 0.550 (1) | 0.520 | a paper | mean within 0.1 | yes | Known. |" in page
    assert "1 rows hold, 0 do not" in page
    assert "![A toy.](toy.png)" in page
    assert json.loads(table.jsonl([row]))["ours"] == 0.55


@pytest.mark.parametrize(
    ("number", "text"), [(0.0, "0.000"), (0.12345, "0.123"), (1.0, "1.00"), (12.345, "12.3"), (1234.5, "1234"), (-2.5, "-2.50")]
)
def test_figures_have_three_digits(load, number, text):
    assert load("table").figure(number) == text


# ---- resuming


def test_finished_runs_are_not_run_again(load, tmp_path):
    main, trained = load("__main__"), []
    with pytest.raises(KeyboardInterrupt):
        main.train(toy(load, trained, dies_at=3), tmp_path, tmp_path, False)
    assert [run[:2] for run in trained] == [("a", 0), ("b", 0), ("a", 1)]
    trained.clear()
    main.train(toy(load, trained), tmp_path, tmp_path, False)
    assert [run[:2] for run in trained] == [("a", 1), ("b", 1)]
    trained.clear()
    main.train(toy(load, trained), tmp_path, tmp_path, False)
    assert trained == []


def test_a_line_cut_short_is_run_again(load, tmp_path):
    ledger, path = load("ledger"), tmp_path / "toy.jsonl"
    ledger.append(path, line("a", 0, accuracy=0.1))
    path.write_text(path.read_text() + '{"method": "b", "se')
    assert len(ledger.read(path)) == 1
    ledger.append(path, line("b", 1, accuracy=0.2))
    assert [found["method"] for found in ledger.read(path)] == ["a", "b"]
    assert ledger.read(tmp_path / "absent.jsonl") == []


def test_shortened_and_whole_runs_are_different_runs(load, tmp_path):
    main, trained = load("__main__"), []
    for full in (False, True, True):
        main.train(toy(load, trained, short="Fewer rounds."), tmp_path, tmp_path, full)
    assert [run[2] for run in trained] == [False] * 4 + [True] * 4


def test_without_its_data_a_federation_is_skipped(load, tmp_path, capsys):
    main, trained = load("__main__"), []
    main.train(toy(load, trained, files=("toy/data.npz",)), tmp_path, tmp_path, False)
    assert trained == []
    assert "skipped, no toy/data.npz" in capsys.readouterr().out


def test_a_killed_run_goes_on_from_its_checkpoint(load, tmp_path, monkeypatch):
    """Killed after the second of three evaluations, a run ends in the weights of one that was not, with one curve."""
    import jax
    import jax.numpy as jnp

    import jaxfed

    training = load("training")
    monkeypatch.setattr(training, "CHECKPOINTS", tmp_path)

    def init(key):
        return jnp.zeros(())

    def loss(params, batch, key):
        return (params - batch["x"]) ** 2, {"accuracy": params}

    model = importlib.import_module("jaxfed.models.functions").from_functions(init, loss, lambda params, batch: params)
    data = jaxfed.FederatedData.from_arrays({"x": np.arange(6.0, dtype=np.float32)}, np.arange(6))
    options = {"rounds": 6, "eval_every": 2, "eval_data": data}
    simulation = jaxfed.Simulation(jaxfed.fedavg(model, lrate=0.1, batch_size=1), data, 2)
    expected, curve = training.resumed(simulation, ("one", 0), 0, **options)
    assert curve["round"] == [2, 4, 6]
    assert list(tmp_path.iterdir()) == []

    save, saved = training.save_run, []

    def dies(*arguments, **more):
        save(*arguments, **more)
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_run", dies)
    with pytest.raises(KeyboardInterrupt):
        training.resumed(simulation, ("one", 0), 0, **options)
    state, again = training.resumed(simulation, ("one", 0), 0, **options)
    assert len(saved) == 3
    assert again == curve
    np.testing.assert_array_equal(jax.device_get(state.params), jax.device_get(expected.params))


# ---- the federations


class Anything(dict):
    """Numbers that hold every metric, each 1."""

    def __contains__(self, name):
        return True

    def __missing__(self, name):
        return 1.0


def test_every_row_is_of_runs_that_are_made(load):
    """With all runs finished each row has a value."""
    federation = load("federation")
    for one in load("federations").FEDERATIONS:
        assert len(set(one.runs)) == len(one.runs)
        lines = [run._asdict() | {"whole": True, "numbers": Anything()} for run in one.runs]
        seeds = {run.seed for run in one.runs}
        for row in one.rows:
            values = row.values(federation.Results(lines))
            assert len(values) <= len(seeds)
            assert values, (one.name, row.method)


def test_names_are_known_and_files_are_named(load):
    main = load("__main__")
    names = [one.name for one in load("federations").FEDERATIONS]
    assert len(set(names)) == len(names)
    assert [one.name for one in main.chosen(f"{names[2]},{names[0]}")] == [names[0], names[2]]
    with pytest.raises(SystemExit, match=r"no federation 'femnst'.*Known: "):
        main.chosen("femnst")


def test_a_report_holds_all_federations(load, tmp_path):
    """From the stored results of one: its rows and its picture; all others are not run, or skipped."""
    main, stored = load("__main__"), FOLDER / "results/reproduce/tcga-brca.jsonl"
    results = tmp_path / "results"
    results.mkdir()
    (results / stored.name).write_text(stored.read_text())
    main.report(tmp_path, results, tmp_path / "pictures")
    rows = [json.loads(text) for text in (results / "table.jsonl").read_text().splitlines()]
    assert {row["federation"] for row in rows} == {one.name for one in load("federations").FEDERATIONS}
    assert {row["holds"] for row in rows if row["federation"] == "tcga-brca"} <= {"yes", "no", "-"}
    assert {row["holds"] for row in rows if row["federation"] == "femnist"} == {"skipped"}
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["tcga-brca.png"]
    assert "../pictures/tcga-brca.png" in (results / "table.md").read_text()


def test_regions_of_fed_tcga_brca(load, shared):
    """FLamby's sizes of its six regions."""
    train, test = load("tcga_brca").data(shared / "data")
    assert train.sizes.tolist() == [248, 156, 164, 129, 129, 40]
    assert test.sizes.tolist() == [63, 40, 42, 33, 33, 11]
    assert train.arrays["x"].shape[1] == 39
    assert set(np.unique(train.arrays["event"])) == {0, 1}


def test_people_of_adult(load, shared):
    """413 people of 32,561 have a doctorate; each has one value of a column, or none where it is missing.

    Divided anew a third of both clients is for testing, and nobody is lost.
    """
    train, test = load("fair_adult").data(shared / "data", 1)
    doctorates = 413 + 181
    assert train.sizes.tolist() == [(48842 - doctorates) * 2 // 3, doctorates * 2 // 3]
    assert train.num_examples + test.num_examples == 48842
    train, test = load("fair_adult").data(shared / "data")
    assert test.sizes[1] == 181
    assert train.sizes.tolist() == [32561 - 413, 413]
    assert test.num_examples == 16281
    per_person = train.arrays["x"].sum(1)
    assert (per_person.min(), per_person.max()) == (5, 8)
    assert abs(train.arrays["y"].mean() - 0.2408) < 0.0005


def test_the_best_gain_is_of_those_that_have_been_run(load):
    """By seed, over FedAvg of that seed; a seed without FedAvg has none."""
    results = load("federation").Results
    femnist = load("femnist")
    found = {("fedavg", 0): 0.5, ("fedbn", 0): 0.6, ("ditto", 0): 0.55, ("fedprox", 0): 0.9, ("fedbn", 1): 0.7}
    setting = {"setting": femnist.SETTING}
    lines = [setting | {"method": m, "seed": seed, "numbers": {"accuracy": x}} for (m, seed), x in found.items()]
    assert femnist.best_gain(results(lines)) == pytest.approx([0.1])
    assert femnist.best_gain(results(lines[1:])) == []


def test_writers_of_femnist(load, shared):
    """155 writers; 60 % of the rows of each to train on and 20 % to test on, but for rounding."""
    rows, test = load("femnist").data(shared / "data")
    assert rows.num_clients == test.num_clients == 155
    whole = rows.sizes / 0.6
    assert np.abs(test.sizes - 0.2 * whole).max() <= 2
    assert abs(rows.arrays["x"].mean()) < 0.1


def test_counts_of_letters(load):
    """Of two texts: 'a' is most often followed by 'b', 'ca' by 'c'; what was never seen falls back to fewer letters."""
    import jaxfed

    shakespeare = load("shakespeare")

    def pieces(*texts):
        codes = np.array([[ord(letter) for letter in text] for text in texts])
        return jaxfed.FederatedData.from_arrays({"x": codes[:, :-1], "y": codes[:, 1:]}, np.zeros(len(texts), int))

    shakespeare.LENGTH = 7
    rows = pieces("abababca", "bcacbabb")
    test = pieces("ddddddab", "dddddcac", "dddddbba", "dddddzab", "dddddddz")
    expected = {0: [1, 0, 0, 1, 0], 1: [1, 0, 1, 1, 0], 2: [1, 1, 1, 1, 0]}
    for context, right in expected.items():
        assert shakespeare.counted(rows, test, context) == np.mean(right)


def test_roles_of_shakespeare(load, shared):
    """Pieces of 80 characters, each with the one after it as its label; four of five of a role's are to train on."""
    rows, test, letters = load("shakespeare").data(shared / "data")
    assert rows.num_clients == test.num_clients == 226
    assert letters == 75
    assert rows.arrays["x"].shape[1:] == rows.arrays["y"].shape[1:] == (80,)
    for data in (rows, test):
        np.testing.assert_array_equal(data.arrays["x"][:, 1:], data.arrays["y"][:, :-1])
    assert np.abs(rows.sizes / (rows.sizes + test.sizes) - 0.8).max() < 0.02


def test_clients_of_fedprox_mnist(load):
    """1000 clients of two digits that follow each other, five rows of each at least; few have most; nearly every row is owned."""
    labels = np.random.default_rng(0).integers(0, 10, 60000)
    owners = load("fedprox_mnist").power_law(labels, seed=3)
    counts = np.zeros((1000, 10), int)
    np.add.at(counts, (owners[owners >= 0], labels[owners >= 0]), 1)
    own = (np.arange(1000)[:, None] + np.arange(2)) % 10
    mine = np.take_along_axis(counts, own, 1)
    assert mine.min() == 5
    assert mine.sum() == counts.sum() == (owners >= 0).sum() >= 58_000
    sizes = np.sort(counts.sum(1))
    # Lognormal with sigma 2: the largest tenth has about 0.76 of what is dealt by it, which is 50,000 of 60,000.
    assert 0.5 < sizes[-100:].sum() / sizes.sum() < 0.8
    assert np.median(sizes) < sizes.mean() / 2
