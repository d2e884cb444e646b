"""What holds for every personalised recipe: exclusion, kept rows, one compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from personal import personal_loops as loops

import jaxfed
from jaxfed import trees
from jaxfed.algorithms import RECIPES
from jaxfed.algorithms_personal import PERSONAL_RECIPES
from jaxfed.client.gradients import GradientRule
from jaxfed.messages import Broadcast
from jaxfed.models.functions import from_functions

EXPLODING, EMPTY = 5, 2
OPTIONS = {
    "fedbn": {"leaves": "head"},
    "fedper": {"leaves": "head"},
    "fedrep": {"leaves": "head", "head_steps": 2},
    "ditto": {"strength": 0.5, "personal_lrate": 0.2},
    "pfedme": {"strength": 1.0, "inner_steps": 2, "personal_lrate": 0.2},
    "fedem": {"models": 2},
    "apfl": {"alpha": 0.3, "alpha_lrate": 0.1},
    "finetuned": {"finetune_epochs": 2, "finetune_lrate": 0.2},
}
COMMON = {"lrate": 0.1, "batch_size": 4}


def exploding_loss(params, batch, key):
    values, metrics = loops.loss(params, batch, key)
    return values * (1 + batch["huge"] * batch["huge"]), metrics


EXPLODING_MODEL = from_functions(loops.init, exploding_loss, loops.predict)


def exploding_data():
    """A client whose loss overflows, and one without rows."""
    plain = loops.data()
    owners = np.repeat(np.arange(6), plain.sizes)
    huge = np.where(owners == EXPLODING, 1e38, 0).astype(np.float32)
    arrays = {"x": plain.arrays["x"].astype(np.float32), "y": plain.arrays["y"], "huge": huge}
    return jaxfed.FederatedData.from_arrays(arrays, owners, num_clients=6)


def test_the_table_holds_every_personal_recipe():
    assert set(OPTIONS) == set(PERSONAL_RECIPES) <= set(RECIPES)


@pytest.mark.parametrize("name", ["fedrep", "ditto", "pfedme", "fedem", "apfl"])
def test_a_client_that_does_not_count_changes_nothing(name):
    run = jaxfed.Simulation(jaxfed.build_recipe(name, EXPLODING_MODEL, **COMMON, **OPTIONS[name]), exploding_data(), lanes=1)
    begin = run.init(key=jax.random.key(0))
    state, history = run.run(begin, rounds=2)
    assert [sorted(report.excluded) for report in history] == [[EMPTY, EXPLODING]] * 2
    assert bool(trees.all_finite((state.params, state.kept)))
    assert state.seen.tolist() == [i not in (EMPTY, EXPLODING) for i in range(6)]
    for before, after in zip(jax.tree.leaves(begin.kept), jax.tree.leaves(state.kept)):
        np.testing.assert_array_equal(before[jnp.array([EMPTY, EXPLODING])], after[jnp.array([EMPTY, EXPLODING])])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_kept_rows_keep_their_shapes_and_dtypes(name, dtype):
    client = jaxfed.build_recipe(name, loops.MODEL, **COMMON, **OPTIONS[name]).client
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), loops.start(*([2] if name == "fedem" else [])))
    arrays = {key: jnp.asarray(x, dtype if key == "x" else int) for key, x in loops.data().client(3).items()}

    def run(params):
        start = Broadcast(params, {}, {}, 0)
        kept = client.init_kept(start, jax.random.key(0))
        return kept, client.run(start, kept, jaxfed.ClientRows.of(arrays), jax.random.key(1))[1]

    before, after = jax.eval_shape(run, params)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert jax.tree.leaves(before) == jax.tree.leaves(after)


@pytest.mark.parametrize(("name", "change"), [("pfedme", {"inner_steps": 3}), ("apfl", {"alpha": 0.9})])
def test_another_number_compiles_nothing_anew(name, change):
    traces = []

    def counted(params, batch, key):
        traces.append(1)
        return loops.loss(params, batch, key)

    model, ends = from_functions(loops.init, counted, loops.predict), []
    for options in (OPTIONS[name], OPTIONS[name] | change):
        run = jaxfed.Simulation(jaxfed.build_recipe(name, model, **COMMON, **options), loops.data(), lanes=1)
        state, _ = run.run(run.init(key=jax.random.key(0)), rounds=1)
        ends.append((len(traces), state))
    assert ends[0][0] == ends[1][0] > 0
    differ = [np.abs(a - b).max() > 0 for a, b in zip(*(jax.tree.leaves((s.params, s.kept)) for _, s in ends)) if a.dtype != bool]
    assert any(differ)


def test_recipes_pass_on_their_options():
    work = {"lrate": 0.1, "batch_size": 4, "epochs": 2}
    fedrep = jaxfed.fedrep(loops.MODEL, head_lrate=0.3, **work).client
    assert (fedrep.head.batches.epochs, fedrep.head.optimizer.lrate, fedrep.client.batches.epochs) == (10, 0.3, 2)
    assert jaxfed.fedbn(loops.MODEL, **work).client.statistics is True
    tuned = jaxfed.finetuned(loops.MODEL, finetune_steps=7, **work).client
    assert (tuned.training.batches, tuned.training.optimizer.lrate) == (jaxfed.Steps(4, steps=7), 0.1)
    pfedme = jaxfed.pfedme(loops.MODEL, server_lrate=0.5, **work)
    assert (pfedme.client.strength, pfedme.client.personal.lrate, pfedme.server.lrate) == (15.0, 0.1, 0.5)


WRAPPED = {
    "local leaves": lambda client: jaxfed.LocalLeaves(client, "head"),
    "ditto": jaxfed.Ditto,
    "apfl": jaxfed.APFL,
    "finetuned": jaxfed.Finetuned,
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_what_a_wrapped_client_measures_travels(wrap):
    client = wrap(loops.local_training().replace(measures=["start_loss"]))
    upload, _ = loops.run_round(client, loops.start(), 3)
    assert client.measured == ("start_loss",)
    rows = loops.data().client(3)
    assert float(upload.metrics["start_loss"]) == pytest.approx(loops.losses(loops.start(), **rows).mean(), rel=1e-5)


class SevenInRounds(GradientRule, register=False):
    """7 everywhere in a round whose anchor is finite, 0 outside of rounds."""

    def start_round(self, start):
        def rule(model, params, stats, batch, key):
            return jnp.zeros(()), stats, jax.tree.map(lambda anchor: jnp.full_like(anchor, 7) + 0 * anchor, start.params)

        return rule

    def __call__(self, model, params, stats, batch, key):
        return jnp.zeros(()), stats, trees.zeros_like(params)


# One step of rate 0.1; pFedMe's is 0.1 * strength * (w - theta), with theta one inner step of rate 0.2 away.
MOVED = {"fedper": 0.7, "fedrep": 0.7, "ditto": 0.7, "apfl": 0.7, "finetuned": 0.7, "fedem": 0.7, "pfedme": 0.1 * 0.2 * 7}


@pytest.mark.parametrize("name", MOVED)
def test_a_gradient_rule_learns_of_its_round(name):
    options = OPTIONS[name] | ({"inner_steps": 1} if name == "pfedme" else {})
    client = jaxfed.build_recipe(name, loops.MODEL, lrate=0.1, batch_size=4, steps=1, gradient=SevenInRounds(), **options).client
    params = jax.tree.map(jnp.asarray, loops.start(*([2] if name == "fedem" else [])))
    upload, kept = loops.run_round(client, params, 3)
    for delta in jax.tree.leaves(upload.delta):
        np.testing.assert_allclose(delta, MOVED[name], rtol=1e-5)
    if name == "apfl":  # its own weights step by their share, alpha, of the mixture's gradient
        np.testing.assert_allclose(params["head"] - kept.params["head"], 0.1 * 0.3 * 7, rtol=1e-5)


def drifting_loss(params, stats, batch, key):
    return (params - batch["x"]) ** 2 / 2, {"mean": (stats["mean"] + batch["x"].mean()) / 2}


DRIFTING = jaxfed.Model(
    lambda key: (jnp.zeros(()), {"mean": jnp.zeros(())}),
    drifting_loss,
    drifting_loss,
    lambda params, stats, batch: {"loss": jnp.full(batch["x"].shape, stats["mean"])},
)
WITH_OWN_STATISTICS = {"ditto": jaxfed.Ditto, "apfl": jaxfed.APFL}


@pytest.mark.parametrize("wrap", WITH_OWN_STATISTICS.values(), ids=WITH_OWN_STATISTICS)
def test_own_statistics_begin_as_those_of_the_first_round(wrap):
    """Of three clients the first sends 8 / 2 in round 0; the second, new in round 1, begins its own there, as the third would."""
    data = jaxfed.FederatedData.from_arrays({"x": np.array([8.0, 2.0, 6.0], np.float32)}, [0, 1, 2])
    client = wrap(jaxfed.LocalTraining(DRIFTING, 0.1, jaxfed.Epochs(1)))
    run = jaxfed.Simulation(jaxfed.Algorithm(client), data, selector=loops.Planned([[0], [1]]))
    state, _ = run.run(run.init(key=jax.random.key(0)), rounds=2)
    assert state.kept.stats["mean"].tolist() == [4, (4 + 2) / 2, 0]
    assert state.stats["mean"] == 3
    assert run.evaluate_personal(state).by_client["loss"].tolist() == [4, 3, (3 + 6) / 2]


def test_a_plain_loss_may_be_given_statistics():
    run = jaxfed.Simulation(jaxfed.ditto(loops.parabola, lrate=0.01, batch_size=None), loops.curvatures())
    state = run.init(jnp.zeros(()), stats={"scale": jnp.ones(2)}, key=jax.random.key(0))
    state, history = run.run(state, rounds=1)
    assert history[0].excluded == []
    assert state.kept.stats["scale"].tolist() == [[1, 1], [1, 1]]


# Without momentum, which circles for hundreds of rounds.
MIME = {"lrate": 0.05, "batch_size": None, "steps": 3, "base": ("ewma", {"beta": 0.0})}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("wrap", [lambda c: jaxfed.Ditto(c, 0.05, 2.0), lambda c: jaxfed.Finetuned(c, 0.05)])
def test_the_global_model_may_be_that_of_mime(wrap):
    """It stays that of Mime, whose fixed point is the common optimum 10 / 11; a personal model is not corrected towards it."""
    plain = jaxfed.mime(loops.parabola, **MIME)
    states = []
    for algorithm in (plain, plain.replace(client=wrap(plain.client))):
        run = jaxfed.Simulation(algorithm, loops.curvatures(), chunk=50)
        states.append(run.run(run.init(jnp.zeros(()), key=jax.random.key(0)), rounds=100)[0])
    assert states[0].params == pytest.approx(10 / 11, abs=1e-9)
    assert states[1].params == pytest.approx(float(states[0].params), abs=1e-15)
    optimum, a, b = 10 / 11, np.array([1.0, 10.0]), np.array([0.0, 1.0])
    ditto = (a * b + 2 * optimum) / (a + 2)
    tuned = b + (1 - 0.05 * a) ** 3 * (optimum - b)
    expected = ditto if isinstance(algorithm.client, jaxfed.Ditto) else tuned
    found = run.evaluate_personal(states[1]).by_client["loss"]
    np.testing.assert_allclose(found, a / 2 * (expected - b) ** 2, rtol=1e-8)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_gradient_that_needs_a_first_pass_is_refused_without_one(name):
    client = jaxfed.build_recipe(name, loops.MODEL, **COMMON, **OPTIONS[name]).client
    corrected = {"gradient": "svrg"}
    client = (
        client.replace(client=client.client.replace(**corrected)) if hasattr(client, "client") else client.replace(**corrected)
    )
    with pytest.raises(ValueError, match="first pass"):
        jaxfed.Algorithm(client)
    if name not in ("ditto", "finetuned"):
        with pytest.raises(TypeError, match=r"survey: expected LocalTraining, got [A-Z]\w+\. "):
            jaxfed.Algorithm(client, survey=("full-gradient", {}))
