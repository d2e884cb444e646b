"""Weights for other programs: safetensors, or msgpack as Flax writes it."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxfed import checks
from jaxfed.base import RunState
from jaxfed.run import files
from jaxfed.run.environment import extra

FORMATS = (".safetensors", ".msgpack")


def export_weights(state: RunState, path: str | Path) -> Path:
    """Writes the global weights and the model's statistics.

    Leaves are named ``params/Dense_0/kernel`` and ``stats/...``. ``safetensors.numpy.load_file`` reads the first format,
    ``flax.serialization.msgpack_restore`` the second, as nested dicts.

    Args:
        state: Whose weights.
        path: The file, which ends in ``.safetensors`` or ``.msgpack``.

    Raises:
        ValueError: For another ending.
        ImportError: If the format's library is missing.
    """
    path = Path(path)
    checks.choice("The ending of the file for the weights", path.suffix, FORMATS)
    tree = jax.tree.map(np.asarray, {"params": state.params, "stats": state.stats})
    files.write(path, _safetensors(tree) if path.suffix == ".safetensors" else _msgpack(tree))
    return path


def _safetensors(tree: Any) -> bytes:
    with extra("The format safetensors"):
        from safetensors.flax import save  # the NumPy half knows no bfloat16
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return save({checks.leaf_name(path): jax.numpy.asarray(x) for path, x in leaves}, {"format": "flax"})


def _msgpack(tree: Any) -> bytes:
    from flax import serialization  # half a second to import, for this alone

    return serialization.msgpack_serialize(serialization.to_state_dict(tree))
