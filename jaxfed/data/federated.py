"""The container: the rows of all clients in flat arrays, sorted by client, with offsets.

Nothing is padded here. Row ``offsets[i] + j`` of every array is row ``j`` of client ``i``.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxfed import checks
from jaxfed.data import stored

RESERVED = "mask"
_ALIGNMENT = 64


class FederatedData:
    """Arrays ``[examples, ...]`` of ``N`` clients, one client's rows after the other's. It cannot be changed.

    Build it with `from_arrays`, which checks its input; the constructor takes what is sorted already.

    Examples:
        >>> data = FederatedData.from_arrays({"x": np.eye(4, dtype="float32")}, client_ids=["b", "a", "b", "b"])
        >>> data
        FederatedData(clients=2, examples=4, sizes=1/2/3, x: float32[4])
        >>> data.client(0)["x"]
        array([[0., 1., 0., 0.]], dtype=float32)
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], offsets: np.ndarray, client_names: np.ndarray):
        self._arrays = {key: _frozen(array) for key, array in arrays.items()}
        self._offsets = _frozen(np.asarray(offsets, np.int64))
        self._client_names = _frozen(np.asarray(client_names))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any], client_ids: Any, *, num_clients: int | None = None) -> "FederatedData":
        """Sorts rows by client; each client's rows keep the order in which they came.

        Args:
            arrays: Arrays of equal length by their own keys, ``[examples, ...]`` each: numbers or bools of any width.
            client_ids: Integers from 0 or strings ``[examples]``. The clients are the sorted unique ids.
            num_clients: Makes the clients ``0..num_clients-1``, of which some may have no rows. For integer ids.

        Raises:
            TypeError: For ids or arrays of another type, with their key and dtype.
            ValueError: For unequal lengths, NaN, masked values, no rows, the reserved key ``"mask"``, negative ids.

        >>> FederatedData.from_arrays({"y": [5, 6, 7]}, [0, 2, 0], num_clients=4).sizes
        array([2, 0, 1, 0])
        """
        ids = _checked_ids(client_ids)
        checked = _checked_arrays(arrays, len(ids), "client_ids has")
        names, index = np.unique(ids, return_inverse=True)
        if num_clients is not None:
            names, index = _numbered(ids, num_clients), ids.astype(np.int64)
        order = np.argsort(index, kind="stable")
        offsets = _offsets(np.bincount(index, minlength=len(names)))
        return cls({key: _taken(array, order) for key, array in checked.items()}, offsets, names)

    def save(self, folder: str | Path) -> None:
        """Writes a folder that :meth:`open` opens; one that is whole or absent, whatever happens meanwhile.

        Raises:
            FileExistsError: If there is something at ``folder`` already.
        """
        stored.write(Path(folder), self._arrays, self._offsets, self._client_names)

    @classmethod
    def open(cls, folder: str | Path) -> "FederatedData":
        """The data in a folder that :meth:`save` wrote. Arrays are mapped into memory: rows are read when they are needed.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: For a folder that is no federation, and for a file that is missing, cut short or altered.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     FederatedData.from_arrays({"y": [5, 6, 7]}, ["b", "a", "b"]).save(f"{parent}/letters")
        ...     FederatedData.open(f"{parent}/letters").client(1)["y"].tolist()
        [5, 7]
        """
        return cls(*stored.read(Path(folder)))

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The flat arrays by key, ``[examples, ...]`` each, not writable. The dict is a new one each time."""
        # A dict and no read-only view of one: JAX knows dicts as pytrees.
        return dict(self._arrays)

    @property
    def offsets(self) -> np.ndarray:
        """Where each client's rows begin, and the end of the last: ``[N+1]``."""
        return self._offsets

    @property
    def client_names(self) -> np.ndarray:
        """The id of each client as it was given: ``[N]`` integers or strings."""
        return self._client_names

    @property
    def num_clients(self) -> int:
        """``N``."""
        return len(self._client_names)

    @property
    def num_examples(self) -> int:
        """Rows of all clients together."""
        return int(self._offsets[-1])

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each client, ``[N]``."""
        return np.diff(self._offsets)

    @property
    def max_size(self) -> int:
        """Rows of the largest client."""
        return int(self.sizes.max())

    @property
    def client_of_row(self) -> np.ndarray:
        """The index of each row's client, ``[examples]``."""
        return np.repeat(np.arange(self.num_clients), self.sizes)

    def client(self, index: int) -> dict[str, np.ndarray]:
        """The rows of one client: views ``[n_i, ...]`` by key. Indices count from 0 to N-1.

        >>> FederatedData.from_arrays({"y": [5, 6, 7]}, [0, 2, 0]).client(0)
        {'y': array([5, 7])}
        """
        self._checked_indices([index])
        rows = slice(self._offsets[index], self._offsets[index + 1])
        return {key: array[rows] for key, array in self._arrays.items()}

    def select(self, client_indices: Any) -> "FederatedData":
        """Some of the clients, in the order given.

        Raises:
            TypeError: For anything but integers; a bool mask becomes indices with ``np.flatnonzero``.
            ValueError: For an index given twice or outside 0..N-1, and for no index.

        >>> FederatedData.from_arrays({"y": [5, 6, 7]}, ["a", "b", "c"]).select([2, 0]).client_names
        array(['c', 'a'], dtype='<U1')
        """
        indices = self._checked_indices(client_indices)
        offsets = _offsets(self.sizes[indices])
        rows = np.arange(offsets[-1]) + np.repeat(self._offsets[indices] - offsets[:-1], self.sizes[indices])
        arrays = {key: array[rows] for key, array in self._arrays.items()}
        return FederatedData(arrays, offsets, self._client_names[indices])

    def map(self, fn: Callable[[dict[str, np.ndarray]], Mapping[str, Any]]) -> "FederatedData":
        """``fn`` on the dict of whole arrays; keys may come and go, rows must stay where they are.

        >>> data = FederatedData.from_arrays({"x": np.array([[0], [255]], "uint8")}, [0, 1])
        >>> data.map(lambda rows: {"x": rows["x"] / np.float32(255)})
        FederatedData(clients=2, examples=2, sizes=1/1/1, x: float32[1])
        """
        arrays = _checked_arrays(fn(self.arrays), self.num_examples, "the data has")
        return FederatedData(arrays, self._offsets, self._client_names)

    def split(self, test_fraction: float, *, seed: int) -> "tuple[FederatedData, FederatedData]":
        """Train and test rows of every client, at random: both halves have the same N clients.

        Of ``n`` rows ``max(1, floor((1 - test_fraction) n))`` stay for training (as in LEAF and FedProx), so a client with
        one row has no test rows. Rows keep their order.

        >>> train, test = FederatedData.from_arrays({"y": range(13)}, [0] * 10 + [1] * 2 + [2]).split(0.1, seed=0)
        >>> train.sizes, test.sizes
        (array([9, 1, 1]), array([1, 1, 0]))
        """
        fraction = scalar(checks.number, "split.test_fraction", test_fraction, above=0, below=1)
        kept = np.floor((1 - fraction) * self.sizes + 1e-9)  # 10 rows at 0.9 are 1 row, not 0.99..
        kept = np.maximum(kept, 1)
        rank = rank_within(self.client_of_row, generator("split.seed", seed))
        return self._halves(rank >= np.repeat(kept, self.sizes))

    def split_by(self, mask: Any) -> "tuple[FederatedData, FederatedData]":
        """Train (False) and test (True) rows by a split that exists already; both halves have the same N clients.

        Args:
            mask: The key of an array of 0 and 1, which the halves do not keep; or a bool array ``[examples]`` in the
                order of this container's rows, which is by client and not the order in which they came.

        >>> data = FederatedData.from_arrays({"y": [5, 6, 7], "is_test": [1, 0, 0]}, [0, 1, 0])
        >>> train, test = data.split_by("is_test")
        >>> train.arrays, test.arrays
        ({'y': array([7, 6])}, {'y': array([5])})
        """
        if not isinstance(mask, str):
            return self._halves(_checked_mask("split_by: mask", np.asarray(mask), self.num_examples, "b"))
        test = _checked_mask(f"split_by: array {mask!r}", self._array(mask), self.num_examples, "biu")
        rest = {key: array for key, array in self._arrays.items() if key != mask}
        if not rest:
            raise ValueError(f"split_by: {mask!r} is the only array, so nothing would be left of the rows.")
        return FederatedData(rest, self._offsets, self._client_names)._halves(test)

    def holdout_clients(self, fraction: float, *, seed: int) -> "tuple[FederatedData, FederatedData]":
        """Seen and unseen clients: ``round(fraction N)`` whole clients at random are unseen, at least one, never all.

        >>> data = FederatedData.from_arrays({"y": range(8)}, range(8))
        >>> seen, unseen = data.holdout_clients(0.25, seed=0)
        >>> seen.num_clients, unseen.num_clients
        (6, 2)
        """
        fraction = scalar(checks.number, "holdout_clients.fraction", fraction, above=0, below=1)
        if self.num_clients < 2:
            raise ValueError("holdout_clients needs 2 clients or more, one for each side; the data has 1.")
        count = min(max(round(fraction * self.num_clients), 1), self.num_clients - 1)
        order = generator("holdout_clients.seed", seed).permutation(self.num_clients)
        return self.select(np.sort(order[count:])), self.select(np.sort(order[:count]))

    def label_counts(self, key: str = "y", *, classes: int | None = None) -> np.ndarray:
        """How often each client has each label: ``[N, classes]``.

        Args:
            key: An array of integer labels from 0, ``[examples]``.
            classes: Number of columns; one more than the largest label if not given.

        >>> FederatedData.from_arrays({"y": [0, 2, 2]}, [0, 0, 1]).label_counts()
        array([[1, 0, 1],
               [0, 0, 1]])
        """
        labels = self._array(key)
        if labels.ndim != 1 or labels.dtype.kind not in "biu" or labels.min(initial=0) < 0:
            raise ValueError(f"label_counts: {key!r} must hold one integer from 0 per row, got {_row_type(labels)}.")
        labels = labels.astype(np.int64)
        found = int(labels.max(initial=-1)) + 1
        columns = found if classes is None else scalar(checks.count, "label_counts.classes", classes, at_least=found)
        # One count over pairs of client and label is much faster than one count per client.
        cells = self.client_of_row * columns + labels
        return np.bincount(cells, minlength=self.num_clients * columns).reshape(self.num_clients, columns)

    def __repr__(self) -> str:
        spread = f"{self.sizes.min()}/{np.median(self.sizes):g}/{self.max_size}"
        rows = "".join(f", {key}: {_row_type(array)}" for key, array in self._arrays.items())
        return f"FederatedData(clients={self.num_clients}, examples={self.num_examples}, sizes={spread}{rows})"

    def _halves(self, test: np.ndarray) -> "tuple[FederatedData, FederatedData]":
        train, test_half = (self._rows(rows) for rows in (~test, test))
        return train, test_half

    def _rows(self, kept: np.ndarray) -> "FederatedData":
        sizes = np.bincount(self.client_of_row[kept], minlength=self.num_clients)
        arrays = {key: array[kept] for key, array in self._arrays.items()}
        return FederatedData(arrays, _offsets(sizes), self._client_names)

    def _array(self, key: str) -> np.ndarray:
        checks.known_name("array", key, self._arrays)
        return self._arrays[key]

    def _checked_indices(self, indices: Any) -> np.ndarray:
        indices = np.asarray(indices)
        if indices.ndim != 1 or len(indices) == 0:
            raise ValueError(f"Client indices must be a 1-D sequence of one or more, got shape {indices.shape}.")
        if indices.dtype.kind not in "iu":
            raise TypeError(f"Client indices must be integers, got {indices.dtype}. Use np.flatnonzero on a mask.")
        outside = indices[(indices < 0) | (indices >= self.num_clients)]
        if len(outside):
            raise ValueError(f"Client index {outside[0]} is outside 0..{self.num_clients - 1}.")
        values, counts = np.unique(indices, return_counts=True)
        if (counts > 1).any():
            raise ValueError(f"Client index {values[counts > 1][0]} is given {counts.max()} times; each client once.")
        return indices


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


def _offsets(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _frozen(array: np.ndarray) -> np.ndarray:
    # The flag of a view leaves the caller's array writable.
    view = array.view()
    view.flags.writeable = False
    return view


def _taken(array: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Rows in another order, copied: later changes to the caller's array stay outside.

    They begin at a multiple of 64 bytes, where JAX's CPU devices use them as they lie instead of copying them once more.
    """
    shape = (len(order), *array.shape[1:])
    room = np.empty(math.prod(shape) * array.itemsize + _ALIGNMENT, np.uint8)
    begin = -room.ctypes.data % _ALIGNMENT
    rows = room[begin : begin + len(room) - _ALIGNMENT].view(array.dtype).reshape(shape)
    return np.take(array, order, axis=0, out=rows, mode="clip")  # the default mode fills a buffer first


def _row_type(array: np.ndarray) -> str:
    return f"{array.dtype}[{', '.join(str(size) for size in array.shape[1:])}]"


def _checked_ids(client_ids: Any) -> np.ndarray:
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


def _checked_arrays(arrays: Any, rows: int, owner: str) -> dict[str, np.ndarray]:
    checks.instance("arrays", arrays, Mapping, 'Give a dict such as {"x": ..., "y": ...}.')
    if not arrays:
        raise ValueError('arrays is empty. Give a dict with one array or more, such as {"x": ..., "y": ...}.')
    return {key: _checked_array(key, array, rows, owner) for key, array in arrays.items()}


def _checked_array(key: Any, value: Any, rows: int, owner: str) -> np.ndarray:
    if checks.instance("key of arrays", key, str) == RESERVED:
        raise ValueError(f"The key {RESERVED!r} is reserved for the rows that count in a batch. Rename this array.")
    array = _plain(f"Array {key!r}", value)
    # Also true of bfloat16 and its like, which NumPy knows as kind "V".
    if not np.can_cast(array.dtype, np.complex128):
        raise TypeError(f"Array {key!r} has dtype {array.dtype}; expected numbers or bools. Encode it first.")
    if array.ndim == 0 or len(array) != rows:
        raise ValueError(f"Array {key!r} has shape {array.shape}, but {owner} {rows} rows; the first axes must agree.")
    if array.dtype.kind not in "biu" and (missing := np.isnan(array)).any():
        row = int(np.argmax(missing.reshape(rows, -1).any(axis=1)))
        raise ValueError(f"Array {key!r} holds NaN, first in row {row}. Fill or drop such rows.")
    return array


def _checked_mask(where: str, mask: np.ndarray, rows: int, kinds: str) -> np.ndarray:
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
