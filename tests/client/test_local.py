"""Local training on one client, as a deployment runs it: against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed import Broadcast, ClientRows, Epochs, LocalTraining, Optimizer, OptiModule, Poisson, Steps

ROWS = {"a": np.array([1.0, 2.0, 0.5, 3.0, 1.5], np.float32), "b": np.array([0.0, 1.0, -1.0, 2.0, 0.5], np.float32)}
RATE = 0.1


def loss(params, batch, key):
    return 0.5 * batch["a"] * jnp.square(params["w"] - batch["b"])


def start(value=3.0, aux=None):
    return Broadcast({"w": jnp.array(value, jnp.float32)}, {}, aux or {}, jnp.zeros((), jnp.int32))


@jax.jit
def first_round(client, start, rows, key):
    init_key, run_key = jax.random.split(key)
    return client.run(start, client.init_kept(start, init_key), rows, run_key)


def run(client, start, rows):
    return first_round(client, start, rows, jax.random.key(4))


def by_hand(batches, value=3.0):
    """SGD over ``batches`` of row numbers: the last weight and the mean loss."""
    w, losses = value, []
    for index in batches:
        a, b = ROWS["a"][index], ROWS["b"][index]
        losses.append((0.5 * a * (w - b) ** 2).mean())
        w = w - RATE * (a * (w - b)).mean()
    return w, np.mean(losses)


IN_ORDER = [[0, 1], [2, 3], [4]]


def test_epochs_in_order_are_a_plain_loop():
    client = LocalTraining(loss, RATE, Epochs(2, shuffle=False, epochs=2))
    upload, _ = run(client, start(), ClientRows.of(ROWS))
    end, mean_loss = by_hand(IN_ORDER * 2)
    assert float(upload.delta["w"]) == pytest.approx(3.0 - end, rel=1e-5)
    assert {name: float(x) for name, x in upload.metrics.items()} == pytest.approx(
        {"examples": 5, "steps": 6, "loss": mean_loss}, rel=1e-5
    )
    assert upload.aux == {}
    assert upload.stats == {}


def test_a_full_batch_is_gradient_descent():
    upload, _ = run(LocalTraining(loss, RATE, Steps(None, steps=3)), start(), ClientRows.of(ROWS))
    assert float(upload.delta["w"]) == pytest.approx(3.0 - by_hand([range(5)] * 3)[0], rel=1e-5)


def test_a_schedule_counts_local_steps():
    upload, _ = run(LocalTraining(slope, Optimizer(_step_number), Steps(2, steps=4)), start(), ClientRows.of(ROWS))
    assert float(upload.delta["w"]) == 0 + 1 + 2 + 3


def _step_number(step):
    return jnp.asarray(step, jnp.float32)


def slope(params, batch, key):
    return jnp.broadcast_to(params["w"], batch["mask"].shape)


class Witness(OptiModule):
    """Sends what a round's start told it."""

    aux_name = "witness"

    def start_round(self, kept, start):
        return {"gradient": start.full_gradient(start.params), "aux": start.aux, "noise": jax.random.uniform(start.key)}

    def update(self, updates, state, params=None):
        return updates, state

    def end_round(self, state, begin, end):
        return (), {**state, "begin": begin, "end": end}


@pytest.mark.parametrize("policy", [Epochs(1), Epochs(3), Epochs(None), Steps(2, steps=2), Poisson(2, steps=2)], ids=str)
def test_the_full_gradient_is_of_the_mean_over_all_rows(policy):
    client = LocalTraining(loss, Optimizer(RATE, modules=[Witness()]), policy)
    upload, _ = run(client, start(aux={"witness": jnp.array(7.0)}), ClientRows.of(ROWS))
    aux = upload.aux["witness"]
    assert float(aux["gradient"]["w"]) == pytest.approx((ROWS["a"] * (3.0 - ROWS["b"])).mean(), rel=1e-6)
    assert float(aux["aux"]) == 7.0
    assert float(aux["begin"]["w"]) == 3.0
    assert float(aux["begin"]["w"] - aux["end"]["w"]) == pytest.approx(float(upload.delta["w"]), rel=1e-6)


def noisy(params, batch, key):
    return loss(params, batch, key) * jax.random.uniform(key, batch["b"].shape)


def test_the_full_gradient_draws_from_keys_of_its_own():
    client = LocalTraining(noisy, Optimizer(RATE, modules=[Witness()]), Epochs(2))
    upload, _ = run(client, start(aux={"witness": jnp.array(7.0)}), ClientRows.of(ROWS))
    assert np.isfinite(upload.aux["witness"]["gradient"]["w"])


def test_without_rows_nothing_moves():
    upload, _ = run(LocalTraining(loss, RATE, Epochs(2)), start(), ClientRows(dict(ROWS), 5, 0, 1.0, 5))
    assert float(upload.delta["w"]) == 0
    assert {name: float(x) for name, x in upload.metrics.items()} == {"examples": 0, "steps": 0, "loss": 0}


def test_uploads_are_in_float32_whatever_the_weights():
    broadcast = Broadcast({"w": jnp.array(3.0, jnp.bfloat16)}, {}, {}, 0)
    upload, _ = run(LocalTraining(loss, RATE, Epochs(2)), broadcast, ClientRows.of(ROWS))
    assert upload.delta["w"].dtype == jnp.float32
    assert upload.metrics["loss"].dtype == jnp.float32


def test_kept_states_go_into_the_next_round():
    optimizer = Optimizer(1.0, modules=[("momentum", {"beta": 0.5})], keep_state=True)
    client, rows = LocalTraining(slope, optimizer, Steps(None, steps=2)), ClientRows.of(ROWS)
    first, kept = run(client, start(), rows)
    second, _ = jax.jit(client.run)(start(), kept, rows, jax.random.key(5))
    assert float(first.delta["w"]) == 1 + 1.5
    assert float(second.delta["w"]) == 1.75 + 1.875


def test_options_in_a_dict_and_a_plain_rate_make_optimizers():
    client = LocalTraining(loss, {"lrate": 0.1, "modules": ["adam"]}, Epochs(2))
    assert client.optimizer == Optimizer(0.1, modules=["adam"])
    assert LocalTraining(loss, 0.1, ("steps", {"batch_size": 2, "steps": 3})).batches == Steps(2, steps=3)


BAD = [
    (lambda: LocalTraining(3, 0.1, Epochs(2)), TypeError, r"LocalTraining.loss: expected a loss\(params, batch, key\)"),
    (lambda: LocalTraining(loss, "fast", Epochs(2)), ValueError, "'fast'"),
    (lambda: LocalTraining(loss, -0.1, Epochs(2)), ValueError, "at least 0, got -0.1"),
    (
        lambda: LocalTraining(loss, None, Epochs(2)),
        TypeError,
        "LocalTraining.optimizer: expected an Optimizer or a learning rate",
    ),
    (lambda: LocalTraining(loss, 0.1, 2), TypeError, "LocalTraining.batches: expected a BatchPolicy"),
    (lambda: LocalTraining(loss, 0.1, Epochs), TypeError, r"got the class Epochs; pass an instance"),
]


@pytest.mark.parametrize(("make", "error", "text"), BAD)
def test_bad_parts_are_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()
