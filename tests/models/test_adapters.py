"""Models from Linen and NNX modules and from functions, against the modules' own calls."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from jaxfed import trees
from jaxfed.models import adapters
from jaxfed.models.losses import squared_error

RNG = np.random.default_rng(0)
SAMPLE = {"x": RNG.normal(size=(6, 4)).astype("float32"), "y": RNG.integers(0, 3, 6)}


def _key(seed=0):
    return jax.random.key(seed)


def _batch(mask=(1, 1, 1, 1, 1, 1)):
    return {"x": jnp.array(SAMPLE["x"]), "y": jnp.array(SAMPLE["y"]), "mask": jnp.array(mask, bool)}


class Dense(nn.Module):
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(nn.Dense(8)(x)))
        return nn.Dense(3)(x)


class Normed(nn.Module):
    """Batch norm by itself; the adapter must hand it the mask."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(5)(x))
        return nn.Dense(3)(x)


class NormedByHand(nn.Module):
    """The same, from a module that takes the mask itself."""

    @nn.compact
    def __call__(self, x, mask, deterministic=True):
        x = nn.Dense(5)(x)
        x = nn.BatchNorm(use_running_average=deterministic, momentum=0.9)(x, mask=mask[:, None])
        return nn.Dense(3)(x)


class NnxDense(nnx.Module):
    def __init__(self, inputs, classes, dropout=0.0, *, rngs):
        self.hidden = nnx.Linear(inputs, 8, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.out = nnx.Linear(8, classes, rngs=rngs)

    def __call__(self, x):
        return self.out(self.dropout(nnx.relu(self.hidden(x))))


class NnxNormed(nnx.Module):
    def __init__(self, *, rngs):
        self.layers = nnx.List([nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)])
        self.norm = nnx.BatchNorm(5, momentum=0.9, rngs=rngs)

    def __call__(self, x, mask=None):
        x = self.layers[0](x)
        return self.layers[1](self.norm(x, mask=None if mask is None else mask[:, None]))


def _linen(**options):
    return adapters.from_linen(Dense(**options), SAMPLE)


@functools.cache
def _making(**options):
    return functools.partial(NnxDense, 4, 3, **options)


def _nnx(**options):
    return adapters.from_nnx(_making(**options), SAMPLE)


EVERY = {"linen": _linen, "nnx": _nnx}
NORMED = {
    "linen, mask injected": lambda: adapters.from_linen(Normed(), SAMPLE),
    "linen, mask taken": lambda: adapters.from_linen(NormedByHand(), SAMPLE),
    "nnx": lambda: adapters.from_nnx(NnxNormed, SAMPLE),
}


@jax.jit
def _init_of(model, key):
    return model.init(key)


@jax.jit
def _loss_of(model, params, stats, batch, key):
    return model.loss(params, stats, batch, key)


@jax.jit
def _predict_of(model, params, stats, batch):
    return model.predict(params, stats, batch)


def test_linen_loss_and_gradient_equal_plain_flax():
    model, batch = _linen(), _batch()
    params, stats = _init_of(model, _key())

    def plain(params):
        logits: Any = Dense().apply({"params": params}, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    value, gradient = jax.jit(jax.value_and_grad(lambda p: model.loss(p, stats, batch, _key())[0].mean()))(params)
    expected, expected_gradient = jax.jit(jax.value_and_grad(plain))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), gradient, expected_gradient)


def test_linen_and_nnx_with_the_same_weights_agree():
    linen, other, batch = _linen(), _nnx(), _batch()
    params, stats = _init_of(linen, _key())
    renamed = {"hidden": params["Dense_0"], "out": params["Dense_1"]}
    for key in (None, _key()):
        values, _ = _loss_of(linen, params, stats, batch, key)
        np.testing.assert_allclose(_loss_of(other, renamed, {}, batch, key)[0], values, rtol=1e-6)
    np.testing.assert_allclose(_predict_of(other, renamed, {}, batch), _predict_of(linen, params, stats, batch), rtol=1e-6)


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_weights_are_plain_dicts_drawn_from_the_key(make):
    model = make()
    (params, stats), (other, _) = _init_of(model, _key()), _init_of(model, _key(1))
    assert type(params) is dict
    assert all(type(layer) is dict for layer in params.values())
    assert stats == {}
    assert sorted(name.split("/")[-1] for name in trees.names(params)) == ["bias", "bias", "kernel", "kernel"]
    assert jax.tree.structure(params) == jax.tree.structure(other)
    assert trees.norm(trees.subtract(params, other)) > 0.1
    stacked, _ = jax.jit(jax.vmap(model.init))(jax.random.split(_key(), 2))
    assert jax.tree.leaves(stacked)[0].shape[0] == 2


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_metrics_are_loss_and_accuracy_of_each_example(make):
    model, batch = make(dropout=0.9), _batch()
    params, stats = _init_of(model, _key())
    metrics = model.metrics(params, stats, batch)
    assert sorted(metrics) == ["accuracy", "loss"]
    np.testing.assert_allclose(metrics["loss"], _loss_of(model, params, stats, batch, None)[0])
    outputs = _predict_of(model, params, stats, batch)
    np.testing.assert_array_equal(metrics["accuracy"], outputs.argmax(-1) == batch["y"])
    for name, values in model.measure(outputs, batch).items():
        np.testing.assert_array_equal(values, metrics[name])


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_dropout_follows_the_key_and_is_off_without_one(make):
    model, batch = make(dropout=0.5), _batch()
    params, stats = _init_of(model, _key())
    run = jax.jit(lambda key: _loss_of(model, params, stats, batch, key)[0])
    np.testing.assert_array_equal(run(_key()), run(_key()))
    assert not np.allclose(run(_key()), run(_key(1)))
    off = _loss_of(make(dropout=0.0), params, stats, batch, None)[0]
    np.testing.assert_allclose(_loss_of(model, params, stats, batch, None)[0], off, rtol=1e-6)


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_dropout_keeps_the_stated_share(make):
    """With a rate of 0.25 on 8 units, hidden units survive in 3 of 4 draws: 4 sigma of 8,000 Bernoulli draws is 0.02."""
    model = make(dropout=0.25)
    params = jax.tree.map(jnp.ones_like, _init_of(model, _key())[0])
    batch = jax.tree.map(lambda x: x[:1], _batch()) | {"x": jnp.ones((1, 4))}
    task = model.loss.func

    def logit(key):
        return task.network.train(params, {}, batch["x"], batch["mask"], key)[0][0, 0]

    logits = jax.jit(jax.vmap(logit))(jax.random.split(_key(), 1000))  # one bias of 1, and 8 units of 5 / 0.75 where kept
    kept = (logits - 1.0) * 0.75 / 5.0 / 8.0
    assert abs(kept.mean() - 0.75) < 0.02
    assert 0.12 < kept.std() < 0.19  # sqrt(.25 * .75 / 8) = 0.153: units fall one by one


@pytest.mark.parametrize("make", NORMED.values(), ids=NORMED)
def test_batch_norm_counts_real_rows_only(make):
    model, mask = make(), (1, 1, 0, 1, 0, 0)
    params, stats = _init_of(model, _key())
    batch = _batch(mask)
    real = jax.tree.map(lambda x: x[np.array(mask, bool)], batch)
    values, new = _loss_of(model, params, stats, batch, _key())
    expected, expected_new = _loss_of(model, params, stats, real, _key())
    np.testing.assert_allclose(values[np.array(mask, bool)], expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), new, expected_new)


@pytest.mark.parametrize("make", NORMED.values(), ids=NORMED)
def test_running_statistics_are_a_moving_average_of_the_real_rows(make):
    model, batch = make(), _batch((1, 1, 1, 1, 0, 0))
    params, stats = _init_of(model, _key())
    first = params["Dense_0"] if "Dense_0" in params else params["layers"][0]
    hidden = (SAMPLE["x"] @ np.asarray(first["kernel"]) + np.asarray(first["bias"]))[:4]
    _, new = _loss_of(model, params, stats, batch, _key())
    (mean, variance) = jax.tree.leaves(new)
    np.testing.assert_allclose(mean, 0.1 * hidden.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(variance, 0.9 + 0.1 * hidden.var(0), rtol=1e-4)


@pytest.mark.parametrize("make", NORMED.values(), ids=NORMED)
def test_statistics_stay_in_evaluation_and_in_a_batch_without_real_rows(make):
    model = make()
    params, stats = _init_of(model, _key())
    stats = jax.tree.map(lambda x: x + 0.5, stats)
    for batch, key in ((_batch(), None), (_batch((0,) * 6), _key())):
        values, new = _loss_of(model, params, stats, batch, key)
        assert jnp.isfinite(values).all()
        jax.tree.map(np.testing.assert_array_equal, new, stats)
    shifted = _predict_of(model, params, jax.tree.map(lambda x: x + 1.0, stats), _batch())
    assert not np.allclose(shifted, _predict_of(model, params, stats, _batch()))  # evaluation reads the statistics


def test_a_batch_norm_over_folded_rows_asks_for_a_mask():
    class Folded(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(x.reshape(-1, 2))
            return nn.Dense(3)(x.reshape(-1, 4))

    with pytest.raises(ValueError, match="unclear which entries belong to padded rows"):
        adapters.from_linen(Folded(), SAMPLE)


@pytest.mark.parametrize("make", [*EVERY.values(), *list(NORMED.values())[::2]], ids=[*EVERY, *list(NORMED)[::2]])
def test_clients_side_by_side_equal_a_loop(make):
    """Own weights and keys, shared statistics: what the lanes of a round do."""
    model, batch = make(), _batch((1, 1, 1, 1, 1, 0))
    keys = jax.random.split(_key(1), 3)
    clients = [_init_of(model, key) for key in jax.random.split(_key(), 3)]
    params, stats = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params for params, _ in clients)), clients[0][1]

    @jax.jit
    def step(params, key):
        def mean_loss(params):
            values, new_stats = model.loss(params, stats, batch, key)
            return values.mean(), new_stats

        return jax.value_and_grad(mean_loss, has_aux=True)(params)

    together = jax.jit(jax.vmap(step))(params, keys)
    for i in range(3):
        alone = step(jax.tree.map(lambda x, i=i: x[i], params), keys[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-6), together, alone)


@pytest.mark.parametrize("make", [*EVERY.values(), *NORMED.values()], ids=[*EVERY, *NORMED])
def test_a_model_made_anew_does_not_retrace(make):
    traces = []

    @jax.jit
    def run(model, params, stats, batch, key):
        traces.append(1)
        return model.loss(params, stats, batch, key)

    for _ in range(2):
        model = make()
        params, stats = _init_of(model, _key())
        _, stats = run(model, params, stats, _batch(), _key())
        run(model, params, stats, _batch(), _key(1))
    assert len(traces) == 1


def test_an_nnx_instance_keeps_its_weights():
    module = NnxDense(4, 3, dropout=0.5, rngs=nnx.Rngs(7))
    model, batch = adapters.from_nnx(module, SAMPLE), _batch()
    params, stats = _init_of(model, _key(3))
    np.testing.assert_array_equal(params["hidden"]["kernel"], module.hidden.kernel[...])
    module.hidden.kernel[...] = jnp.zeros((4, 8))
    assert np.abs(_init_of(model, _key())[0]["hidden"]["kernel"]).sum() > 0  # the Model holds copies
    assert not np.allclose(_loss_of(model, params, stats, batch, _key())[0], _loss_of(model, params, stats, batch, None)[0])


def test_other_keys_and_losses():
    sample = {"pixels": SAMPLE["x"], "target": SAMPLE["x"][:, :1]}
    options = {"loss": squared_error, "input_key": "pixels", "label_key": "target"}
    model = adapters.from_linen(nn.Dense(1), sample, **options)
    params, stats = _init_of(model, _key())
    batch = {key: jnp.array(value) for key, value in sample.items()} | {"mask": jnp.ones(6, bool)}
    metrics = model.metrics(params, stats, batch)
    expected = (SAMPLE["x"] @ np.asarray(params["kernel"]) - sample["target"])[:, 0] ** 2
    assert list(metrics) == ["loss"]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4, atol=1e-6)


def test_an_autoencoder_needs_no_labels():
    def reconstruction(outputs, batch):
        return jnp.square(outputs - batch["x"]).mean(-1)

    model = adapters.from_linen(nn.Dense(4), {"x": SAMPLE["x"]}, loss=reconstruction, label_key=None)
    params, stats = _init_of(model, _key())
    assert _loss_of(model, params, stats, {"x": _batch()["x"], "mask": jnp.ones(6, bool)}, _key())[0].shape == (6,)


def test_metrics_of_ones_own_replace_the_default():
    model = adapters.from_linen(nn.Dense(3), SAMPLE, metrics={"largest": lambda logits, batch: logits.max(-1)})
    params, stats = _init_of(model, _key())
    metrics = model.metrics(params, stats, _batch())
    assert sorted(metrics) == ["largest", "loss"]
    np.testing.assert_allclose(metrics["largest"], _predict_of(model, params, stats, _batch()).max(-1))


def test_a_train_argument_can_be_named():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x, train=True, deterministic=True):
            return nn.Dense(3)(x) + 10.0 * train + 100.0 * deterministic

    both = adapters.from_linen(Both(), SAMPLE)
    params, stats = both.init(_key())
    base = nn.Dense(3).apply({"params": params["Dense_0"]}, SAMPLE["x"])
    np.testing.assert_allclose(_predict_of(both, params, stats, _batch()) - base, 100.0, rtol=1e-5)
    one = adapters.from_linen(Both(), SAMPLE, train_argument="train")
    np.testing.assert_allclose(_predict_of(one, params, stats, _batch()) - base, 100.0, rtol=1e-5)
    other = adapters.from_linen(Both(), SAMPLE, train_argument="deterministic")
    np.testing.assert_allclose(_predict_of(other, params, stats, _batch()) - base, 110.0, rtol=1e-5)


def test_from_functions_equals_the_functions():
    model = adapters.from_functions(_init, _loss, _predict)
    params, stats = _init_of(model, _key())
    values, new = _loss_of(model, params, stats, _batch(), _key())
    np.testing.assert_allclose(values, _loss(params, _batch(), _key())[0])
    np.testing.assert_allclose(_predict_of(model, params, stats, _batch()), _predict(params, _batch()))
    assert (stats, new) == ({}, {})
    assert sorted(model.metrics(params, stats, _batch())) == ["loss", "size"]
    assert adapters.from_functions(_init, _loss, _predict) == model


def _init(key):
    return {"w": jax.random.normal(key, (4,))}


def _predict(params, batch):
    return batch["x"] @ params["w"]


def _loss(params, batch, key):
    values = (_predict(params, batch) - batch["y"]) ** 2
    return values, {"size": jnp.abs(values)}


class Weightless(nn.Module):
    def __call__(self, x):
        return x


class Unmasked(nnx.Module):
    def __init__(self, *, rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(x)


UNTYPED: Any = adapters  # arguments of wrong types on purpose


def _with(**changes):
    return {**SAMPLE, **changes}


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: UNTYPED.from_linen(Weightless(), SAMPLE), ValueError, "no weights to train"),
        (lambda: UNTYPED.from_linen(Dense, SAMPLE), TypeError, "Pass an instance"),
        (lambda: UNTYPED.from_linen(NnxDense(4, 3, rngs=nnx.Rngs(0)), SAMPLE), TypeError, "NNX modules are for from_nnx"),
        (lambda: UNTYPED.from_linen(Dense(), SAMPLE, input_key="image"), ValueError, "no key 'image'. Its keys: x, y"),
        (lambda: UNTYPED.from_linen(Dense(), SAMPLE, label_key="label"), ValueError, "no key 'label'. Its keys: x, y"),
        (lambda: UNTYPED.from_linen(Dense(), _with(y=np.zeros(6))), TypeError, "expected integer labels, got float"),
        (
            lambda: UNTYPED.from_linen(Dense(), _with(x=np.zeros((0, 4)))),
            ValueError,
            r"sample\['x'\]: expected at least one row",
        ),
        (lambda: UNTYPED.from_linen(Dense(), SAMPLE["x"]), TypeError, "Pass arrays by key"),
        (
            lambda: UNTYPED.from_linen(Dense(), SAMPLE, train_argument="training"),
            ValueError,
            "takes: x, train",
        ),
        (lambda: UNTYPED.from_linen(Dense(), SAMPLE, train_argument="dropout"), ValueError, "expected one of 'train'"),
        (
            lambda: UNTYPED.from_linen(Dense(), SAMPLE, loss=lambda o, b: o.mean()),
            ValueError,
            r"got shape \(\)",
        ),
        (lambda: UNTYPED.from_linen(Dense(), SAMPLE, loss="mse"), TypeError, "loss: expected a function"),
        (lambda: UNTYPED.from_linen(Dense(), SAMPLE, metrics={"f1": 3}), TypeError, "f1: expected a function"),
        (lambda: UNTYPED.from_nnx(Unmasked, SAMPLE), ValueError, "Unmasked has batch norms but its __call__ takes no mask"),
        (lambda: UNTYPED.from_nnx("mlp", SAMPLE), TypeError, "expected an NNX module or a function, got 'mlp'"),
        (lambda: UNTYPED.from_nnx(lambda rngs: 3, SAMPLE), TypeError, "functools.partial"),
        (lambda: UNTYPED.from_functions(3, _loss, _predict), TypeError, "expected a function init"),
        (lambda: UNTYPED.from_functions(_init, 3, _predict), TypeError, "loss: expected a loss"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_remedy(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_a_batch_without_the_inputs_names_its_keys():
    model = _linen()
    params, stats = _init_of(model, _key())
    with pytest.raises(ValueError, match=r"The batch has no key 'x'\. Its keys: image, mask"):
        _predict_of(model, params, stats, {"image": jnp.ones((2, 4)), "mask": jnp.ones(2, bool)})
