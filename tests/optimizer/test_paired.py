"""SCAFFOLD's and AdaAlter's halves: declearn's exchange, the paper's denominator, and sums by hand."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed import AdaAlterClient, AdaAlterServer, CohortInfo, Optimizer, RoundStart, ScaffoldClient, ScaffoldServer


def client_round(module, kept, aux, gradients):
    """One client's round over given gradients: outputs, kept, aux."""
    state, outputs = module.start_round(kept, RoundStart(gradients[0], aux=aux)), []
    for gradient in gradients:
        output, state = module.update(gradient, state)
        outputs.append(output)
    return outputs, *module.end_round(state, gradients[0], gradients[0])


def scanned_round(module, kept, aux, gradients):
    """The same in a compiled loop."""
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *gradients)
    state = module.start_round(kept, RoundStart(gradients[0], aux=aux))
    state, outputs = jax.lax.scan(lambda s, g: module.update(g, s)[::-1], state, stacked)
    outputs = [jax.tree.map(lambda x, i=i: x[i], outputs) for i in range(len(gradients))]
    return outputs, *module.end_round(state, gradients[0], gradients[0])


def round_beside_another(module, kept, aux, gradients):
    """The same in the second of two lanes."""
    lanes = [jax.tree.map(lambda g: jnp.stack([g + 1, g]), gradient) for gradient in gradients]
    both = jax.vmap(lambda *g: client_round(module, kept, aux, g))(*lanes)
    return jax.tree.map(lambda x: x[1], both)


ROUNDS = {"eager": client_round, "jit": jax.jit(client_round), "scan": scanned_round, "vmap": round_beside_another}


def uniform_mean(auxes):
    return jax.tree.map(lambda *x: sum(x) / len(x), *auxes)


@golden.needs_golden
@pytest.mark.parametrize("mode", ROUNDS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_golden_exchange(dtype, mode):
    """Four rounds, four clients, partial participation, with declearn's denominator."""
    with jax.enable_x64(dtype == "float64"):
        client, server = ScaffoldClient(), ScaffoldServer.declearn()
        zeros = jax.tree.map(np.zeros_like, golden.sequence("grads", dtype)[0])
        state, kept = server.init(zeros), {i: client.init_kept(zeros, None) for i in range(4)}
        for record in golden.RECORDS["scaffold"]:
            sent, auxes = server.send(state), []
            if record["server_state_sent"]:
                golden.assert_close(sent, record["server_state_sent"], dtype)
            for i, expected in record["clients"].items():
                gradients = [golden.tree(g, dtype) for g in expected["grads"]]
                outputs, kept[int(i)], aux = ROUNDS[mode](client, kept[int(i)], sent, gradients)
                for output, wanted in zip(outputs, expected["outputs"], strict=True):
                    golden.assert_close(output, wanted, dtype)
                golden.assert_close(aux["change"], expected["delta"], dtype)
                golden.assert_close(kept[int(i)].control, expected["local_state"], dtype)
                auxes.append(aux)
            info = CohortInfo(record["round"], 4, 4.0, len(auxes), float(len(auxes)))
            state = server.receive(state, uniform_mean(auxes), info)
            golden.assert_close(state.total, record["s_state_sum"], dtype)
            assert state.weight == record["n_known_clients"]


def first_rounds(denominator):
    """Two rounds in which the only gradients are 1 and 2 (clients 0, 1), then 3 and 4 (clients 2, 3), of ten clients."""
    client, server = ScaffoldClient(), ScaffoldServer(denominator)
    state, controls = server.init(jnp.zeros(())), []
    for round, gradients in enumerate([(1.0, 2.0), (3.0, 4.0)]):
        auxes = []
        for gradient in gradients:
            kept = client.init_kept(jnp.zeros(()), None)
            auxes.append(client_round(client, kept, server.send(state), [jnp.asarray(gradient)])[2])
        state = server.receive(state, uniform_mean(auxes), CohortInfo(round, 10, 10.0, 2, 2.0))
        controls.append(float(server.send(state)))
    return controls


def test_denominators():
    """T-24: two of ten clients with gradients 1 and 2: c = 0.3 in the paper, 1.5 in declearn; then 1.0 and 2.5."""
    np.testing.assert_allclose(first_rounds("population"), [0.3, 1.0], rtol=1e-6)
    np.testing.assert_allclose(first_rounds("seen"), [1.5, 2.5], rtol=1e-6)


def test_option_one_takes_the_full_gradient():
    client, weights = ScaffoldClient("I"), jnp.array([1.0, 2.0])
    start = RoundStart(weights, aux=jnp.zeros(2), full_gradient=lambda w: 3 * w)
    state = client.start_round(client.init_kept(weights, None), start)
    _, state = client.update(jnp.array([9.0, 9.0]), state)
    kept, aux = client.end_round(state, weights, weights)
    np.testing.assert_allclose(kept.control, [3.0, 6.0])
    np.testing.assert_allclose(aux["change"], [3.0, 6.0])


def test_no_step_changes_nothing():
    client, weights = ScaffoldClient(), jnp.array([1.0, 2.0])
    kept = client.init_kept(weights, None)._replace(control=jnp.array([5.0, 6.0]))
    state = client.start_round(kept, RoundStart(weights, aux=jnp.zeros(2)))
    after, aux = client.end_round(state, weights, weights)
    np.testing.assert_array_equal(after.control, kept.control)
    np.testing.assert_array_equal(aux["change"], [0.0, 0.0])


def test_scaffold_means_are_summed_in_float32():
    """T-28: the sum of a thousand bfloat16 tenths would stop at 32."""
    client, tenth = ScaffoldClient(), jnp.array(0.1, jnp.bfloat16)
    state = client.start_round(client.init_kept(tenth, None), RoundStart(tenth, aux=jnp.zeros((), jnp.bfloat16)))
    state = jax.lax.fori_loop(0, 1000, lambda _, s: client.update(tenth, s)[1], state)
    kept, _ = client.end_round(state, tenth, tenth)
    assert kept.control == tenth


@pytest.mark.parametrize(
    ("optimizer", "warns"),
    [
        (Optimizer(0.1, modules=["scaffold-client"]), False),
        (Optimizer(0.1, modules=["scaffold-client", "momentum"]), True),
        (Optimizer(0.1, 0.01, modules=["scaffold-client"]), True),
        (Optimizer(0.1, regularizers=["fedprox"], modules=["scaffold-client"]), True),
        (Optimizer(("exponential-decay", {"base": 0.1, "rate": 0.9}), modules=["scaffold-client"]), True),
        (Optimizer(0.1, modules=[("scaffold-client", {"option": "I"}), "adam"]), False),
    ],
)
def test_advice_about_compositions(optimizer, warns):
    advice = [m.advice(optimizer) for m in optimizer.modules if m.name == "scaffold-client"]
    assert bool(advice[0]) == warns


def test_adaalter_by_hand():
    """B^2 = 4, eps = 3: the denominators are sqrt(4 + 9), sqrt(4 + 18); the squares sent are 1 + 4."""
    client = AdaAlterClient(3.0)
    gradients = [jnp.array(1.0), jnp.array(2.0)]
    outputs, kept, aux = client_round(client, (), jnp.array(4.0), gradients)
    np.testing.assert_allclose(outputs, [1 / np.sqrt(13), 2 / np.sqrt(22)], rtol=1e-6)
    assert kept == ()
    assert aux == 5.0
    server = AdaAlterServer(2.0)
    state = server.receive(server.init(jnp.array(0.0)), jnp.array(5.0), CohortInfo(0, 2, 2.0, 2, 2.0))
    assert server.send(state) == 7.0
