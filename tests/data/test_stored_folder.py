"""Federations in folders: what was saved is opened again, mapped; what is missing or altered is said."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.data import FederatedData, load


def federation():
    arrays = {
        "x": np.arange(24, dtype=np.float32).reshape(6, 2, 2),
        "y/label": np.array([1, 0, 2, 1, 1, 0], np.int8),
        "half": np.asarray(jnp.arange(6, dtype=jnp.bfloat16)),
        "flag": np.arange(6) > 2,
        "mask.": np.zeros((6, 0)),
    }
    return FederatedData.from_arrays(arrays, ["b", "älter", "b", "c", "älter", "b"])


def assert_same(left, right):
    np.testing.assert_array_equal(left.offsets, right.offsets)
    np.testing.assert_array_equal(left.client_names, right.client_names)
    assert list(left.arrays) == list(right.arrays)
    for key, x in left.arrays.items():
        assert (x.dtype, x.shape) == (right.arrays[key].dtype, right.arrays[key].shape)
        np.testing.assert_array_equal(x, right.arrays[key])


def test_what_was_saved_is_opened_again(tmp_path):
    federation().save(tmp_path / "a")
    opened = FederatedData.open(str(tmp_path / "a"))
    assert_same(opened, federation())
    assert repr(opened) == repr(federation())
    assert all(isinstance(x, np.memmap) for x in opened.arrays.values() if x.size)
    assert not any(x.flags.writeable for x in opened.arrays.values())
    assert_same(load("stored", path=tmp_path / "a"), federation())
    opened.save(tmp_path / "b")
    assert_same(FederatedData.open(tmp_path / "b"), federation())


def test_numbered_clients_some_without_rows(tmp_path):
    data = FederatedData.from_arrays({"y": [5, 6, 7]}, [0, 2, 0], num_clients=4)
    data.save(tmp_path / "a")
    assert_same(FederatedData.open(tmp_path / "a"), data)
    assert_same(FederatedData.open(tmp_path / "a").select([3, 0]), data.select([3, 0]))


def test_nothing_is_written_over(tmp_path):
    federation().save(tmp_path / "a")
    with pytest.raises(FileExistsError, match="exists already"):
        federation().save(tmp_path / "a")
    assert_same(FederatedData.open(tmp_path / "a"), federation())


def test_a_failing_save_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="No space"):
        federation().save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def retype(path):
    np.save(path, np.load(path).astype(np.float64))


def shuffle(path):
    np.save(path, np.load(path)[::-1])


def point_elsewhere(path):
    manifest = json.loads(path.read_text())
    manifest["arrays"][0]["file"] = "../../secret.npy"
    path.write_text(json.dumps(manifest))


def of_later(path):
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))


def without_shape(path):
    path.write_text(path.read_text().replace('"shape"', '"form"'))


@pytest.mark.parametrize(
    ("name", "harm", "text"),
    [
        ("array-1.npy", os.unlink, "has no array-1.npy, which holds 'y/label'"),
        ("offsets.npy", os.unlink, "has no offsets.npy"),
        ("federation.json", os.unlink, "has no federation.json, which says what the arrays are"),
        ("array-0.npy", cut, "array-0.npy is cut short or altered"),
        ("clients.npy", cut, "clients.npy is cut short or altered"),
        ("federation.json", cut, "federation.json, which says what the arrays are, is cut short or altered"),
        ("array-0.npy", retype, r"array-0.npy is altered: expected float32\[6, 2, 2\], got float64\[6, 2, 2\]"),
        ("offsets.npy", shuffle, "offsets.npy is altered: expected 4 ascending numbers from 0"),
        ("federation.json", point_elsewhere, "has no secret.npy"),
        ("federation.json", of_later, "expected version 1, got 2"),
        ("federation.json", without_shape, "is altered: KeyError"),
    ],
)
def test_what_is_missing_or_altered_is_said(tmp_path, name, harm, text):
    federation().save(tmp_path / "a")
    np.save(tmp_path / "secret.npy", np.zeros(6))
    harm(tmp_path / "a" / name)
    with pytest.raises(ValueError, match=text):
        FederatedData.open(tmp_path / "a")


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*Write one with FederatedData.save\(folder\)"):
        FederatedData.open(tmp_path / "a")
