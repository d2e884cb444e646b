import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from safetensors.flax import load_file

from jaxfed.run.export import export_weights


class State:
    """What is exported of a RunState."""

    params = {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3, jnp.bfloat16) / 3}}
    stats = {"mean": jnp.zeros(2)}


def test_safetensors_hold_every_leaf_by_its_name(tmp_path):
    loaded = load_file(export_weights(State, tmp_path / "w.safetensors"))
    assert sorted(loaded) == ["params/dense/bias", "params/dense/kernel", "stats/mean"]
    for name, leaf in (
        ("params/dense/kernel", State.params["dense"]["kernel"]),
        ("params/dense/bias", State.params["dense"]["bias"]),
    ):
        assert loaded[name].dtype == leaf.dtype
        np.testing.assert_array_equal(loaded[name], leaf)


def test_msgpack_holds_the_tree(tmp_path):
    loaded = serialization.msgpack_restore(export_weights(State, tmp_path / "w.msgpack").read_bytes())
    jax.tree.map(np.testing.assert_array_equal, loaded, {"params": State.params, "stats": State.stats})
    assert loaded["params"]["dense"]["bias"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["w.npz", "w"])
def test_other_endings_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"expected one of '\.safetensors', '\.msgpack', got"):
        export_weights(State, tmp_path / name)
