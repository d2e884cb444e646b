import inspect

import pytest

import jaxfed
from jaxfed.algorithms import RECIPES
from jaxfed.data import DATASETS, PARTITIONS
from jaxfed.models.reference import MODELS
from jaxfed.run.listing import KINDS, REQUIRED, entries

NAMES = {
    "modules": set(jaxfed.list_optim_modules()),
    "regularizers": set(jaxfed.list_optim_regularizers()),
    "schedules": set(jaxfed.list_rate_schedulers()) - {"function"},
    "aggregators": set(jaxfed.list_aggregators()),
    "algorithms": set(RECIPES),
    "datasets": set(DATASETS),
    "partitions": set(PARTITIONS),
    "models": set(MODELS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_is_listed_with_a_summary(kind):
    listed = entries(kind)
    assert {entry.name for entry in listed} >= NAMES.get(kind, {listed[0].name})
    assert all(entry.summary for entry in listed)


def options(kind, name):
    return next(entry.options for entry in entries(kind) if entry.name == name)


def test_defaults_are_those_of_the_parts():
    adam = jaxfed.Adam()
    listed = options("modules", "adam")
    assert float(listed["beta_1"]) == adam.beta_1
    assert float(listed["eps"]) == adam.eps
    assert listed["amsgrad"] == "false"


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_list_what_they_need_first(name):
    listed = options("algorithms", name)
    needed = [*(["expected"] if name == "dpfedavg" else []), "lrate", "batch_size"]
    assert list(listed)[: len(needed)] == needed
    assert [option for option, default in listed.items() if default == REQUIRED] == needed


def test_partitions_and_models_do_not_list_what_the_run_gives_them():
    assert options("partitions", "dirichlet") == {"clients": REQUIRED, "alpha": REQUIRED, "seed": REQUIRED, "min_size": "1"}
    assert options("models", "mlp") == {"hidden": "[200, 200]", "classes": '"none"'}


def test_options_of_a_factory_are_as_given():
    assert list(options("modules", "optax")) == list(inspect.signature(jaxfed.FromOptax).parameters)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"No kind of parts is called 'module'\. Did you mean 'modules'\?"):
        entries("module")
