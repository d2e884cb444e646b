"""From the user's arrays and ids to rows by client: what is checked, how rows are sorted, whose rows are whose."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxfed import checks

RESERVED = "mask"
_ALIGNMENT = 64


def clients_of_shard(num_clients: int, num_shards: int, index: int) -> range:
    """The clients of a shard: blocks of ``ceil(N / num_shards)`` by number, of which the last may be shorter.

    Raises:
        TypeError, ValueError: For an index that is none of 0 to ``num_shards - 1``.

    >>> [clients_of_shard(10, 4, index) for index in range(4)]
    [range(0, 3), range(3, 6), range(6, 9), range(9, 10)]
    """
    num_shards = scalar(checks.count, "num_shards", num_shards, at_least=1)
    index = scalar(checks.count, "index", index, at_least=0, below=num_shards)
    size = -(-num_clients // num_shards)
    return range(min(index * size, num_clients), min((index + 1) * size, num_clients))


def scalar(check: Callable[..., Any], where: str, value: Any, **limits: float) -> Any:
    """``checks.number`` or ``checks.count`` of one value; an array of values to sweep is refused.

    >>> scalar(checks.count, "iid.clients", 10, at_least=1)
    10
    """
    checked = check(where, value, checks.Bounds(**limits))
    if np.ndim(checked):
        raise TypeError(f"{where}: expected one number, got {checks.describe(value)}.")
    return checked


def generator(where: str, seed: int) -> np.random.Generator:
    """NumPy's default generator from an integer seed, which must be given."""
    return np.random.default_rng(scalar(checks.count, where, seed, at_least=0))


def rank_within(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each row's place in a random order of its own group's rows: ``[n]`` group numbers to ``[n]`` ranks from 0."""
    order = np.lexsort((rng.permutation(len(groups)), groups))
    sizes = np.bincount(groups)
    rank = np.empty(len(groups), np.int64)
    rank[order] = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rank


def by_client(ids: np.ndarray, num_clients: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order that sorts rows by client, the clients' offsets and their ids."""
    names, index = np.unique(ids, return_inverse=True)
    if num_clients is not None:
        names, index = _numbered(ids, num_clients), ids.astype(np.int64)
    return np.argsort(index, kind="stable"), offsets_of(np.bincount(index, minlength=len(names))), names


def offsets_of(sizes: np.ndarray) -> np.ndarray:
    """Where each client's rows begin, and the end of the last: ``[N]`` sizes to ``[N+1]``."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def frozen(array: np.ndarray) -> np.ndarray:
    """The same numbers, not writable."""
    # The flag of a view leaves the caller's array writable.
    view = array.view()
    view.flags.writeable = False
    return view


def taken(array: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Rows in another order, copied: later changes to the caller's array stay outside.

    They begin at a multiple of 64 bytes, where JAX's CPU devices use them as they lie instead of copying them once more.
    """
    shape = (len(order), *array.shape[1:])
    room = np.empty(math.prod(shape) * array.itemsize + _ALIGNMENT, np.uint8)
    begin = -room.ctypes.data % _ALIGNMENT
    rows = room[begin : begin + len(room) - _ALIGNMENT].view(array.dtype).reshape(shape)
    return np.take(array, order, axis=0, out=rows, mode="clip")  # the default mode fills a buffer first


def row_type(array: np.ndarray) -> str:
    """Dtype and shape of a row, for people."""
    return f"{array.dtype}[{', '.join(str(size) for size in array.shape[1:])}]"


def checked_ids(client_ids: Any) -> np.ndarray:
    """Ids ``[examples]`` as an array of integers or strings."""
    ids = _plain("client_ids", client_ids)
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"client_ids must be 1-D with one id per example and one example or more, got {ids.shape}.")
    if ids.dtype.kind in "OT" and all(isinstance(name, str) for name in ids):
        ids = ids.astype(str)
    if ids.dtype.kind not in "iuU":
        raise TypeError(f"client_ids must be integers or strings, got {ids.dtype}, such as {ids[0]!r}.")
    if ids.dtype.kind == "i" and ids.min() < 0:
        row = int(np.argmax(ids < 0))
        raise ValueError(f"client_ids must be 0 or more, got {ids[row]} in row {row}. Drop the rows of no client.")
    return ids


def _numbered(ids: np.ndarray, num_clients: int) -> np.ndarray:
    if ids.dtype.kind == "U":
        raise TypeError(f"num_clients needs integer client_ids, got strings such as {str(ids[0])!r}.")
    where = "from_arrays.num_clients (largest id plus 1 or more)"
    return np.arange(scalar(checks.count, where, num_clients, at_least=int(ids.max()) + 1))


def checked_arrays(arrays: Any, rows: np.ndarray, owner: str) -> dict[str, np.ndarray]:
    """What may be arrays of a federation; ``rows`` are the numbers of the rows that they hold."""
    checks.instance("arrays", arrays, Mapping, 'Give a dict such as {"x": ..., "y": ...}.')
    if not arrays:
        raise ValueError('arrays is empty. Give a dict with one array or more, such as {"x": ..., "y": ...}.')
    return {key: _checked_array(key, array, rows, owner) for key, array in arrays.items()}


def _checked_array(key: Any, value: Any, rows: np.ndarray, owner: str) -> np.ndarray:
    if checks.instance("key of arrays", key, str) == RESERVED:
        raise ValueError(f"The key {RESERVED!r} is reserved for the rows that count in a batch. Rename this array.")
    array = _plain(f"Array {key!r}", value)
    # Also true of bfloat16 and its like, which NumPy knows as kind "V".
    if not np.can_cast(array.dtype, np.complex128):
        raise TypeError(f"Array {key!r} has dtype {array.dtype}; expected numbers or bools. Encode it first.")
    if array.ndim == 0 or len(array) != len(rows):
        raise ValueError(f"Array {key!r} has shape {array.shape}, but {owner} {len(rows)} rows; the first axes must agree.")
    if array.dtype.kind not in "biu" and (missing := np.isnan(array)).any():
        row = rows[np.argmax(missing.reshape(len(rows), -1).any(axis=1))]
        raise ValueError(f"Array {key!r} holds NaN, first in row {row}. Fill or drop such rows.")
    return array


def checked_mask(where: str, mask: np.ndarray, rows: int, kinds: str) -> np.ndarray:
    """A mask of rows as bools; ``kinds`` are NumPy's letters of the dtypes that may say it."""
    if mask.dtype.kind not in kinds or mask.shape != (rows,):
        wanted = "bools" if kinds == "b" else "0 and 1"
        raise ValueError(f"{where} must be {wanted} of shape ({rows},), got {mask.dtype} of shape {mask.shape}.")
    if (other := (mask != 0) & (mask != 1)).any():
        raise ValueError(f"{where} must hold 0 (train) and 1 (test), got {mask[other][0]}.")
    return mask.astype(bool)


def _plain(where: str, value: Any) -> np.ndarray:
    if np.ma.is_masked(value):
        raise ValueError(f"{where} has masked values, which a plain array would not keep. Fill or drop them.")
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{where} is not one array: {error}") from None
