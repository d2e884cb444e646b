"""Bad input gets a sentence before anything runs: what was expected, what came, what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfed
from jaxfed import Epochs, FederatedData, LocalTraining, Mean, Optimizer, Poisson, Simulation, Steps, part
from jaxfed.algorithms import build_recipe
from jaxfed.engine.algorithm import Algorithm

KEY = jax.random.key(0)
X = np.arange(12.0, dtype=np.float32).reshape(6, 2)
OWNERS = [0, 0, 1, 1, 2, 2]
PARAMS = jnp.zeros(2)


def loss(params, batch, key):
    return jnp.square(batch["x"] @ params)


def mean_of(params, batch, key):
    return jnp.square(batch["x"] @ params).mean()


def data(**arrays):
    return FederatedData.from_arrays(arrays or {"x": X}, OWNERS)


def fedavg(**options):
    return jaxfed.fedavg(loss, **{"lrate": 0.1, "batch_size": 2, **options})


def simulation(algorithm=None, source=None, **options):
    return Simulation(algorithm or fedavg(), source or data(), **options)


def run(params=PARAMS, key=KEY, rounds=1, **options):
    made = simulation(**options)
    return made.run(made.init(params, key=key), rounds=rounds)


def client(**options):
    return LocalTraining(loss, Optimizer(0.1, **options), Epochs(batch_size=2))


CASES = {
    # Recipes.
    "no lrate": (lambda: jaxfed.fedprox(loss, batch_size=2), TypeError, "lrate="),
    "lrate of text": (lambda: fedavg(lrate="0.1"), ValueError, "No schedule is called '0.1'"),
    "lrate of None": (lambda: fedavg(lrate=None), TypeError, "lrate: expected an Optimizer or a learning rate"),
    "NaN server lrate": (lambda: fedavg(server_lrate=float("nan")), ValueError, "finite number at least 0, got nan"),
    "negative lrate": (lambda: fedavg(lrate=-1), ValueError, "at least 0, got -1"),
    "batch size 0": (lambda: fedavg(batch_size=0), ValueError, "batch_size: expected an integer at least 1, got 0"),
    "batch size 2.5": (lambda: fedavg(batch_size=2.5), TypeError, "batch_size: expected an integer, got 2.5"),
    "batch size text": (lambda: fedavg(batch_size="2"), TypeError, r"batch_size: expected an integer, got '2' \(str\)"),
    "epochs 0": (lambda: fedavg(epochs=0), ValueError, "epochs: expected an integer at least 1, got 0"),
    "epochs and steps": (lambda: fedavg(epochs=1, steps=2), ValueError, "Expected epochs or steps, got both"),
    "weights unknown": (lambda: fedavg(weights="example"), ValueError, "Did you mean 'examples'"),
    "mu negative": (lambda: jaxfed.fedprox(loss, mu=-1, lrate=0.1, batch_size=2), ValueError, "FedProx.alpha"),
    "momentum 1": (lambda: jaxfed.fedavgm(loss, momentum=1, lrate=0.1, batch_size=2), ValueError, "below 1, got 1"),
    "tau 0": (
        lambda: jaxfed.fedadam(loss, tau=0, lrate=0.1, batch_size=2),
        ValueError,
        "tau: expected a finite number above 0, got 0",
    ),
    "option III": (lambda: jaxfed.scaffold(loss, option="III", lrate=0.1, batch_size=2), ValueError, "'I', 'II'"),
    "unknown recipe": (lambda: build_recipe("fedavgg", loss), ValueError, "Did you mean 'fedavg'"),
    "unknown recipe option": (
        lambda: build_recipe("fedavg", loss, lr=0.1),
        ValueError,
        "fedavg has no option 'lr'. It accepts: lrate, batch_size",
    ),
    # Losses.
    "loss of text": (lambda: jaxfed.fedavg("mse", lrate=0.1, batch_size=2), TypeError, r"expected a loss\(params, batch, key\)"),
    "loss a mean": (lambda: run(algorithm=jaxfed.fedavg(mean_of, lrate=0.1, batch_size=2)), ValueError, "not their mean"),
    "no initial weights": (lambda: simulation().init(key=KEY), ValueError, "plain loss without initial weights"),
    # Batches.
    "rate above 1": (lambda: Poisson(batch_size=2, rate=1.5), ValueError, "Poisson.rate: .* at most 1, got 1.5"),
    "steps True": (lambda: Steps(batch_size=2, steps=True), TypeError, "Steps.steps: expected an integer, got True"),
    "no batch size": (lambda: Epochs(), TypeError, "batch_size"),
    "unknown policy": (lambda: LocalTraining(loss, 0.1, "epoch"), ValueError, "Did you mean 'epochs'"),
    "policy option missing": (lambda: part.build("batches", "epochs"), ValueError, "epochs needs batch_size"),
    # Compositions.
    "lone client half": (
        lambda: Algorithm(client(modules=["scaffold-client"])),
        ValueError,
        "no module of the server does. Give the server's Optimizer its other half",
    ),
    "lone server half": (
        lambda: Algorithm(client(), Optimizer(1.0, modules=["scaffold-server"])),
        ValueError,
        "no module of the client does",
    ),
    "aggregator unknown": (lambda: Algorithm(client(), 1.0, "mean"), ValueError, "No aggregator is called 'mean'"),
    "aggregator a number": (lambda: Algorithm(client(), 1.0, 3), TypeError, "Algorithm.aggregator: expected a Aggregator"),
    "threshold 2": (lambda: part.build("aggregator", ("gradient-masked-averaging", {"threshold": 2})), ValueError, "at most 1"),
    "weights and leaves": (lambda: Mean().aggregate(jnp.ones((3, 2)), jnp.ones(2)), ValueError, r"weights \[C\]"),
    # Simulation.
    "algorithm a function": (lambda: simulation(loss), TypeError, "Use a recipe such as fedavg"),
    "data a dict": (lambda: simulation(source={"x": X}), TypeError, "FederatedData.from_arrays"),
    "cohort too large": (lambda: simulation(cohort_size=4), ValueError, "at most the population of 3 clients, got 4"),
    "cohort 0": (lambda: simulation(cohort_size=0), ValueError, "at least 1, got 0"),
    "cohort and selector": (
        lambda: simulation(cohort_size=2, selector=jaxfed.Everyone()),
        ValueError,
        "cohort_size or selector, got both",
    ),
    "lanes 0": (lambda: simulation(lanes=0), ValueError, "lanes: expected an integer at least 1"),
    "devices of a fraction": (lambda: simulation(devices=2.5), TypeError, "devices: expected an integer, got 2.5"),
    "devices of text": (lambda: simulation(devices="cpu"), TypeError, r"devices: expected an integer, got 'cpu' \(str\)"),
    "one device": (lambda: simulation(devices=jax.devices()[0]), TypeError, "devices: expected an integer, got CpuDevice"),
    "no devices": (lambda: simulation(devices=[]), ValueError, r"devices: expected one or more, each once, got \[\]"),
    "a device twice": (lambda: simulation(devices=jax.devices()[:1] * 2), ValueError, "devices: expected one or more, each once"),
    "devices by number": (lambda: simulation(devices=[0]), TypeError, r"devices: expected Device, got 0 .* jax.devices\(\)"),
    "chunk text": (lambda: simulation(chunk="ten"), TypeError, "chunk: expected an integer"),
    "rounds negative": (lambda: run(rounds=-1), ValueError, "rounds: expected an integer at least 0"),
    "rounds half": (lambda: run(rounds=1.5), TypeError, "rounds: expected an integer, got 1.5"),
    "key a number": (lambda: run(key=0), TypeError, r"jax.random.key\(seed\)"),
    "key of old style": (lambda: run(key=jax.random.PRNGKey(0)), TypeError, "expected one PRNG key"),
    "two keys": (lambda: run(key=jax.random.split(KEY)), TypeError, "expected one PRNG key"),
    "integer weights": (lambda: run(jnp.zeros(2, int)), TypeError, "params.*expected floating numbers"),
    "NaN weights": (lambda: run({"w": jnp.full(2, jnp.nan)}), ValueError, "params, leaf w: expected finite numbers"),
    "no weights": (lambda: run({}), ValueError, "at least one array, got none"),
    "weights of text": (lambda: run({"w": "zeros"}), TypeError, "params, leaf w"),
    "state of another": (lambda: simulation().run(None, rounds=1), TypeError, r"simulation.init\(params, key=...\)"),
    "state of other clients": (
        lambda: simulation().run(
            simulation(source=FederatedData.from_arrays({"x": X}, range(6))).init(PARAMS, key=KEY), rounds=1
        ),
        ValueError,
        "state: expected one of 3 clients, got one of 6",
    ),
    "tune without a state": (lambda: simulation().tune(None), TypeError, r"simulation.init\(params, key=...\)"),
    "differentiate without a state": (
        lambda: jaxfed.differentiable_rounds(simulation(), 1)(fedavg(), None),
        TypeError,
        "state: expected RunState",
    ),
    "sweep a recipe": (lambda: jaxfed.sweep(fedavg(), {"seed": [0]}, rounds=1), TypeError, "simulation: expected Simulation"),
    "sweep a number": (lambda: jaxfed.sweep(simulation(), {3: [0]}, rounds=1), TypeError, "over: expected names as texts, got 3"),
    "sweep over a dict": (
        lambda: jaxfed.sweep(simulation(), {"seed": [0]}, rounds=1, params=PARAMS, eval_data={"x": X}),
        TypeError,
        "eval_data: expected FederatedData",
    ),
    "evaluate on a dict": (lambda: simulation().evaluate(simulation().init(PARAMS, key=KEY), {"x": X}), TypeError, "data"),
    "unknown column": (lambda: run()[1]["los"], ValueError, "Did you mean 'loss'"),
    # Parts.
    "two of one name": (lambda: type("Again", (jaxfed.OptiModule,), {"name": "adam"}), ValueError, "exists already"),
    "unknown field": (lambda: jaxfed.Momentum().replace(betta=1), ValueError, "Did you mean 'beta'"),
    "unknown preset": (lambda: part.build("module", "adam:papre"), ValueError, "Did you mean 'paper'"),
    "preset option": (lambda: part.build("module", ("adam:paper", {"taw": 1})), ValueError, "Did you mean 'tau'"),
    "options in a list": (lambda: part.build("module", ("adam", [0.9])), TypeError, "expected its options by name"),
    "config of a function": (
        lambda: fedavg().client.get_config(),
        ValueError,
        "cannot be written to a config|no registered name",
    ),
    "array as static": (lambda: jaxfed.Momentum(nesterov=np.ones(2)), TypeError, "expected a hashable value"),
    "swept value out of range": (lambda: jaxfed.Momentum(jnp.array([0.5, 1.5])), ValueError, "below 1"),
    "missing update": (lambda: jaxfed.OptiModule().update(PARAMS, ()), NotImplementedError, "defines no update"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case):
    make, error, text = CASES[case]
    with pytest.raises(error, match=text):
        make()


def test_table_is_long():
    assert len(CASES) >= 60


def test_numbers_of_devices_may_come_from_numpy():
    assert simulation(devices=np.int64(1)).devices.count == 1


def test_rows_beyond_their_numbers_are_refused():
    """Rows of clients beyond 2^31 would be others' rows."""
    rows = np.broadcast_to(np.int8(1), (2**31,))
    many = FederatedData({"x": rows}, np.array([0, 2**30, 2**31]), np.arange(2))
    with pytest.raises(ValueError, match=r"at most 2147483647 rows on a machine, got 2147483648. Give paged=True."):
        _ = simulation(source=many, devices=1, paged=False).population


def test_hardly_any_data_is_fine():
    """One client of one row, a cohort of one, a batch larger than the data, an empty client, no rounds."""
    one = FederatedData.from_arrays({"x": X[:1]}, [0])
    state, history = run(source=one, cohort_size=1, algorithm=fedavg(batch_size=64))
    assert len(history) == 1
    assert history[0].counted.all()
    empty = FederatedData.from_arrays({"x": X}, OWNERS, num_clients=5)
    _, history = run(source=empty)
    assert history[0].excluded == [3, 4]
    state, history = run(rounds=0)
    assert len(history) == 0
    assert state.round == 0


def test_warnings_name_the_composition():
    with pytest.warns(UserWarning, match="The server's Optimizer has the regularizer 'fedprox'"):
        Algorithm(client(), Optimizer(1.0, regularizers=["fedprox"]))
    with pytest.warns(UserWarning, match="exact for plain SGD"):
        jaxfed.scaffold(loss, lrate=Optimizer(0.1, modules=["adam"]), batch_size=2)
