"""Gradients with products of rounded factors: against products written out, in a jaxpr, and through whole rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine.oracle import softmax_data, softmax_loss, softmax_params

import jaxfed
from jaxfed import HalfPrecision, MeanGradient, Model
from jaxfed.client.gradients import GradientRule, as_model, masked_mean
from jaxfed.client.precision import with_products_in

RNG = np.random.default_rng(0)
X, Y = (jnp.asarray(RNG.normal(size=(8, 5)), jnp.float32), jnp.asarray(RNG.integers(0, 3, 8)))
W = {"a": jnp.asarray(RNG.normal(size=(5, 7)), jnp.float32), "b": jnp.asarray(RNG.normal(size=(7, 3)), jnp.float32)}
BATCH = {"x": X, "y": Y, "mask": jnp.arange(8) < 6}
TYPES = ["bfloat16", "float16"]
KEY = jax.random.key(0)


def narrow(x, dtype):
    """Rounded by NumPy's own conversion, and wide again."""
    return np.asarray(jnp.asarray(np.asarray(x, np.float32)).astype(dtype), np.float64)


def two_layers(params, batch, key):
    hidden = jnp.tanh(batch["x"] @ params["a"])
    chances = jax.nn.log_softmax(hidden @ params["b"])
    return -jnp.take_along_axis(chances, batch["y"][:, None], axis=1)[:, 0]


def by_hand(params, batch, dtype):
    """Loss and gradient of :func:`two_layers` in float64, every product of rounded factors."""

    def dot(x, y):
        return narrow(x, dtype) @ narrow(y, dtype)

    mask, labels = np.asarray(batch["mask"], float), np.eye(3)[np.asarray(batch["y"])]
    hidden = np.tanh(dot(batch["x"], params["a"]))
    logits = dot(hidden, params["b"])
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss = -(np.log(chances) * labels).sum(1) @ mask / mask.sum()
    slope = (chances - labels) * mask[:, None] / mask.sum()
    back = dot(slope, np.asarray(params["b"]).T) * (1 - hidden**2)
    return loss, {"a": dot(np.asarray(batch["x"]).T, back), "b": dot(hidden.T, slope)}


@pytest.mark.parametrize("dtype", TYPES)
def test_gradient_is_that_of_rounded_factors(dtype):
    """Far closer to the products written out than these are to float32: factors whose last bit differs leave 1e-4."""
    model = as_model("loss", two_layers)
    loss, _, gradient = HalfPrecision(dtype=dtype)(model, W, {}, BATCH, KEY)
    exact, expected = by_hand(W, BATCH, dtype)
    wide = MeanGradient()(model, W, {}, BATCH, KEY)[2]
    assert float(loss) == pytest.approx(exact, rel=2e-5)
    for name, value in gradient.items():
        assert value.dtype == jnp.float32
        apart = np.abs(np.asarray(value) - expected[name]).max()
        assert apart < 0.3 * np.abs(np.asarray(wide[name]) - expected[name]).max()


def test_factors_are_the_narrow_ones_and_sums_float32_on_accelerators(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    model = as_model("loss", two_layers)
    rule = HalfPrecision()
    program = jax.make_jaxpr(lambda params: rule(model, params, {}, BATCH, KEY))(W)
    products = list(equations(program.jaxpr, "dot_general"))
    assert len(products) == 5  # two forward; the slopes of a, b and the hidden layer
    for eqn in products:
        assert [atom.aval.dtype for atom in (*eqn.invars, *eqn.outvars)] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    assert all(x.aval.dtype == jnp.float32 for x in program.jaxpr.outvars)


def equations(jaxpr, name):
    """Those of one primitive, inside of loops and calls too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(getattr(inner, "jaxpr", inner), name)


def loops(x, w):
    """A product in a scan, a while loop, a branch, a checkpoint and a jit."""
    x, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, length=2)
    x = jax.lax.fori_loop(0, jnp.asarray(2), lambda i, c: jnp.tanh(c @ w), x)
    x = jax.lax.cond(x.sum() > 1e9, lambda c: c, lambda c: jnp.tanh(c @ w), x)
    return jax.jit(lambda c: jnp.tanh(c @ w))(jax.checkpoint(lambda c: jnp.tanh(c @ w))(x))


def test_products_inside_of_loops_branches_and_calls():
    w = jnp.asarray(RNG.normal(size=(5, 5)), jnp.float32)
    expected = np.asarray(X)
    for _ in range(7):
        expected = np.tanh(narrow(expected, "bfloat16") @ narrow(w, "bfloat16"))
    found = with_products_in("bfloat16", loops)(X, w)
    # A value on the border of two roundings may fall to either side.
    assert np.abs(np.asarray(found) - expected).max() < 0.1 * np.abs(np.asarray(loops(X, w)) - expected).max()


def test_convolutions_are_products_too():
    image, kernel = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((1, 1, 5, 5), (1, 1, 2, 2)))
    found = with_products_in("bfloat16", lambda x, k: jax.lax.conv(x, k, (1, 1), "VALID"))(image, kernel)
    x, k = narrow(image[0, 0], "bfloat16"), narrow(kernel[0, 0], "bfloat16")
    expected = sum(k[i, j] * x[i : i + 4, j : j + 4] for i in (0, 1) for j in (0, 1))
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-5, atol=1e-6)


def test_products_that_ask_for_a_precision_and_narrow_ones_stay():
    def exact(x, y):
        return jnp.dot(x, y, precision="highest")

    x = jnp.array([1.001, 1.0])
    assert with_products_in("bfloat16", exact)(x, x) == exact(x, x)
    assert with_products_in("bfloat16", jnp.dot)(x, x) == 2.0
    half = x.astype(jnp.float16)
    assert with_products_in("bfloat16", jnp.dot)(half, half) == jnp.dot(half, half)
    counts = jnp.array([257, 1])
    assert with_products_in("bfloat16", jnp.dot)(counts, counts) == 257**2 + 1


class Doubled(GradientRule, register=False):
    """Twice the gradient, one row at a time as per-example clipping does; knows its round."""

    def start_round(self, start):
        return lambda *arguments: self(*arguments, by=2 + start.round)

    def __call__(self, model, params, stats, batch, key, by=1):
        def slope(x, y):
            row = {"x": x[None], "y": y[None], "mask": jnp.ones(1, bool)}
            return jax.grad(lambda w: masked_mean(model.loss(w, stats, row, key)[0], row["mask"]))(params)

        rows = jax.vmap(slope)(batch["x"], batch["y"])
        return jnp.zeros(()), stats, jax.tree.map(lambda g: by * g.sum(0), rows)


def test_a_rule_inside_keeps_its_round_and_its_rows():
    model: Model = as_model("loss", two_layers)
    start = jaxfed.RoundStart(W, round=1)
    batch = BATCH | {"mask": jnp.ones(8, bool)}
    _, _, gradient = HalfPrecision(Doubled()).start_round(start)(model, W, {}, batch, KEY)
    wide = Doubled().start_round(start)(model, W, {}, batch, KEY)[2]
    for name in W:
        expected = sum(3 * by_hand(W, {key: x[i : i + 1] for key, x in batch.items()}, "bfloat16")[1][name] for i in range(8))
        apart = np.abs(np.asarray(gradient[name]) - expected).max()
        assert apart < 0.3 * np.abs(np.asarray(wide[name]) - expected).max()


LOCAL = {"batch_size": 4, "gradient": "half-precision"}
RECIPES = {
    "fedavg": lambda **o: jaxfed.fedavg(softmax_loss, lrate=0.1, **o),
    "scaffold": lambda **o: jaxfed.scaffold(softmax_loss, lrate=0.1, option="I", **o),
    "ditto": lambda **o: jaxfed.ditto(softmax_loss, lrate=0.1, **o),
    "pfedme": lambda **o: jaxfed.pfedme(softmax_loss, lrate=0.1, **o),
    "mime": lambda **o: jaxfed.mime(softmax_loss, lrate=0.1, **o),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_rounds_of_recipes_stay_in_float32_near_those_of_float32(recipe):
    """Rounding is seen, and is small."""

    def train(**options):
        simulation = jaxfed.Simulation(RECIPES[recipe](batch_size=4, **options), softmax_data(dtype=np.float32), 4, lanes=2)
        return simulation.run(simulation.init(softmax_params(np.float32), key=KEY), rounds=2)[0]

    wide, half = train(), train(gradient="half-precision")
    assert jax.tree.structure(wide) == jax.tree.structure(half)
    assert [x.dtype for x in jax.tree.leaves(half)] == [x.dtype for x in jax.tree.leaves(wide)]
    for a, b in zip(jax.tree.leaves(wide.params), jax.tree.leaves(half.params)):
        assert 0 < np.abs(np.asarray(a) - np.asarray(b)).max() < 0.01


def test_small_steps_are_not_lost():
    """A weight of 1 moves by 20 steps of 1/1000; in a weight of bfloat16 none of them would be seen."""

    def loss(w, batch, key):
        return batch["x"] @ w

    data = jaxfed.FederatedData.from_arrays({"x": np.ones((20, 1), np.float32)}, [0] * 20)
    ends = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        simulation = jaxfed.Simulation(jaxfed.fedavg(loss, lrate=0.001, batch_size=1, gradient="half-precision"), data)
        ends[dtype], _ = simulation.run(simulation.init(jnp.ones(1, dtype), key=KEY), rounds=1)
    assert float(ends[jnp.float32].params[0]) == pytest.approx(0.98, rel=1e-5)
    assert float(ends[jnp.bfloat16].params[0]) == 1


def test_two_devices():
    results = []
    for devices in (1, 2):
        algorithm = jaxfed.fedavg(softmax_loss, lrate=0.1, **LOCAL)
        options = {"lanes": 1, "devices": jax.devices()[:devices]}
        simulation = jaxfed.Simulation(algorithm, softmax_data(dtype=np.float32), 4, **options)
        results.append(simulation.run(simulation.init(softmax_params(np.float32), key=KEY), rounds=2)[0].params)
    for a, b in zip(*map(jax.tree.leaves, results)):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_differentiable_rounds_pass():
    def end(rate):
        return rounds(jaxfed.fedavg(softmax_loss, lrate=rate, **LOCAL), state).params["bias"].sum()

    simulation = jaxfed.Simulation(jaxfed.fedavg(softmax_loss, lrate=0.1, **LOCAL), softmax_data(dtype=np.float32), 2)
    state = simulation.init(softmax_params(np.float32), key=KEY)
    rounds = jaxfed.differentiable_rounds(simulation, 1)
    assert jnp.isfinite(jax.jit(jax.grad(end))(0.1))


def test_unknown_types_are_refused():
    with pytest.raises(ValueError, match="bfloat16"):
        HalfPrecision(dtype="float8")
