"""Recipes: which parts they choose, what they refuse, and what compositions are warned of."""

import jax.numpy as jnp
import pytest

import jaxfed
from jaxfed import (
    Adagrad,
    Adam,
    Algorithm,
    Buffered,
    Epochs,
    FedProx,
    LocalTraining,
    Mean,
    Momentum,
    Optimizer,
    ScaffoldClient,
    ScaffoldServer,
    Steps,
    Yogi,
    build_recipe,
)
from jaxfed.algorithms import RECIPES, accepted_options
from jaxfed.optimizer.schedules import ExponentialDecay

OPTIONS = {"lrate": 0.1, "batch_size": 8}


def loss(params, batch, key):
    return batch["x"] * params


SERVERS = {
    "fedavg": Optimizer(1.0),
    "fedprox": Optimizer(1.0),
    "fedavgm": Optimizer(1.0, modules=[Momentum(0.9)]),
    "fedadagrad": Optimizer(0.1, modules=[Adagrad.paper(tau=1e-3)]),
    "fedadam": Optimizer(0.01, modules=[Adam.paper(tau=1e-3, beta_1=0.9, beta_2=0.99)]),
    "fedyogi": Optimizer(0.01, modules=[Yogi.paper(tau=1e-3, beta_1=0.9, beta_2=0.99)]),
    "scaffold": Optimizer(1.0, modules=[ScaffoldServer()]),
    "adaalter": Optimizer(1.0, modules=["adaalter-server"]),
}


@pytest.mark.parametrize("recipe", [RECIPES[name] for name in SERVERS], ids=SERVERS)
def test_every_recipe_takes_the_options_that_all_share(recipe):
    algorithm = recipe(loss, lrate=0.3, batch_size=8, steps=7, server_lrate=0.5, weights="uniform")
    assert algorithm.client.optimizer.lrate == 0.3
    assert algorithm.client.batches == Steps(8, steps=7)
    assert algorithm.server.lrate == 0.5
    assert algorithm.aggregator == Mean("uniform")
    assert recipe(loss, **OPTIONS).aggregator == Mean("examples")
    assert recipe(loss, **OPTIONS).client.batches == Epochs(8, epochs=1)
    assert recipe(loss, **OPTIONS, epochs=3).client.batches == Epochs(8, epochs=3)


@pytest.mark.parametrize("name", SERVERS)
def test_the_servers_of_the_recipes(name):
    assert RECIPES[name](loss, **OPTIONS).server == SERVERS[name]


def test_a_recipe_adds_to_whole_optimizers():
    client = Optimizer(0.1, modules=["momentum"], regularizers=["ridge"])
    server = Optimizer(ExponentialDecay(1.0, 0.9), modules=["l2-global-clipping"])
    prox = jaxfed.fedprox(loss, mu=0.3, lrate=client, batch_size=8)
    assert prox.client.optimizer == client.replace(regularizers=(FedProx(0.3), *client.regularizers))
    adam = jaxfed.fedadam(loss, lrate=client, server_lrate=server, batch_size=8)
    assert adam.server == server.replace(modules=(*server.modules, Adam.paper(tau=1e-3)))
    assert adam.client.optimizer == client


def test_fedbuff_weighs_late_updates():
    assert jaxfed.fedbuff(loss, **OPTIONS).aggregator == Buffered("uniform", 0.5)
    assert jaxfed.fedbuff(loss, power=1.0, weights="examples", **OPTIONS).aggregator == Buffered("examples", 1.0)


def test_scaffold_and_its_options():
    algorithm = jaxfed.scaffold(loss, option="I", denominator="seen", **OPTIONS)
    assert algorithm.client.optimizer.modules == (ScaffoldClient("I"),)
    assert algorithm.server.modules == (ScaffoldServer("seen"),)


def test_constants_of_the_paper():
    [adam] = jaxfed.fedadam(loss, tau=0.1, **OPTIONS).server.modules
    assert (adam.eps, adam.init_v, adam.bias_correction) == (0.1, pytest.approx(0.01), "none")


def compose(client=0.1, server=1.0):
    return Algorithm(LocalTraining(loss, client, Epochs(8)), server)


LONE = [
    (
        lambda: compose(Optimizer(0.1, modules=["scaffold-client"])),
        "The client has 'scaffold-client', which exchanges the auxiliary variable 'scaffold', but no module of the server does. "
        "Give the server's Optimizer its other half.",
    ),
    (
        lambda: compose(server=Optimizer(1.0, modules=["scaffold-server"])),
        "The server has 'scaffold-server', which exchanges the auxiliary variable 'scaffold', but no module of the client does. "
        "Give the client's Optimizer its other half.",
    ),
    (
        lambda: compose(Optimizer(0.1, modules=["scaffold-client"]), Optimizer(1.0, modules=["adaalter-server"])),
        "The client has 'scaffold-client', which exchanges the auxiliary variable 'scaffold', but no module of the server does. ",
    ),
    (
        lambda: Optimizer(0.1, modules=["scaffold-client", "adam", ScaffoldClient("I")]),
        "Optimizer: two parts exchange the auxiliary variable 'scaffold'; leave one out.",
    ),
    (
        lambda: jaxfed.scaffold(loss, lrate=Optimizer(0.1, modules=["scaffold-client"]), batch_size=8),
        "Optimizer: two parts exchange the auxiliary variable 'scaffold'; leave one out.",
    ),
]


@pytest.mark.parametrize(("make", "text"), LONE)
def test_halves_without_their_other_half_are_refused(make, text):
    with pytest.raises(ValueError, match="auxiliary variable") as error:
        make()
    assert str(error.value).startswith(text)


PLAIN_SGD = (
    "scaffold-client (option II) is exact for plain SGD with a constant learning rate, no decay, and no other module or "
    "regularizer. Drop them, or use ScaffoldClient(option='I')."
)
SERVER_REGULARIZER = (
    "The server's Optimizer has the regularizer 'fedprox': it pulls towards the weights that the round began with, which are the "
    "server's own."
)
NOT_PLAIN = {
    "adam": Optimizer(0.1, modules=["adam"]),
    "regularizer": Optimizer(0.1, regularizers=["ridge"]),
    "decay": Optimizer(0.1, w_decay=0.01),
    "schedule": Optimizer(ExponentialDecay(0.1, 0.9)),
    "by label": Optimizer({"*": 0.1}),
}


@pytest.mark.parametrize("optimizer", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_scaffold_with_anything_but_sgd_warns(optimizer):
    with pytest.warns(UserWarning, match="plain SGD") as caught:
        jaxfed.scaffold(loss, lrate=optimizer, batch_size=8)
    assert [str(warning.message) for warning in caught] == [PLAIN_SGD]
    jaxfed.scaffold(loss, option="I", lrate=optimizer, batch_size=8)  # warnings are errors here


CONSTANT = [0.1, jnp.float32(0.1), jnp.array([0.1, 0.2])]


@pytest.mark.parametrize("lrate", CONSTANT, ids=["float", "jax", "swept"])
def test_scaffold_with_plain_sgd_does_not_warn(lrate):
    jaxfed.scaffold(loss, lrate=lrate, batch_size=8)


def test_a_regularizer_at_the_server_warns():
    with pytest.warns(UserWarning, match="regularizer") as caught:
        compose(server=Optimizer(1.0, regularizers=["fedprox"]))
    assert [str(warning.message) for warning in caught] == [SERVER_REGULARIZER]


BAD = [
    (
        lambda: jaxfed.fedavg(loss, **OPTIONS, epochs=1, steps=2),
        ValueError,
        "Expected epochs or steps, got both: epochs=1, steps=",
    ),
    (
        lambda: jaxfed.fedprox(loss, mu=-1.0, **OPTIONS),
        ValueError,
        "FedProx.alpha: expected a finite number at least 0, got",
    ),
    (lambda: jaxfed.fedprox(loss, batch_size=8), TypeError, "needs lrate="),
    (lambda: jaxfed.scaffold(loss, batch_size=8), TypeError, "needs lrate="),
    (lambda: jaxfed.fedavgm(loss, momentum=1.0, **OPTIONS), ValueError, "Momentum.beta: .* below 1, got 1.0"),
    (lambda: jaxfed.fedavg(loss, lrate=None, batch_size=8), TypeError, "lrate: expected an Optimizer or a learning rate"),
    (lambda: jaxfed.fedavg(loss, **OPTIONS, server_lrate="x"), ValueError, "No schedule is called 'x'"),
    (lambda: jaxfed.fedavg(loss, **OPTIONS, weights="rows"), ValueError, "Mean.by: expected one of 'examples'"),
    (lambda: jaxfed.scaffold(loss, option="III", **OPTIONS), ValueError, "ScaffoldClient.option: expected one of 'I', 'II'"),
    (
        lambda: jaxfed.scaffold(loss, option="I", denominator="n", **OPTIONS),
        ValueError,
        "denominator: expected one of 'population'",
    ),
    (lambda: jaxfed.fedavg(loss, **OPTIONS, optimiser=3), TypeError, "optimiser"),
    (lambda: build_recipe("fedavgg", loss), ValueError, "No algorithm is called 'fedavgg'. Did you mean 'fedavg"),
    (lambda: build_recipe("fedprox", loss, nu=1, **OPTIONS), ValueError, "fedprox has no option 'nu'. It accepts: mu, lrate, "),
    (lambda: build_recipe("fedavg", loss, mu=1, **OPTIONS), ValueError, "fedavg has no option 'mu'"),
]


@pytest.mark.parametrize(("make", "error", "text"), BAD)
def test_bad_options_are_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize("name", SERVERS)
def test_recipes_by_name(name):
    assert build_recipe(name, loss, **OPTIONS) == RECIPES[name](loss, **OPTIONS)
    assert {"lrate", "batch_size", "epochs", "steps", "server_lrate", "weights"} <= set(accepted_options(RECIPES[name]))


def test_missing_options_are_named():
    with pytest.raises((TypeError, ValueError), match="batch_size"):
        build_recipe("fedadam", loss, lrate=0.1)
