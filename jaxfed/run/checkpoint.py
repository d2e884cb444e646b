"""Checkpoints: a RunState on disk, in a folder that is whole or absent, with a manifest that shows any later change.

Arrays are written by Orbax. The manifest holds the SHA-256 of every file, and of itself, so a file that was cut or altered is
found before a library parses it; and the name, shape and type of every leaf, so a state of another model is refused by name.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed import checks
from jaxfed.base import RunState
from jaxfed.run import files
from jaxfed.run.environment import versions

_MANIFEST = "manifest.json"
Leaves = dict[str, np.ndarray]


class Checkpoint(NamedTuple):
    """A checkpoint whose files are as they were written.

    Attributes:
        folder: Where it lies.
        round: Rounds done.
        notes: What :func:`save_run` was given to keep with it.
        leaves: ``{name: [dtype, shape]}`` of the stored state.
    """

    folder: Path
    round: int
    notes: dict[str, Any]
    leaves: dict[str, list]

    def load(self, template: RunState) -> RunState:
        """The stored state.

        Args:
            template: A state of the same structure, from ``simulation.init``; its values do not matter.

        Raises:
            ValueError: At the first leaf that differs in name, shape or type.
        """
        expected = _leaves_of(template)
        _same_leaves(f"Checkpoint {self.folder}", _described(expected), self.leaves)
        # Orbax refuses arrays without elements; they are made anew from the template.
        stored = _read(self.folder / "state", {name: x for name, x in expected.items() if x.size})
        old = jax.tree.leaves(template)
        new = [_like(leaf, stored.get(name, empty)) for leaf, (name, empty) in zip(old, expected.items())]
        return jax.tree.unflatten(jax.tree.structure(template), new)


def save_run(state: RunState, folder: str | Path, *, notes: Mapping[str, Any] | None = None, keep: int = 2) -> Path:
    """Writes a state into a subfolder named after its round, and removes all but the newest ``keep``.

    Args:
        state: From ``simulation.init``, ``run`` or ``chunks``.
        folder: Where checkpoints of this run are kept; made if absent. One process at a time may write to it.
        notes: Plain data to be kept with it.
        keep: How many checkpoints stay, at least 1.

    Returns:
        The checkpoint's own folder.

    Raises:
        OSError: If the disk is full or the folder cannot be written.

    Example:
        >>> import tempfile, jaxfed
        >>> data = jaxfed.FederatedData.from_arrays({"x": [[1.0], [2.0]]}, [0, 1])
        >>> algorithm = jaxfed.fedavg(lambda params, batch, key: (batch["x"] @ params) ** 2, lrate=0.1, batch_size=1)
        >>> simulation = jaxfed.Simulation(algorithm, data)
        >>> state, _ = simulation.run(simulation.init(jnp.ones(1), key=jax.random.key(0)), rounds=3)
        >>> template = simulation.init(jnp.zeros(1), key=jax.random.key(1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_run(state, folder)
        ...     print(path.name, load_run(template, folder).params == state.params)
        00000003 [ True]
    """
    folder = Path(folder)
    keep = checks.count("keep", keep, checks.Bounds(at_least=1))
    folder.mkdir(parents=True, exist_ok=True)
    files.sweep_partials(folder)
    target = folder / f"{int(state.round):08d}"
    if target.exists():
        files.discard(target)
    leaves = _leaves_of(state)
    # Old ones go when the new one is in place: at any moment one is whole.
    with files.new_folder(target) as partial:
        _write(partial / "state", {name: x for name, x in leaves.items() if x.size})
        _write_manifest(partial, int(state.round), dict(notes or {}), leaves)
    for old in checkpoints(folder)[keep:]:
        files.discard(old)
    return target


def load_run(template: RunState, folder: str | Path) -> RunState:
    """The newest state that :func:`save_run` left in a folder and that is intact.

    Args:
        template: A state of the same structure, from ``simulation.init``; its values do not matter.
        folder: As given to :func:`save_run`.

    Raises:
        ValueError: If there is no checkpoint, none is intact, or it belongs to another model or algorithm.

    Warns:
        UserWarning: If the newest checkpoint is damaged, so that an older one is taken.
    """
    checkpoint = newest(folder)
    if checkpoint is None:
        raise ValueError(f"{folder} holds no checkpoint. Give the folder that save_run wrote to.")
    return checkpoint.load(template)


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in a folder, intact or not, the newest first.

    Args:
        folder: As given to :func:`save_run`; it need not exist.
    """
    found = (p for p in Path(folder).glob("*") if p.is_dir() and p.name.isdecimal())
    return sorted(found, key=lambda p: int(p.name), reverse=True)


def newest(folder: str | Path, accept: Callable[[Checkpoint], None] | None = None) -> Checkpoint | None:
    """The newest checkpoint that is intact; None where there is none at all.

    Args:
        folder: As given to :func:`save_run`.
        accept: Raises ValueError for a checkpoint that cannot be used.

    Raises:
        ValueError: If there are checkpoints and none can be used.

    Warns:
        UserWarning: For each that is passed over.
    """
    problems = []
    for path in checkpoints(folder):
        try:
            checkpoint = open_checkpoint(path)
            if accept is not None:
                accept(checkpoint)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(f"{problem} Going back to round {checkpoint.round}.", stacklevel=2)
        return checkpoint
    if problems:
        raise ValueError(f"No checkpoint in {folder} can be used. {problems[0]} Start the run anew in another folder.")
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a checkpoint and compares its files with the manifest.

    Raises:
        ValueError: If a file is missing, cut short or altered.
    """
    manifest = files.read_json(path / _MANIFEST, "the checkpoint's manifest")
    if manifest.pop("digest", None) != files.digest_of(manifest):
        raise ValueError(f"{path / _MANIFEST}, the checkpoint's manifest, was altered.")
    # Whoever forges the digest too meets this check, and then the template's.
    types = {"round": int, "notes": dict, "leaves": dict, "files": dict}
    if any(type(manifest.get(key)) is not kind for key, kind in types.items()) or manifest["round"] != int(path.name):
        raise ValueError(f"{path / _MANIFEST} is no manifest of a checkpoint of round {int(path.name)}.")
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"Checkpoint {path} lacks the file {name}.")
        if files.digest_of_file(file) != expected:
            raise ValueError(f"Checkpoint {path} is damaged: {name} was cut short or altered.")
    return Checkpoint(path, manifest["round"], manifest["notes"], manifest["leaves"])


def _write_manifest(folder: Path, round: int, notes: dict, leaves: Leaves) -> None:
    written = sorted(p for p in (folder / "state").rglob("*") if p.is_file())
    manifest = {
        "versions": versions(),
        "round": round,
        "notes": notes,
        "leaves": _described(leaves),
        "files": {p.relative_to(folder).as_posix(): files.digest_of_file(p) for p in written},
    }
    manifest["digest"] = files.digest_of(manifest)
    files.write(folder / _MANIFEST, json.dumps(manifest, indent=1))


def _write(folder: Path, leaves: Leaves) -> None:
    ocp, checkpointer = _orbax()
    try:
        checkpointer.save(folder.resolve(), args=ocp.args.StandardSave(_numbered(leaves)))
    except OSError:
        raise
    # Orbax reports a full disk through the errors of several libraries.
    except Exception as error:
        raise OSError(f"The checkpoint {folder.parent} could not be written: {error}") from error


def _read(folder: Path, like: Leaves) -> Leaves:
    ocp, checkpointer = _orbax()
    try:
        stored = checkpointer.restore(folder.resolve(), args=ocp.args.StandardRestore(_numbered(like)))
    except Exception as error:
        raise ValueError(f"The checkpoint {folder.parent} could not be read: {error}") from error
    return {name: stored[number] for name, number in zip(like, _numbered(like))}


def _orbax() -> tuple[Any, Any]:
    # It takes a second to import, and only reading and writing need it.
    import orbax.checkpoint as ocp

    return ocp, ocp.Checkpointer(ocp.StandardCheckpointHandler())


def _numbered(leaves: Leaves) -> Leaves:
    """Leaves under names that suit any file system; their own are in the manifest."""
    return {f"{i:04d}": x for i, x in enumerate(leaves.values())}


def _leaves_of(state: RunState) -> Leaves:
    """The leaves by name, on the host; PRNG keys as their numbers."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {checks.leaf_name(path): np.asarray(jax.random.key_data(x) if _is_key(x) else x) for path, x in leaves}


def _like(leaf: Any, value: np.ndarray) -> jax.Array:
    # Through NumPy: an array that Orbax places on a device is committed to it, one of a fresh run is not.
    array = jnp.asarray(value)
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else array


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _described(leaves: Leaves) -> dict[str, list]:
    return {name: [x.dtype.name, list(x.shape)] for name, x in leaves.items()}


def _same_leaves(what: str, expected: dict[str, list], got: dict[str, list]) -> None:
    remedy = "It belongs to another model, algorithm or population."
    for name in [*expected, *got]:
        if name not in expected or name not in got:
            word = "lacks" if name in expected else "has an unexpected"
            raise ValueError(f"{what} {word} leaf {name}. {remedy}")
        if expected[name] != got[name]:
            texts = [f"{dtype}{shape}" for dtype, shape in (expected[name], got[name])]
            raise ValueError(f"{what}, leaf {name}: expected {texts[0]}, got {texts[1]}. {remedy}")
