"""Checkpoints: a RunState on disk, in a folder that is whole or absent, with a manifest that shows any later change.

Arrays are written by Orbax. The manifest holds the SHA-256 of every file, and of itself, so a file that was cut or altered is
found before a library parses it; and the name, shape and type of every leaf, so a state of another model is refused by name.

What clients keep is written whole up to ``JOURNAL_BYTES``: each checkpoint then stands for itself. A larger table goes to a
journal beside the checkpoints, only those rows that have changed, and a checkpoint refers to a position in it. When most of a
segment would be rows that later ones have replaced, a new one is begun with the rows in use.
"""

import contextlib
import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed import checks, files
from jaxfed.messages import RunState
from jaxfed.run import journal, tables
from jaxfed.run.environment import versions
from jaxfed.run.journal import Position

JOURNAL_BYTES = 2**24
"""Up to this size what clients keep is written whole."""
_MANIFEST = "manifest.json"
Leaves = dict[str, np.ndarray]


class Changed(NamedTuple):
    """Which clients' rows differ from an earlier checkpoint.

    Attributes:
        since: The round of that checkpoint.
        ids: The clients whose uploads counted since; others, and repetitions, do no harm.
    """

    since: int
    ids: np.ndarray


class Checkpoint(NamedTuple):
    """A checkpoint whose files are as they were written.

    Attributes:
        folder: Where it lies.
        round: Rounds done.
        notes: What :func:`save_run` was given to keep with it.
        leaves: ``{name: [dtype, shape]}`` of the stored state.
        journal: Where the rows of what clients keep end; None where they are part of the checkpoint.
    """

    folder: Path
    round: int
    notes: dict[str, Any]
    leaves: dict[str, list]
    journal: Position | None = None

    def load(self, template: RunState) -> RunState:
        """The stored state.

        Args:
            template: A state of the same structure, from ``simulation.init``; its values do not matter. A table of it that is
                mapped to a writable file becomes the result's.

        Raises:
            ValueError: At the first leaf that differs in name, shape or type, or if the journal was altered meanwhile.
        """
        expected = _named(template)
        _same_leaves(f"Checkpoint {self.folder}", _described(expected), self.leaves)
        kept = _journaled(expected) if self.journal else {}
        rest = {name: leaf for name, leaf in expected.items() if name not in kept}
        # Orbax refuses arrays without elements; they are made anew from the template.
        stored = _read(self.folder / "state", {name: x for name, x in _on_host(rest).items() if x.size})
        new = {name: _like(leaf, stored[name]) if name in stored else leaf for name, leaf in rest.items()}
        if self.journal:
            new |= _replayed(self.folder.parent, self.journal, kept)
        return jax.tree.unflatten(jax.tree.structure(template), [new[name] for name in expected])


def save_run(
    state: RunState,
    folder: str | Path,
    *,
    notes: Mapping[str, Any] | None = None,
    keep: int = 2,
    needed: Collection[int] = (),
    changed: Changed | None = None,
) -> Path:
    """Writes a state into a subfolder named after its round, and removes all but the newest ``keep`` and those ``needed``.

    Args:
        state: From ``simulation.init``, ``run`` or ``chunks``.
        folder: Where checkpoints of this run are kept; made if absent. One process at a time may write to it.
        notes: Plain data to be kept with it.
        keep: How many checkpoints stay, at least 1.
        needed: The rounds of others that stay, such as that of the best model.
        changed: What large tables of kept rows differ in from an earlier checkpoint; None writes all rows in use.

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
    leaves = _named(state)
    kept, position = _journaled(leaves), None
    if sum(tables.row_bytes(x) * len(x) for x in kept.values()) > JOURNAL_BYTES:
        # Before the checkpoint: it must never refer to rows that are not on the disk.
        position = _write_rows(folder, state, kept, changed, _described(leaves))
    whole = _on_host({name: x for name, x in leaves.items() if position is None or name not in kept})
    if target.exists():
        files.discard(target)
    # Old ones go when the new one is in place: at any moment one is whole.
    with files.new_folder(target) as partial:
        _write(partial / "state", {name: x for name, x in whole.items() if x.size})
        _write_manifest(partial, int(state.round), dict(notes or {}), _described(leaves), position)
    for old in checkpoints(folder)[keep:]:
        if int(old.name) not in needed:
            files.discard(old)
    journal.remove_unneeded(folder, _referred(folder).values())
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
    manifest = _read_manifest(path)
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"Checkpoint {path} lacks the file {name}.")
        if files.digest_of_file(file) != expected:
            raise ValueError(f"Checkpoint {path} is damaged: {name} was cut short or altered.")
    if manifest["journal"] is not None:
        journal.verify(path.parent, manifest["journal"])
    return Checkpoint(path, manifest["round"], manifest["notes"], manifest["leaves"], manifest["journal"])


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = files.read_json(path / _MANIFEST, "the checkpoint's manifest")
    if manifest.pop("digest", None) != files.digest_of(manifest):
        raise ValueError(f"{path / _MANIFEST}, the checkpoint's manifest, was altered.")
    # Whoever forges the digest too meets this check, and then the template's.
    types = {"round": int, "notes": dict, "leaves": dict, "files": dict}
    if any(type(manifest.get(key)) is not kind for key, kind in types.items()) or manifest["round"] != int(path.name):
        raise ValueError(f"{path / _MANIFEST} is no manifest of a checkpoint of round {int(path.name)}.")
    position = manifest.get("journal")
    return manifest | {"journal": None if position is None else Position.parse(f"{path / _MANIFEST}, journal", position)}


def _write_rows(folder: Path, state: RunState, kept: dict[str, Any], changed: Changed | None, leaves: dict) -> Position:
    """Brings the journal up to a state, and returns its end."""
    seen, like = np.flatnonzero(np.asarray(state.seen)), _row_like(kept)
    position = None if changed is None else _end_to_go_on_from(folder, changed.since, leaves)
    if changed is not None and position is not None:
        ids = np.unique(np.asarray(changed.ids, np.int64))
        if len(ids) and not 0 <= ids[0] <= ids[-1] < len(state.seen):
            raise ValueError(f"changed.ids: expected clients from 0 to {len(state.seen) - 1}, got {ids[0]} to {ids[-1]}.")
        # Then at least half of the segment would be rows that are in use.
        if position.size + journal.payload_bytes(len(ids), like) <= 2 * journal.segment_bytes(len(seen), like):
            return journal.extend(folder, position, _blocks(state, kept, ids)) if len(ids) else position
    return journal.start(folder, like, _blocks(state, kept, seen))


def _end_to_go_on_from(folder: Path, since: int, leaves: dict) -> Position | None:
    """Where the rows of an earlier checkpoint end, if it is there and nothing refers to what follows."""
    name = f"{since:08d}"
    referred = _referred(folder)
    if name not in referred or _read_manifest(folder / name)["leaves"] != leaves:
        return None
    last, path = referred[name], folder / referred[name].segment
    beyond = any(other.segment == last.segment and other.size > last.size for other in referred.values())
    return None if beyond or not path.is_file() or path.stat().st_size < last.size else last


def _referred(folder: Path) -> dict[str, Position]:
    """The journal's position of every checkpoint that has one, by the checkpoint's name."""
    found = {}
    for path in checkpoints(folder):
        # A checkpoint that is damaged can need nothing.
        with contextlib.suppress(ValueError, OSError):
            if (position := _read_manifest(path)["journal"]) is not None:
                found[path.name] = position
    return found


def _blocks(state: RunState, kept: dict[str, Any], ids: np.ndarray) -> Iterator[journal.Rows]:
    """The rows of these clients, fetched a few MiB at a time."""
    for block in tables.blocks(ids, sum(map(tables.row_bytes, kept.values()))):
        yield journal.Rows(int(state.round), block, [tables.rows(table, block) for table in kept.values()])


def _replayed(folder: Path, position: Position, templates: dict[str, Any]) -> dict[str, Any]:
    new = {name: tables.zeros_like(table) for name, table in templates.items()}
    for _, ids, values in journal.replay(folder, position, _row_like(templates)):
        new = {name: tables.put(table, ids, rows) for (name, table), rows in zip(new.items(), values)}
    return new


def _row_like(kept: dict[str, Any]) -> journal.Leaves:
    whole = {name: tables.stored(table) for name, table in kept.items()}
    return {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in whole.items()}


def _write_manifest(folder: Path, round: int, notes: dict, leaves: dict[str, list], position: Position | None) -> None:
    written = sorted(p for p in (folder / "state").rglob("*") if p.is_file())
    manifest = {
        "versions": versions(),
        "round": round,
        "notes": notes,
        "leaves": leaves,
        "files": {p.relative_to(folder).as_posix(): files.digest_of_file(p) for p in written},
    }
    if position is not None:
        manifest["journal"] = position._asdict()
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

    # Leaves are whole on this process, which neither waits for others nor writes for them.
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"p{own}")
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    return ocp, ocp.Checkpointer(handler, multiprocessing_options=alone)


def _numbered(leaves: Leaves) -> Leaves:
    """Leaves under names that suit any file system; their own are in the manifest."""
    return {f"{i:04d}": x for i, x in enumerate(leaves.values())}


def _named(state: RunState) -> dict[str, Any]:
    return {checks.leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _journaled(leaves: dict[str, Any]) -> dict[str, Any]:
    """The tables of what clients keep, which go to the journal where they are large."""
    return {name: leaf for name, leaf in leaves.items() if name.split("/")[0] == "kept"}


def _on_host(leaves: dict[str, Any]) -> Leaves:
    """PRNG keys as their numbers."""
    return {name: np.asarray(jax.random.key_data(x) if tables.is_key(x) else x) for name, x in leaves.items()}


def _like(leaf: Any, value: np.ndarray) -> Any:
    if isinstance(leaf, np.ndarray):
        new = tables.zeros_like(leaf)
        new[...] = value
        return new
    # Through NumPy: an array that Orbax places on a device is committed to it, one of a fresh run is not.
    array = jnp.asarray(value)
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if tables.is_key(leaf) else array


def _described(leaves: dict[str, Any]) -> dict[str, list]:
    return {name: [x.dtype.name, list(x.shape)] for name, x in ((name, tables.stored(x)) for name, x in leaves.items())}


def _same_leaves(what: str, expected: dict[str, list], got: dict[str, list]) -> None:
    remedy = "It belongs to another model, algorithm or population."
    for name in [*expected, *got]:
        if name not in expected or name not in got:
            word = "lacks" if name in expected else "has an unexpected"
            raise ValueError(f"{what} {word} leaf {name}. {remedy}")
        if expected[name] != got[name]:
            texts = [f"{dtype}{shape}" for dtype, shape in (expected[name], got[name])]
            raise ValueError(f"{what}, leaf {name}: expected {texts[0]}, got {texts[1]}. {remedy}")
