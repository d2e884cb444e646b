"""Weights for other programs: safetensors, or msgpack as Flax writes it."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxfed import checks, files
from jaxfed.messages import RunState
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

    Example:
        >>> import tempfile, jaxfed
        >>> from flax import serialization
        >>> data = jaxfed.FederatedData.from_arrays({"x": [[1.0]]}, [0])
        >>> algorithm = jaxfed.fedavg(lambda params, batch, key: batch["x"] @ params, lrate=0.1, batch_size=1)
        >>> state = jaxfed.Simulation(algorithm, data).init(np.ones(1, np.float32), key=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     serialization.msgpack_restore(export_weights(state, Path(folder, "w.msgpack")).read_bytes())
        {'params': array([1.], dtype=float32), 'stats': {}}
    """
    path = Path(path)
    checks.choice("The ending of the file for the weights", path.suffix, FORMATS)
    tree = jax.tree.map(np.asarray, {"params": state.params, "stats": state.stats})
    files.write(path, _safetensors(tree) if path.suffix == ".safetensors" else _msgpack(tree))
    return path


def _safetensors(tree: Any) -> bytes:
    with extra("The format safetensors"):
        # The half of safetensors for NumPy knows no bfloat16.
        from safetensors.flax import save
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return save({checks.leaf_name(path): jax.numpy.asarray(x) for path, x in leaves}, {"format": "flax"})


def _msgpack(tree: Any) -> bytes:
    # Half a second to import, for this alone.
    from flax import serialization

    return serialization.msgpack_serialize(serialization.to_state_dict(tree))
