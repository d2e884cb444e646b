"""Aggregators on stacked updates, against closed forms and declearn's outputs."""

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed import Aggregator, GradientMaskedMean, Mean, Sum, list_aggregators, part

UPDATES = np.array([[1.0, 1.0, 0.0, -2.0], [3.0, -1.0, 0.0, -4.0], [2.0, 3.0, 0.0, -6.0]])
WEIGHTS = np.array([1.0, 2.0, 5.0])


def build(name, config):
    """declearn's options in our words: steps weigh unless ``steps_weighted`` is off."""
    config = dict(config)
    if name != "sum":
        config["by"] = "steps" if config.pop("steps_weighted", True) else "uniform"
    return part.build("aggregator", (name, config))


def one_of_two(transform):
    """The second of two cohorts, run by ``transform``."""

    def run(aggregate, *inputs):
        both = jax.tree.map(lambda x: jnp.stack([x + 1, x]), inputs)
        return jax.tree.map(lambda x: x[1], transform(lambda cohort: aggregate(*cohort))(both))

    return run


WAYS = {
    "eager": lambda aggregate, *inputs: aggregate(*inputs),
    "jit": lambda aggregate, *inputs: jax.jit(aggregate)(*inputs),
    "vmap": one_of_two(jax.vmap),
    "scan": one_of_two(lambda f: lambda both: jax.lax.map(f, both)),
}


@golden.needs_golden
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("record", golden.params("aggregators"))
def test_golden_outputs(record, dtype, way):
    inputs = golden.RECORDS["aggregator_inputs"]
    updates = jax.tree.map(lambda *x: np.stack(x), *(golden.tree(u, dtype) for u in inputs["updates"]))
    found = WAYS[way](build(record["name"], record["config"]).aggregate, updates, np.array(inputs["n_steps"], float))
    golden.assert_close(found, record["output"], dtype)


@pytest.mark.parametrize("by", ["examples", "steps", "uniform"])
def test_the_mean_is_weighted(by):
    weights = np.ones(3) if by == "uniform" else WEIGHTS
    found = Mean(by).aggregate({"w": UPDATES.astype(np.float32)}, WEIGHTS)
    np.testing.assert_allclose(found["w"], np.average(UPDATES, axis=0, weights=weights), rtol=1e-6)


def test_the_sum_ignores_weights():
    np.testing.assert_allclose(Sum().aggregate(jnp.array(UPDATES), WEIGHTS), [6, 3, 0, -12])


def masked(threshold, weights):
    """Coordinates whose signs agree by more than the threshold are averaged, others shrunk by their agreement."""
    mean = np.average(UPDATES, axis=0, weights=weights)
    agreement = np.abs(np.average(np.sign(UPDATES), axis=0, weights=weights))
    return np.array([m if a > threshold else a * m for m, a in zip(mean, agreement)])


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("by", ["examples", "steps", "uniform"])
def test_the_masked_mean(by, threshold):
    weights = np.ones(3) if by == "uniform" else WEIGHTS
    found = GradientMaskedMean(by, threshold=threshold).aggregate(jnp.array(UPDATES), WEIGHTS)
    np.testing.assert_allclose(found, masked(threshold, weights), rtol=1e-6)


def half_hearted(clients, disagree, dtype):
    """Updates of 1 by all but ``disagree`` clients, who have -1, and weights that leave only so many clients."""
    numbers = jnp.arange(50)
    return jnp.where(numbers < disagree, -1, 1).astype(dtype), (numbers < clients).astype(float)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.usefixtures("x64")
def test_agreement_that_equals_the_threshold_is_shrunk(dtype):
    """Mean and agreement are 1 - 2 m / n if m of n clients disagree; above the threshold, the mean stays whole."""
    for clients, disagree in [(3, 1), (4, 1), (5, 1), (7, 2), (10, 2), (20, 3), (50, 10)]:
        share, stacked = (clients - 2 * disagree) / clients, half_hearted(clients, disagree, dtype)
        assert float(GradientMaskedMean("steps", threshold=share).aggregate(*stacked)) == pytest.approx(share**2)
        assert float(GradientMaskedMean("steps", threshold=0.99 * share).aggregate(*stacked)) == pytest.approx(share)


@pytest.mark.usefixtures("x64")
def test_integer_weights_are_as_exact_as_floats():
    weights = np.array([1, 5, 4])
    exact = np.average(UPDATES, axis=0, weights=weights)
    np.testing.assert_allclose(Mean().aggregate(jnp.array(UPDATES), weights), exact, rtol=1e-14)
    np.testing.assert_allclose(Mean().aggregate(jnp.array(UPDATES), weights.astype(float)), exact, rtol=1e-14)


@pytest.mark.parametrize("aggregator", [Mean("examples"), Sum(), GradientMaskedMean("examples", threshold=0.3)], ids=str)
def test_one_client_alone_is_returned(aggregator):
    np.testing.assert_allclose(aggregator.aggregate(jnp.array(UPDATES[:1]), jnp.array([7.0])), UPDATES[0], rtol=1e-6)


def test_the_mean_of_equal_whole_numbers_is_that_number():
    taking_part = [np.arange(50) < n for n in range(1, 50)]
    found = [float(Mean("steps").aggregate(jnp.full(50, 6.0), counts.astype(np.float32))) for counts in taking_part]
    assert found == [6.0] * 49


@pytest.mark.parametrize("aggregator", [Mean("examples"), GradientMaskedMean("examples")], ids=str)
def test_no_weight_at_all_gives_zero(aggregator):
    assert aggregator.aggregate(jnp.array(UPDATES), jnp.zeros(3)).tolist() == [0] * 4


@pytest.mark.parametrize("aggregator", [Mean("examples"), Sum(), GradientMaskedMean("steps", threshold=0.3)], ids=str)
def test_trees_keep_their_form_and_types_and_jit_changes_nothing(aggregator):
    tree = {"a": jnp.array(UPDATES, jnp.bfloat16), "b": [jnp.array(UPDATES[:, 0], jnp.float32)]}
    found = aggregator.aggregate(tree, WEIGHTS)
    assert jax.tree.map(lambda x: (x.shape, x.dtype.name), found) == {"a": ((4,), "bfloat16"), "b": [((), "float32")]}
    compiled = jax.jit(aggregator.aggregate)(tree, WEIGHTS)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x.astype(float), y.astype(float), rtol=1e-2), found, compiled)


def test_a_thousand_bfloat16_tenths():
    tenths = jnp.full(1000, 0.1, jnp.bfloat16)
    assert float(Sum().aggregate(tenths, jnp.ones(1000))) == float(jnp.bfloat16(100.098))
    assert float(Mean("uniform").aggregate(tenths, jnp.ones(1000))) == float(jnp.bfloat16(0.1))


@pytest.mark.parametrize(("updates", "weights"), [(UPDATES, np.ones(2)), (UPDATES, np.ones((3, 1))), (UPDATES, 3.0)])
def test_updates_and_weights_must_fit(updates, weights):
    with pytest.raises(ValueError, match=r"expected weights \[C\] and leaves \[C, ...\], got weights"):
        Mean().aggregate(updates, weights)


def test_a_plug_in_is_a_few_lines():
    class Half(Aggregator, register=False):
        def prepare(self, upload, sent):
            return jax.tree.map(lambda u: 0.5 * u, upload.delta)

        def finalize(self, total, state, info):
            return total, state

    assert Half().aggregate(jnp.array(UPDATES), WEIGHTS).tolist() == [3, 1.5, 0, -6]


def test_the_registry_names_declearns_aggregators():
    assert {"averaging", "gradient-masked-averaging", "sum"} <= set(list_aggregators())
    assert part.build("aggregator", "averaging") == Mean("steps")


BAD = [
    (lambda: Mean("example"), "Mean.by: expected one of 'examples', 'steps', 'uniform', got 'example'. Did you mean 'examples'"),
    (
        lambda: GradientMaskedMean(threshold=1.5),
        "GradientMaskedMean.threshold: expected a finite number at least 0 and at most 1",
    ),
    (lambda: part.build("aggregator", "averagin"), "No aggregator is called 'averagin'. Did you mean 'averaging'"),
    (lambda: part.build("aggregator", ("sum", {"by": "steps"})), "sum has no option 'by'"),
]


@pytest.mark.parametrize(("make", "text"), BAD)
def test_bad_options_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()
