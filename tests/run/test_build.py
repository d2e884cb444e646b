"""From names to things, and the paths of what is wrong with them."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

import jaxfed
from jaxfed.run import build
from jaxfed.run.config import RunConfig, change


def config_with(table, *settings):
    table = copy.deepcopy(table)
    for setting in settings:
        change(table, setting)
    return RunConfig.from_dict(table)


def composed(table, **parts):
    return RunConfig.from_dict(table | {"algorithm": parts})


BAD = [
    ("data.name=digit", "data.name: No data set is called 'digit'. Did you mean 'digits'?"),
    ("data.pth=x", "data.pth: unknown key. Did you mean 'path'?"),
    ("data.path=/nowhere.npz", "data: There is no file '/nowhere.npz'."),
    ("data.client_key=owner", "has no array 'owner'"),
    ('data.partition={name="iid", clients=40}', "data.test_fraction: every client has one row, which leaves none for testing."),
    ("data.partition={name=iid2}", "the value is no TOML"),
    ('data.partition={name="dirichle", alpha=1}', "data.partition.name: No partition is called 'dirichle'."),
    ('data.partition={name="dirichlet", clients=4, alpha=0}', "data.partition.alpha: expected a finite number above 0"),
    ('data.partition={name="dirichlet", clients=4, beta=1}', "data.partition.beta: unknown key."),
    ('data.partition={name="dirichlet", clients=4}', "needs 'alpha'"),
    ('data.partition={name="iid", clients=400}', "400 clients with 1 or more examples each need 400, got 40"),
    (
        "model.name=logistic",
        "model.name: No model is called 'logistic'. Known: char-lstm, convnet2,",
    ),
    ("model.hidden=[3]", "model.hidden: unknown key. Known here: classes."),
    ("model.classes=2", "model: Expected class labels from 0 to 1, got 0 to 2."),
    ("algorithm.name=fedavgg", "algorithm.name: No algorithm is called 'fedavgg'. Did you mean 'fedavg'?"),
    ("algorithm.mu=0.1", "algorithm.mu: unknown key."),
    ("algorithm.lrate=-0.1", "algorithm.lrate: expected a finite number at least 0, got -0.1."),
    ("algorithm.lrate=fast", "algorithm.lrate: No schedule is called 'fast'."),
    ("algorithm.lrate=none", "algorithm.lrate: expected a number, a schedule"),
    ('algorithm.lrate=["cosine-annealing", {base=-1}]', "algorithm.lrate"),
    ("algorithm.lrate={lrate=0.1, mods=[]}", "algorithm.lrate.mods: unknown key. Did you mean 'modules'?"),
    ('algorithm.lrate={lrate=["constant", {}]}', "algorithm.lrate.lrate: constant needs rate."),
    ("algorithm.lrate={lrate=0.1, w_decay=-1}", "algorithm.lrate.w_decay: expected a finite number at least 0, got -1."),
    ("algorithm.lrate={modules=[]}", "algorithm.lrate: optimizer needs lrate."),
    (
        'algorithm.lrate={lrate=0.1, modules=["adm"]}',
        "algorithm.lrate.modules[0]: No module is called 'adm'. Did you mean 'adam'?",
    ),
    ('algorithm.lrate={lrate=0.1, modules=[["adam", {beta_1=2}]]}', "algorithm.lrate.modules[0].beta_1: expected a finite"),
    ('algorithm.lrate={lrate=0.1, regularizers=[["ridge", {alpha="x"}]]}', "algorithm.lrate.regularizers[0].alpha: expected a"),
    (
        "algorithm.server_lrate=[1, 2]",
        "algorithm: server/lrate: expected one number, got [1.0, 2.0]. A run has one value of each.",
    ),
    ("algorithm.batch_size=0", "algorithm.batch_size: Epochs.batch_size: expected an integer at least 1, got 0."),
    ("algorithm.epochs=1.5", "algorithm.epochs: Epochs.epochs: expected an integer, got 1.5."),
    ("algorithm.weights=exampels", "algorithm.weights: Mean.by: expected one of 'examples', 'steps', 'uniform', got 'exampels'."),
    ("algorithm.option=III", "algorithm.option: ScaffoldClient.option: expected one of"),
    ("simulation.cohort_size=6", "simulation: cohort_size: expected at most the population of 5 clients, got 6."),
    ('simulation.selector="everyone"', "simulation: Expected cohort_size or selector, got both."),
    ('simulation.selector="everybody"', "simulation.selector: No selector is called 'everybody'. Did you mean 'everyone'?"),
]


@pytest.mark.parametrize(("setting", "text"), BAD, ids=[setting for setting, _ in BAD])
def test_what_cannot_be_built_is_named_by_its_path(table, setting, text):
    with pytest.raises((ValueError, TypeError, OSError)) as error:
        build.build(config_with(table, setting))
    assert text in str(error.value)


@pytest.mark.parametrize("key", ["lrate", "batch_size"])
def test_a_recipe_says_what_it_needs(table, key):
    del table["algorithm"][key]
    with pytest.raises(ValueError, match=rf"^algorithm\.{key} is missing; scaffold needs it"):
        build.build(RunConfig.from_dict(table))


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"client": 0.1}, "algorithm.batches is missing. Without a name, [algorithm] needs client and batches."),
        ({"client": 0.1, "batches": "epoch"}, "algorithm.batches: No batches is called 'epoch'. Did you mean 'epochs'?"),
        (
            {"client": 0.1, "batches": ["epochs", {"batch_size": 0}]},
            "algorithm.batches.batch_size: expected an integer at least 1",
        ),
        ({"client": 0.1, "batches": ["epochs", {"batch_size": 2}], "lrate": 1}, "algorithm.lrate: unknown key."),
        (
            {"client": {"lrate": 0.1, "modules": ["scaffold-client"]}, "batches": ["epochs", {"batch_size": 2}]},
            "algorithm: The client has 'scaffold-client', which exchanges the auxiliary variable",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(table, parts, text):
    with pytest.raises((ValueError, TypeError)) as error:
        build.build(composed(table, **parts))
    assert text in str(error.value)


def test_a_recipe_from_a_config_is_the_recipe(table):
    built = build.build(RunConfig.from_dict(table))
    client = jaxfed.Optimizer(0.1, modules=[("momentum", {"beta": 0.5})], keep_state=True)
    expected = jaxfed.scaffold(built.simulation.model, lrate=client, batch_size=4, weights="uniform", option="I")
    assert built.simulation.algorithm == expected


def test_parts_from_a_config_are_the_parts(table):
    parts = {
        "client": {"lr": ["exponential-decay", {"base": 0.1, "rate": 0.5}], "regularizers": [["fedprox", {"alpha": 0.2}]]},
        "server": {"lrate": 0.5, "modules": ["adam:paper"]},
        "aggregator": ["gradient-masked-averaging", {"threshold": 0.4}],
        "batches": ["steps", {"batch_size": 3, "steps": 7}],
    }
    made = build.build(composed(table, **parts)).simulation.algorithm
    assert made.aggregator == jaxfed.GradientMaskedMean(threshold=0.4)
    assert made.server == jaxfed.Optimizer(0.5, modules=[jaxfed.Adam.paper()])
    assert made.client.batches == jaxfed.Steps(batch_size=3, steps=7)
    assert made.client.optimizer.regularizers == (jaxfed.FedProx(0.2),)


def test_rates_by_label_and_a_selector(table):
    table["simulation"] = {"selector": ["uniform", {"size": 2}]}
    table["algorithm"] = {"name": "fedavg", "lrate": {"*/bias": 0.0, "*": 0.1}, "batch_size": 4}
    simulation = build.build(RunConfig.from_dict(table)).simulation
    assert simulation.selector == jaxfed.Uniform(2)
    state, _ = simulation.run(simulation.init(key=jax.random.key(0)), rounds=1)
    assert not state.params["Dense_0"]["bias"].any()
    assert state.params["Dense_0"]["kernel"].any()


def test_rates_that_fit_no_leaf_are_found_by_tracing(table):
    table["algorithm"] = {"name": "fedavg", "lrate": {"*/scale": 0.1}, "batch_size": 4}
    simulation = build.build(RunConfig.from_dict(table)).simulation
    with pytest.raises(ValueError, match=r"^algorithm: ByLabel: no rate for 'Dense_0/bias'"):
        build.check_round(simulation, simulation.init(key=jax.random.key(0)))


def test_seeds_and_paths_are_written_out(table, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    table["data"] |= {"path": "rows.npz", "partition": {"name": "iid", "clients": 4}}
    data = build.resolved(RunConfig.from_dict(table)).data
    assert data.options == {"path": str(tmp_path / "rows.npz")}
    assert data.partition.options == {"clients": 4, "seed": 3}
    table["data"]["partition"]["seed"] = 8
    assert build.resolved(RunConfig.from_dict(table)).data.partition.options["seed"] == 8


def test_rows_are_split_within_clients_and_none_are_lost(table):
    built = build.build(RunConfig.from_dict(table))
    np.testing.assert_array_equal(built.simulation.data.sizes, [6] * 5)
    np.testing.assert_array_equal(built.test.sizes, [2] * 5)
    whole = build.build(config_with(table, "data.test_fraction=0"))
    assert whole.test is whole.simulation.data


def test_the_digest_sees_every_row_and_whose_it_is(table):
    whole = build.data(RunConfig.from_dict(table))
    arrays = whole.arrays
    x = arrays["x"].copy()
    x[-1, -1] = np.nextafter(x[-1, -1], 9, dtype=np.float32)
    owners = whole.client_of_row.copy()
    owners[7] = 1
    from_arrays = jaxfed.FederatedData.from_arrays
    digests = [
        build.digest_of_data(data)
        for data in (whole, from_arrays(arrays | {"x": x}, whole.client_of_row), from_arrays(arrays, owners))
    ]
    assert len(set(digests)) == 3
    assert build.digest_of_data(from_arrays(arrays, whole.client_of_row)) == digests[0]


def in_processes(count, function, monkeypatch):
    """What the function is in each of several processes: threads that give to each other what processes would."""
    own, barrier, given = threading.local(), threading.Barrier(count, timeout=60), [np.zeros(0)] * count

    def everyones(rows):
        given[own.process] = rows
        barrier.wait()
        found = np.concatenate(given)
        barrier.wait()
        return found

    def process(number):
        own.process = number
        return function()

    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(jax, "process_index", lambda: own.process)
    monkeypatch.setattr(build.machines, "everyones", everyones)
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(process, range(count)))


def classes(model):
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    return params["Dense_0"]["bias"].size


@pytest.mark.parametrize("count", [2, 3, 4])
def test_each_process_has_its_own_clients_and_the_data_s_digest(table, count, monkeypatch):
    config = RunConfig.from_dict(table)
    whole = build.data(config)
    digest, train = build.digest_of_data(whole), build.split(config, whole)[0]

    def own():
        data = build.data(config)
        return data.held, build.digest_of_data(data), build.split(config, data)[0], build.model(config, data)

    helds, digests, halves, models = zip(*in_processes(count, own, monkeypatch))
    assert [client for held in helds for client in held] == list(range(5))
    assert set(digests) == {digest}
    for key, rows in train.arrays.items():
        np.testing.assert_array_equal(np.concatenate([half.arrays[key] for half in halves]), rows)
    assert {classes(model) for model in models} == {3}


def test_a_label_of_one_process_alone_is_a_class_of_all(table, monkeypatch):
    config = RunConfig.from_dict(table)
    rows = jaxfed.FederatedData.from_arrays({"x": np.ones((4, 3), np.float32), "y": [0, 1, 6, 1]}, [0, 0, 1, 1])

    def model():
        return build.model(config, rows.shard(3, jax.process_index()))

    assert [classes(made) for made in in_processes(3, model, monkeypatch)] == [7, 7, 7]


def test_a_shard_trains_on_its_own_machine_alone(table):
    built = build.build(RunConfig.from_dict(table)).simulation
    with pytest.raises(ValueError, match="data: expected the rows of clients 0 to 4, this process's part of 1, got Federated"):
        jaxfed.Simulation(built.algorithm, built.data.shard(2, 0), 3).init(key=jax.random.key(0))


def test_of_a_single_client_all_processes_know_the_classes(table, monkeypatch):
    config = RunConfig.from_dict(table)
    rows = jaxfed.FederatedData.from_arrays({"x": np.ones((3, 3), np.float32), "y": [0, 4, 1]}, [0, 0, 0])

    def model():
        return build.model(config, rows.shard(2, jax.process_index()))

    assert [classes(made) for made in in_processes(2, model, monkeypatch)] == [5, 5]
