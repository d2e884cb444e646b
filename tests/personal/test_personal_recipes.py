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
from jaxfed.base import Broadcast
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


@pytest.mark.parametrize("name", OPTIONS)
def test_a_gradient_that_needs_a_first_pass_is_refused(name):
    client = jaxfed.build_recipe(name, loops.MODEL, **COMMON, **OPTIONS[name]).client
    corrected = {"gradient": "svrg"}
    client = (
        client.replace(client=client.client.replace(**corrected)) if hasattr(client, "client") else client.replace(**corrected)
    )
    with pytest.raises(ValueError, match="first pass"):
        jaxfed.Algorithm(client)
    with pytest.raises(TypeError, match="expected LocalTraining"):
        jaxfed.Algorithm(client, survey=("full-gradient", {}))
