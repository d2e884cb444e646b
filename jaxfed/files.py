"""Files and folders that are whole or absent: written beside their place, flushed to the disk, then renamed into it."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:
    # Windows has no flock; there two processes that write to one folder are not noticed.
    fcntl = None

PARTIAL = ".partial-"
"""How the names of unfinished files and folders begin; a killed process may leave some behind."""


def write(path: Path, content: bytes | str) -> None:
    """Replaces a file by new content; at any moment the old or the new content is there, never a part of it.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(Path(folder, "note.txt"), "done")
    ...     sorted(os.listdir(folder))
    ['note.txt']
    """
    with new_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to be written piece by piece in the ``with`` block; it replaces what is at ``path`` when the block has ended well.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with new_file(Path(folder, "note.txt")) as file:
    ...         _ = file.write(b"done")
    ...     Path(folder, "note.txt").read_text()
    'done'
    """
    partial = _partial(path)
    try:
        with open(partial, "wb") as file:
            yield file
            # Otherwise the new name could survive a power failure and its content not.
            flush(file)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    flush_folder(path.parent)


def flush(file: BinaryIO) -> None:
    """Makes sure that what was written to an open file survives a power failure."""
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to be filled in the ``with`` block; it appears at ``path`` when the block has ended without an error.

    Raises:
        FileExistsError: If there is something at ``path`` already.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with new_folder(Path(folder, "results")) as partial:
    ...         _ = (partial / "note.txt").write_text("done")
    ...         before = Path(folder, "results").exists()
    ...     print(before, Path(folder, "results").exists())
    False True
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists already.")
    partial = _partial(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for folder, _, names in os.walk(partial):
            for name in names:
                _flush(Path(folder, name))
            flush_folder(Path(folder))
        # Fails where another process has made and filled the folder meanwhile: only one of them wins.
        os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    flush_folder(path.parent)


def discard(folder: Path) -> None:
    """Removes a folder; it disappears at once, not file by file.

    Args:
        folder: A folder that exists.
    """
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    os.rename(folder, partial)
    shutil.rmtree(partial, ignore_errors=True)


def sweep_partials(folder: Path) -> None:
    """Removes what killed processes left in a folder that nobody else is writing to."""
    for left in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextlib.contextmanager
def locked(path: Path, sentence: str) -> Iterator[None]:
    """Holds a lock file; the system releases it when the process ends, however it ends.

    Args:
        path: The file, which is made and stays: removing it would let others lock a file without a name.
        sentence: What to say if it is taken.

    Raises:
        BlockingIOError: With the sentence, if another process holds it.
    """
    with open(path, "ab") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(sentence) from None
        yield


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The table in a JSON file.

    Args:
        path: The file.
        what: What it is, for errors: ``"which says how the run was started"``.

    Raises:
        ValueError: If the file is missing, no JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}, {what}.") from None
    # Thousands of open brackets exhaust the parser's stack.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, {what}, is cut short or altered: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}, {what}, is altered: expected a table, got a {type(content).__name__}.")
    return content


def digest_of(value: Any) -> str:
    """The SHA-256 of plain data; equal data have equal digests whatever the order of their keys.

    >>> digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_folder(folder: Path) -> None:
    """Makes sure that names which were created or renamed in a folder survive a power failure."""
    # Elsewhere folders cannot be opened.
    if os.name == "posix":
        _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _partial(path: Path) -> Path:
    return path.with_name(f"{PARTIAL}{path.name}-{os.getpid()}")
