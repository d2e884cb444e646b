"""States on disk: what comes back, and what becomes of damaged files."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfed import files
from jaxfed.messages import RunState
from jaxfed.run import checkpoint
from jaxfed.run.checkpoint import checkpoints, load_run, newest, save_run


def make_state(round=4, seed=0):
    """A state with every type of leaf: bfloat16, bools, integers, keys, NaN, empty arrays, optax states."""
    rng = np.random.default_rng(seed)
    params = {"dense/layer": {"kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}, "bias": jnp.ones(2, jnp.bfloat16) / 3}
    return RunState(
        round=jnp.asarray(round, jnp.int32),
        params=params,
        stats={"mean": jnp.array([jnp.nan, jnp.inf, -0.0])},
        server=optax.adam(0.1).init(params),
        aggregator=(),
        selector={"order": jnp.arange(5)},
        kept={"c": jnp.asarray(rng.normal(size=(5, 3)), jnp.float16), "none": jnp.zeros((5, 0))},
        seen=jnp.array([True, False, True, False, False]),
        key=jax.random.key(seed),
    )


def bits(state):
    """Every leaf as its type, shape and bytes."""
    leaves = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(state)]
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in leaves]


def files_of(folder):
    return sorted(p for p in Path(folder).rglob("*") if p.is_file())


@pytest.fixture
def saved(tmp_path):
    """A folder with the checkpoints of rounds 4 and 8."""
    save_run(make_state(4, seed=4), tmp_path / "kept")
    save_run(make_state(8, seed=8), tmp_path / "kept")
    return tmp_path / "kept"


def test_every_type_of_leaf_comes_back_bit_for_bit(saved):
    loaded = load_run(make_state(), saved)
    assert bits(loaded) == bits(make_state(8, seed=8))
    assert jax.tree.structure(loaded) == jax.tree.structure(make_state())
    assert jax.random.key_impl(loaded.key) == jax.random.key_impl(jax.random.key(0))


def test_the_newest_two_are_kept(saved):
    path = save_run(make_state(9), saved, notes={"mark": [1, "x"]})
    assert [p.name for p in checkpoints(saved)] == ["00000009", "00000008"]
    assert newest(saved).notes == {"mark": [1, "x"]}
    assert path == saved / "00000009"
    save_run(make_state(10), saved, keep=1)
    assert sorted(os.listdir(saved)) == ["00000010"]


def test_saving_a_round_again_replaces_it(saved):
    save_run(make_state(8, seed=1), saved)
    assert bits(load_run(make_state(), saved)) == bits(make_state(8, seed=1))


def test_leftovers_of_killed_processes_are_ignored_and_removed(saved):
    (saved / f"{files.PARTIAL}00000012-99").mkdir()
    (saved / "notes").mkdir()
    assert newest(saved).round == 8
    save_run(make_state(12), saved)
    assert sorted(os.listdir(saved)) == ["00000008", "00000012", "notes"]


def damage_cut(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def damage_flip(path, share):
    content = bytearray(path.read_bytes())
    content[min(int(share * len(content)), len(content) - 1)] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("damage", [damage_cut, damage_flip])
def test_a_damaged_file_leads_back_to_the_older_checkpoint(saved, damage, share):
    for file in files_of(saved / "00000008"):
        content = file.read_bytes()
        damage(file, share)
        with pytest.warns(UserWarning, match=r"(cut short|altered).* Going back to round 4\."):
            assert newest(saved).round == 4
        file.write_bytes(content)
    damage(saved / "00000008" / "manifest.json", share)
    with pytest.warns(UserWarning, match="altered"):
        assert bits(load_run(make_state(), saved)) == bits(make_state(4, seed=4))


def test_a_missing_file_leads_back_to_the_older_checkpoint(saved):
    for file in files_of(saved / "00000008"):
        content = file.read_bytes()
        file.unlink()
        with pytest.warns(UserWarning, match=r"(lacks the file|has no manifest\.json).* Going back to round 4\."):
            assert newest(saved).round == 4
        file.write_bytes(content)
    assert newest(saved).round == 8


def test_with_every_checkpoint_damaged_there_is_a_sentence(saved):
    for path in checkpoints(saved):
        damage_cut(path / "manifest.json", 0.5)
    with pytest.raises(ValueError, match=r"^No checkpoint in .* can be used\. .*00000008.*cut short or altered.* anew"):
        load_run(make_state(), saved)


def forge(path, **changes):
    """A manifest with other content and the digest that belongs to it."""
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    manifest = {key: value for key, value in (manifest | changes).items() if value is not None}
    path.write_text(json.dumps(manifest | {"digest": files.digest_of(manifest)}))


@pytest.mark.parametrize(
    "changes",
    [{"files": None}, {"files": ["a"]}, {"round": "8"}, {"round": 7}, {"leaves": None}, {"notes": None}, {"files": {"a": 1}}],
)
def test_a_forged_manifest_is_refused(saved, changes):
    shutil.rmtree(saved / "00000004")
    forge(saved / "00000008" / "manifest.json", **changes)
    with pytest.raises(ValueError, match="No checkpoint in"):
        load_run(make_state(), saved)


def test_arrays_that_orbax_cannot_read_are_refused(saved):
    folder = saved / "00000008"
    for file in files_of(folder / "state"):
        file.write_bytes(b"")
    listed = {p.relative_to(folder).as_posix(): files.digest_of_file(p) for p in files_of(folder / "state")}
    forge(folder / "manifest.json", files=listed)
    with pytest.raises(ValueError, match=r"The checkpoint .* could not be read"):
        load_run(make_state(), saved)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s._replace(seen=jnp.zeros(6, bool)), r"leaf seen: expected bool\[6\], got bool\[5\]"),
        (
            lambda s: s._replace(selector={"order": jnp.arange(5.0)}),
            r"leaf selector/order: expected float32\[5\], got int32\[5\]",
        ),
        (lambda s: s._replace(aggregator=jnp.zeros(1)), "lacks leaf aggregator"),
        (lambda s: s._replace(selector=()), "has an unexpected leaf selector/order"),
    ],
)
def test_a_state_of_another_run_is_refused_by_the_leaf(saved, change, text):
    with pytest.raises(ValueError, match=text):
        load_run(change(make_state()), saved)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()])
def test_a_folder_without_checkpoints_is_named(tmp_path, make):
    make(tmp_path / "none")
    with pytest.raises(ValueError, match=r"none holds no checkpoint\. Give the folder that save_run wrote to\."):
        load_run(make_state(), tmp_path / "none")


def test_a_failing_write_leaves_the_folder_as_it_was(saved, monkeypatch):
    before = {p: p.read_bytes() for p in files_of(saved)}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_manifest", full)
    with pytest.raises(OSError, match="No space left"):
        save_run(make_state(12), saved)
    assert {p: p.read_bytes() for p in files_of(saved)} == before


def test_errors_of_the_library_that_writes_become_errors_of_the_disk(tmp_path, monkeypatch):
    class Checkpointer:
        def save(self, *_, **__):
            raise RuntimeError("RESOURCE_EXHAUSTED")

    import orbax.checkpoint as ocp

    monkeypatch.setattr(checkpoint, "_orbax", lambda: (ocp, Checkpointer()))
    with pytest.raises(OSError, match=r"could not be written: RESOURCE_EXHAUSTED"):
        save_run(make_state(), tmp_path)
    assert os.listdir(tmp_path) == []


def test_keep_is_at_least_one(tmp_path):
    with pytest.raises(ValueError, match="keep: expected an integer at least 1, got 0"):
        save_run(make_state(), tmp_path, keep=0)
