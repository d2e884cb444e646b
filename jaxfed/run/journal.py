"""A journal of rows: segments to which records are only appended, and positions in them to which a checkpoint refers.

A segment begins with a record that says what a row is, then come records of rows; a later row of a client replaces an earlier
one, and a client without a row has zeros. On the disk a record is::

    kind 4 bytes | round | rows c | payload's bytes (each 8 bytes, little endian) | payload | SHA-256, 32 bytes

The payload of rows is the clients' numbers ``[c]`` as int64, then the rows ``[c, ...]`` of one leaf after the other, as the
machine holds them: data only, nothing that could run. Each digest covers the one before it. So a position (segment, size, digest)
vouches for every byte up to there, a record that was torn or altered ends what can be read, and writing goes on from a position
without reading anything.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np

from jaxfed import files

_HEAD = struct.Struct("<4sQQQ")
_DIGEST_BYTES = 32
_LEAVES, _ROWS = b"leaf", b"rows"
_NAME = "clients-{:06d}.journal"

Leaves = dict[str, Any]
"""What a row is: by name something with the ``shape`` ``[...]`` and the ``dtype`` of one client's values."""


class Rows(NamedTuple):
    """Rows of some clients, as they are written at once and held in memory at once.

    Attributes:
        round: Rounds done when they were written.
        ids: ``[c]`` the clients, none twice.
        values: ``[c, ...]`` of each leaf, in the leaves' order.
    """

    round: int
    ids: np.ndarray
    values: list[np.ndarray]


class Position(NamedTuple):
    """The end of a record.

    Attributes:
        segment: The file's name.
        size: Bytes up to there.
        digest: The record's digest, which covers all of these bytes.
    """

    segment: str
    size: int
    digest: str

    @classmethod
    def parse(cls, where: str, table: Any) -> Self:
        """From plain data; raises ValueError if it is no position."""
        fits = isinstance(table, dict) and {key: type(x) for key, x in table.items()} == cls.__annotations__
        if not fits or Path(table["segment"]).name != table["segment"]:
            raise ValueError(f"{where}: expected the position of a record, got {table!r}.")
        return cls(**table)


def start(folder: Path, leaves: Leaves, blocks: Iterable[Rows]) -> Position:
    """Writes a new segment, which is there whole or not at all.

    Args:
        folder: Where the segments are.
        leaves: What a row is.
        blocks: Every row that is not zero.

    Returns:
        The segment's end.

    Example:
        >>> import tempfile
        >>> leaves = {"momentum": np.zeros(2)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     end = start(Path(folder), leaves, [Rows(1, np.array([0, 3]), [np.ones((2, 2))])])
        ...     end = extend(Path(folder), end, [Rows(2, np.array([3]), [np.full((1, 2), 7.0)])])
        ...     [(rows.round, rows.ids, rows.values[0][:, 0]) for rows in replay(Path(folder), end, leaves)]
        [(1, array([0, 3]), array([1., 1.])), (2, array([3]), array([7.]))]
    """
    # Never a name that was there before: a checkpoint that is about to go may still refer to it.
    number = max((int(path.name[8:-8]) for path in segments(folder)), default=0) + 1
    position = Position(_NAME.format(number), 0, "")
    with files.new_file(folder / position.segment) as file:
        position = _append(file, position, _LEAVES, 0, 0, [_described(leaves)])
        return _append_all(file, position, blocks)


def extend(folder: Path, position: Position, blocks: Iterable[Rows]) -> Position:
    """Appends rows after a position, and cuts what followed it; the new end is on the disk when this returns.

    Args:
        folder: Where the segments are.
        position: Where to go on; nothing may refer to what lies beyond it.
        blocks: The rows that have changed.

    Raises:
        ValueError: If the segment is shorter.
    """
    path = folder / position.segment
    with open(path, "r+b") as file:
        if (size := file.seek(0, os.SEEK_END)) < position.size:
            raise ValueError(f"{path} was cut short: expected {position.size} bytes or more, got {size}.")
        file.truncate(position.size)
        file.seek(position.size)
        position = _append_all(file, position, blocks)
        files.flush(file)
    return position


def verify(folder: Path, position: Position) -> None:
    """Raises ValueError unless every byte up to the position is as it was written."""
    for _ in _until(folder, position):
        pass


def replay(folder: Path, position: Position, leaves: Leaves) -> Iterator[Rows]:
    """The rows up to a position, in the order in which they were written; one record is in memory at a time.

    Args:
        folder: Where the segments are.
        position: Where to stop.
        leaves: What a row is.

    Raises:
        ValueError: Where a record is torn, altered or of other leaves.
    """
    for kind, round, count, payload in _until(folder, position):
        if kind == _LEAVES and bytes(payload) != _described(leaves):
            raise ValueError(f"{folder / position.segment} is of other leaves: {bytes(payload[:200])!r}.")
        if kind == _ROWS:
            yield _unpacked(folder / position.segment, leaves, round, count, payload)


def segments(folder: Path) -> list[Path]:
    """The segments in a folder."""
    return sorted(path for path in folder.glob("clients-*.journal") if path.name[8:-8].isdecimal())


def remove_unneeded(folder: Path, needed: Iterable[Position]) -> None:
    """Removes the segments to which none of these positions belongs."""
    names = {position.segment for position in needed}
    for path in segments(folder):
        if path.name not in names:
            path.unlink()


def payload_bytes(count: int, leaves: Leaves) -> int:
    """The bytes of the rows of so many clients with their numbers."""
    return count * (8 + sum(int(np.prod(x.shape, dtype=np.int64)) * x.dtype.itemsize for x in leaves.values()))


def segment_bytes(count: int, leaves: Leaves) -> int:
    """The bytes of a segment that holds the rows of so many clients once, in one record."""
    return len(_described(leaves)) + payload_bytes(count, leaves) + 2 * (_HEAD.size + _DIGEST_BYTES)


def _described(leaves: Leaves) -> bytes:
    return json.dumps({name: [np.dtype(x.dtype).name, list(x.shape)] for name, x in leaves.items()}).encode()


def _append_all(file: BinaryIO, position: Position, blocks: Iterable[Rows]) -> Position:
    for round, ids, values in blocks:
        position = _append(file, position, _ROWS, round, len(ids), [_bytes(ids.astype("<i8")), *map(_bytes, values)])
    return position


def _append(file: BinaryIO, position: Position, kind: bytes, round: int, count: int, payload: list[Any]) -> Position:
    length = sum(map(len, payload))
    pieces = [_HEAD.pack(kind, round, count, length), *payload]
    digest = hashlib.sha256(bytes.fromhex(position.digest))
    for piece in pieces:
        digest.update(piece)
        file.write(piece)
    file.write(digest.digest())
    return Position(position.segment, position.size + _HEAD.size + length + _DIGEST_BYTES, digest.hexdigest())


def _until(folder: Path, position: Position) -> Iterator[tuple[bytes, int, int, memoryview]]:
    """Kind, round, rows and payload of every record up to a position."""
    path, end = folder / position.segment, Position(position.segment, 0, "")
    with _opened(path) as file:
        while end.size < position.size and (record := _next(file, end, position.size)) is not None:
            end, content = record[0], record[1:]
            yield content
    if end != position:
        raise ValueError(f"{path} was cut short or altered: {end.size} of {position.size} bytes are as they were written.")


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise ValueError(f"The journal {path} is missing.") from None


def _next(file: BinaryIO, before: Position, limit: int) -> tuple[Position, bytes, int, int, memoryview] | None:
    """The next record and where it ends; None if it is torn or altered, or would end beyond the limit."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    kind, round, count, length = _HEAD.unpack(head)
    # Before anything is allocated: an altered length may be any number.
    end = before.size + _HEAD.size + length + _DIGEST_BYTES
    if end > min(limit, os.fstat(file.fileno()).st_size):
        return None
    payload = memoryview(bytearray(length))
    file.readinto(payload)  # type: ignore[attr-defined]
    digest = hashlib.sha256(bytes.fromhex(before.digest) + head)
    digest.update(payload)
    if file.read(_DIGEST_BYTES) != digest.digest():
        return None
    return Position(before.segment, end, digest.hexdigest()), kind, round, count, payload


def _unpacked(path: Path, leaves: Leaves, round: int, count: int, payload: memoryview) -> Rows:
    if len(payload) != (expected := payload_bytes(count, leaves)):
        raise ValueError(f"{path} was altered: expected {expected} bytes of {count} rows, got {len(payload)}.")
    ids, start, values = np.frombuffer(payload, "<i8", count), 8 * count, []
    for like in leaves.values():
        shape = (count, *like.shape)
        values.append(np.ndarray(shape, like.dtype, payload, start))
        start += values[-1].nbytes
    return Rows(round, ids, values)


def _bytes(array: np.ndarray) -> memoryview:
    # Through uint8: types beyond NumPy's own, such as bfloat16, offer no buffer.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
