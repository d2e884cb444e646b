"""Data and kept rows on the host, a page of them on the devices: nothing but the place changes."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices.runs import LOCAL, MODEL, assert_equal, leaves, outcome, simulate, traces
from engine.oracle import Planned, softmax_data, softmax_loss

import jaxfed
from jaxfed import FederatedData, Optimizer, OptiModule, simulation
from jaxfed.algorithms import RECIPES

pytestmark = pytest.mark.usefixtures("x64")


class Learning(Planned):
    """Given cohorts, moved on by what their clients report: the next one is known only when a round is over."""

    def init(self, population):
        return jnp.zeros((), jnp.int32), jnp.zeros(population)

    def select(self, state, key, round, population):
        cohort = super().select(state, key, round, population)
        valid = cohort.valid
        return cohort._replace(ids=jnp.where(valid, (cohort.ids + state[0]) % population, population))

    def observe(self, state, cohort, metrics):
        shift, losses = state
        worse = (metrics["loss"].sum() > 3).astype(jnp.int32) + 1
        return shift + worse, losses.at[cohort.ids].set(metrics["loss"], mode="drop")


SCAFFOLD = jaxfed.scaffold(MODEL, **LOCAL)
# Half of a cohort is in the next one too; N = 9 leaves a place empty.
PLAN = Learning([[0, 1, 3, 4], [3, 9, 1, 5], [9, 1, 4, 3]])
SELECTED = {"cohort_size": None, "selector": PLAN}


@pytest.fixture
def small_pages(monkeypatch):
    monkeypatch.setattr(simulation, "_PAGE", 4)


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("devices", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_pages_change_nothing(devices, tmp_path):
    """Scaffold with statistics, under a selection that learns, with evaluation by pages: bit for bit, in memory and in files."""
    resident = outcome(*simulate(SCAFFOLD, devices, **SELECTED), rounds=6)
    assert_equal(outcome(*simulate(SCAFFOLD, devices, **SELECTED, paged=True), rounds=6), resident, 0)
    before = len(traces)
    assert_equal(outcome(*simulate(SCAFFOLD, devices, **SELECTED, paged=tmp_path), rounds=6), resident, 0)
    assert len(traces) == before
    assert not list(tmp_path.iterdir())


def test_the_callers_states_stay_valid():
    paged, start = simulate(SCAFFOLD, **SELECTED, paged=True)
    first, _ = paged.run(start, rounds=2)
    copies = [[x.copy() for x in leaves(state)] for state in (start, first)]
    again, _ = paged.run(first, rounds=3)
    assert_equal(leaves(paged.run(first, rounds=3)[0]), leaves(again), 0)
    for state, copy in zip((start, first), copies):
        assert_equal(leaves(state), copy, 0)
    seen = [np.asarray(s.params["bias"]) for s, _ in paged.rounds(start, rounds=2)]
    np.testing.assert_array_equal(seen[1], first.params["bias"])


def test_what_needs_all_data_on_the_devices_says_so_before_it_places_them():
    paged, _ = simulate(SCAFFOLD, **SELECTED, paged=True)
    for ask in (
        lambda: jaxfed.sweep(paged, {"client.lrate": [0.1, 0.2]}, rounds=1),
        lambda: jaxfed.differentiable_rounds(paged, 1),
    ):
        with pytest.raises(ValueError, match=r"got paged=True. Sweeps and differentiable rounds need them there"):
            ask()


@pytest.mark.parametrize("there", [True, False])
def test_a_state_goes_on_elsewhere(there):
    """From pages to the devices and back."""
    (one, start), (other, _) = (simulate(SCAFFOLD, **SELECTED, paged=paged) for paged in (there, not there))
    state, _ = one.run(start, rounds=3)
    whole, _ = one.run(state, rounds=3)
    for given in (state, one.portable(state)):
        assert_equal(leaves(other.run(given, rounds=3)[0]), leaves(whole), 0)


def test_memory_mapped_data(tmp_path):
    data = softmax_data()
    for key, x in data.arrays.items():
        np.save(tmp_path / key, x)
    mapped = {key: np.load(tmp_path / f"{key}.npy", mmap_mode="r") for key in data.arrays}
    mapped = FederatedData(mapped, data.offsets, data.client_names)
    assert all(isinstance(x, np.memmap) for x in mapped.arrays.values())
    for paged in (True, False):
        ours, theirs = (outcome(*simulate(SCAFFOLD, **SELECTED, paged=paged, data=d)) for d in (mapped, data))
        assert_equal(ours, theirs, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("name", ["fedavg", "ditto", "fedem", "mime"])
@pytest.mark.parametrize("devices", [1, 2])
def test_recipes_by_pages(name, devices):
    algorithm = RECIPES[name](softmax_loss, **LOCAL)
    assert_equal(*(outcome(*simulate(algorithm, devices, paged=paged), rounds=4) for paged in (True, False)), 0)


@pytest.mark.usefixtures("small_pages")
def test_new_clients_by_pages():
    """Clients that the run has never seen personalize page by page."""
    algorithm, new = (
        jaxfed.finetuned(softmax_loss, **LOCAL, finetune_steps=2),
        softmax_data(np.array([2, 3, 0, 5, 1, 4, 4, 2, 6, 1])),
    )
    found = []
    for paged in (True, False):
        ours, state = simulate(algorithm, paged=paged)
        found.append(ours.evaluate_personal(state, new, train=new).by_client["loss"])
    np.testing.assert_array_equal(*found)


class Dice(OptiModule, register=False):
    """Keeps a key and rolls it on each round."""

    def init_kept(self, params, key):
        return {"key": key, "rolls": jnp.zeros(())}

    def init(self, params):
        return {"key": jax.random.key(0), "rolls": jnp.zeros(())}

    def start_round(self, kept, start):
        return kept

    def update(self, updates, state, params=None):
        draw = jax.random.normal(jax.random.fold_in(state["key"], 7))
        key = jax.random.fold_in(state["key"], 8)
        return jax.tree.map(lambda g: g + 0.01 * draw, updates), {"key": key, "rolls": state["rolls"] + draw}

    def end_round(self, state, begin, end):
        return state, ()


@pytest.fixture
def unchecked_keys():
    """The check takes a table's key for used up once one of its rows is."""
    with jax.debug_key_reuse(False):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_keys")
@pytest.mark.parametrize("options", [{"paged": True}, {"devices": 3}], ids=["paged", "three devices"])
def test_keys_among_kept_rows(options):
    """The keys that clients keep go to the host and to other devices, and come back."""
    algorithm = jaxfed.fedavg(softmax_loss, **LOCAL | {"lrate": Optimizer(0.1, modules=[Dice()])})
    one, start = simulate(algorithm, **SELECTED)
    half, _ = one.run(start, rounds=3)
    whole, _ = one.run(half, rounds=3)
    other, start = simulate(algorithm, **SELECTED, **options)
    state, _ = other.run(start, rounds=3)
    assert_equal(rolls(other, other.run(state, rounds=3)[0]), rolls(one, whole))
    assert_equal(rolls(one, one.run(other.portable(state), rounds=3)[0]), rolls(one, whole))
    assert_equal(rolls(other, other.run(half, rounds=3)[0]), rolls(one, whole))


def rolls(simulation, state):
    kept = simulation.portable(state).kept.kept[0]
    keys = jax.random.key_data(kept["key"]) if jnp.issubdtype(kept["key"].dtype, jax.dtypes.prng_key) else kept["key"]
    return [np.asarray(x) for x in (kept["rolls"], keys, state.params["bias"])]


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(tmp_path, monkeypatch):
    """A file is longer than what it takes of the disk, so that only a write finds out, and is answered with a signal."""
    paged, start = simulate(SCAFFOLD, **SELECTED, paged=tmp_path)
    used = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: used._replace(free=4096))
    with pytest.raises(OSError, match=r"No room for \d+ bytes of what clients keep"):
        paged.run(start, rounds=2)


def test_what_paged_takes(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent"):
        simulate(SCAFFOLD, paged=tmp_path / "absent")
    with pytest.raises(TypeError, match="paged: expected True, False, None or a folder, got 3"):
        simulate(SCAFFOLD, paged=3)
