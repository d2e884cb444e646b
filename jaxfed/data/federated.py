"""The container: the rows of all clients in flat arrays, sorted by client, with offsets.

Nothing is padded here. Row ``offsets[i] + j`` of every array is row ``j`` of client ``i``. In one of several processes the arrays
may hold the rows of a shard's clients alone, ``offsets[held.start]`` to ``offsets[held.stop]``; whose rows there are all know.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxfed import checks
from jaxfed.data import stored
from jaxfed.data.rows import (
    by_client,
    checked_arrays,
    checked_ids,
    checked_mask,
    clients_of_shard,
    frozen,
    generator,
    offsets_of,
    rank_within,
    row_type,
    scalar,
    taken,
)


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

    def __init__(
        self, arrays: Mapping[str, np.ndarray], offsets: np.ndarray, client_names: np.ndarray, held: range | None = None
    ):
        self._arrays = {key: frozen(array) for key, array in arrays.items()}
        self._offsets = frozen(np.asarray(offsets, np.int64))
        self._client_names = frozen(np.asarray(client_names))
        self._held = range(self.num_clients) if held is None else held

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
        ids = checked_ids(client_ids)
        checked = checked_arrays(arrays, np.arange(len(ids)), "client_ids has")
        order, offsets, names = by_client(ids, num_clients)
        return cls({key: taken(array, order) for key, array in checked.items()}, offsets, names)

    @classmethod
    def from_reader(
        cls,
        read: Callable[[np.ndarray], Mapping[str, Any]],
        client_ids: Any,
        *,
        num_shards: int,
        index: int,
        num_clients: int | None = None,
    ) -> "FederatedData":
        """As :meth:`from_arrays` and then :meth:`shard`, but no more than the shard's own rows is ever read.

        Args:
            read: ``rows -> {key: array [n, ...]}`` reads some rows, whose numbers ``[n]`` ascend.
            client_ids: As :meth:`from_arrays` takes them, of all rows.
            num_shards: How many shards there are; ``jax.process_count()`` of them for several processes.
            index: Which of them to read, from 0; ``jax.process_index()``.
            num_clients: As :meth:`from_arrays` takes it.

        Raises:
            TypeError, ValueError: As :meth:`from_arrays` and :meth:`shard`.

        >>> def read(rows):
        ...     print("reads", rows)
        ...     return {"y": 10 * rows}
        >>> data = FederatedData.from_reader(read, ["b", "a", "b", "c"], num_shards=2, index=0)
        reads [0 1 2]
        >>> data
        FederatedData(clients=3, examples=4, sizes=1/1/2, y: int64[], held: clients 0 to 1)
        """
        ids = checked_ids(client_ids)
        order, offsets, names = by_client(ids, num_clients)
        held = clients_of_shard(len(names), num_shards, index)
        own = order[offsets[held.start] : offsets[held.stop]]
        rows = np.sort(own)
        arrays = checked_arrays(read(rows), rows, "read was asked for")
        places = np.searchsorted(rows, own)
        return cls({key: taken(array, places) for key, array in arrays.items()}, offsets, names, held)

    def save(self, folder: str | Path) -> None:
        """Writes a folder that :meth:`open` opens; one that is whole or absent, whatever happens meanwhile.

        Raises:
            FileExistsError: If there is something at ``folder`` already.
        """
        self._need_all("save")
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
    def held(self) -> range:
        """The clients whose rows are here: all of them, or those of a :meth:`shard`."""
        return self._held

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The flat arrays by key, ``[examples, ...]`` each or a shard's rows; not writable. The dict is a new one each time."""
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

    def rows_here(self, rows: slice) -> slice:
        """Where these rows of the federation lie in the arrays.

        Raises:
            ValueError: If they are not all here.
        """
        first, end = self._edges(self._held)
        if rows.start < rows.stop and not first <= rows.start <= rows.stop <= end:
            whose = f"the rows of {self._whose()}" if first < end else "no rows"
            raise ValueError(f"Rows {rows.start} to {rows.stop - 1} are not all here: this shard has {whose}.")
        return slice(rows.start - first, rows.stop - first)

    def client(self, index: int) -> dict[str, np.ndarray]:
        """The rows of one client: views ``[n_i, ...]`` by key. Indices count from 0 to N-1.

        >>> FederatedData.from_arrays({"y": [5, 6, 7]}, [0, 2, 0]).client(0)
        {'y': array([5, 7])}
        """
        self._checked_indices([index])
        rows = self.rows_here(slice(self._offsets[index], self._offsets[index + 1]))
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
        self._need_all("select")
        offsets = offsets_of(self.sizes[indices])
        rows = np.arange(offsets[-1]) + np.repeat(self._offsets[indices] - offsets[:-1], self.sizes[indices])
        arrays = {key: taken(array, rows) for key, array in self._arrays.items()}
        return FederatedData(arrays, offsets, self._client_names[indices])

    def shard(self, num_shards: int, index: int) -> "FederatedData":
        """The same federation with the rows of one shard's clients alone: for one of several processes.

        The clients are those of :func:`clients_of_shard`. Arrays that are mapped into memory stay so, others are copied; what
        needs the rows of others is refused from then on. A simulation on several processes takes whole data and shards alike.

        Args:
            num_shards: How many shards there are; ``jax.process_count()`` of them for several processes.
            index: Which of them stays, from 0; ``jax.process_index()``.

        Raises:
            TypeError, ValueError: For an index that is none of 0 to ``num_shards - 1``, and of what is a shard already.

        >>> data = FederatedData.from_arrays({"y": [5, 6, 7]}, ["a", "b", "c"]).shard(2, 1)
        >>> data.num_clients, data.held, data.arrays
        (3, range(2, 3), {'y': array([7])})
        """
        self._need_all("shard")
        held = clients_of_shard(self.num_clients, num_shards, index)
        rows = np.arange(*self._edges(held))
        own = slice(*self._edges(held))
        arrays = {key: x[own] if isinstance(x, np.memmap) else taken(x, rows) for key, x in self._arrays.items()}
        return FederatedData(arrays, self._offsets, self._client_names, held)

    def map(self, fn: Callable[[dict[str, np.ndarray]], Mapping[str, Any]]) -> "FederatedData":
        """``fn`` on the dict of whole arrays; keys may come and go, rows must stay where they are.

        >>> data = FederatedData.from_arrays({"x": np.array([[0], [255]], "uint8")}, [0, 1])
        >>> data.map(lambda rows: {"x": rows["x"] / np.float32(255)})
        FederatedData(clients=2, examples=2, sizes=1/1/1, x: float32[1])
        """
        arrays = checked_arrays(fn(self.arrays), np.arange(*self._edges(self._held)), "the data has")
        return FederatedData(arrays, self._offsets, self._client_names, self._held)

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
            return self._halves(checked_mask("split_by: mask", np.asarray(mask), self.num_examples, "b"))
        self._need_all(f"split_by with the array {mask!r}")
        test = checked_mask(f"split_by: array {mask!r}", self._array(mask), self.num_examples, "biu")
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
        self._need_all("label_counts")
        labels = self._array(key)
        if labels.ndim != 1 or labels.dtype.kind not in "biu" or labels.min(initial=0) < 0:
            raise ValueError(f"label_counts: {key!r} must hold one integer from 0 per row, got {row_type(labels)}.")
        labels = labels.astype(np.int64)
        found = int(labels.max(initial=-1)) + 1
        columns = found if classes is None else scalar(checks.count, "label_counts.classes", classes, at_least=found)
        # One count over pairs of client and label is much faster than one count per client.
        cells = self.client_of_row * columns + labels
        return np.bincount(cells, minlength=self.num_clients * columns).reshape(self.num_clients, columns)

    def __repr__(self) -> str:
        spread = f"{self.sizes.min()}/{np.median(self.sizes):g}/{self.max_size}"
        rows = "".join(f", {key}: {row_type(array)}" for key, array in self._arrays.items())
        whose = "" if self._all_here else f", held: {self._whose()}"
        return f"FederatedData(clients={self.num_clients}, examples={self.num_examples}, sizes={spread}{rows}{whose})"

    def _halves(self, test: np.ndarray) -> "tuple[FederatedData, FederatedData]":
        train, test_half = (self._rows(rows) for rows in (~test, test))
        return train, test_half

    def _rows(self, kept: np.ndarray) -> "FederatedData":
        sizes = np.bincount(self.client_of_row[kept], minlength=self.num_clients)
        own = np.flatnonzero(kept[slice(*self._edges(self._held))])
        arrays = {key: taken(array, own) for key, array in self._arrays.items()}
        return FederatedData(arrays, offsets_of(sizes), self._client_names, self._held)

    def _edges(self, clients: range) -> tuple[int, int]:
        """Where the rows of these clients begin and end."""
        return int(self._offsets[clients.start]), int(self._offsets[clients.stop])

    @property
    def _all_here(self) -> bool:
        return len(self._held) == self.num_clients

    def _whose(self) -> str:
        return f"clients {self._held.start} to {self._held.stop - 1}" if self._held else "no client"

    def _need_all(self, what: str) -> None:
        if not self._all_here:
            raise ValueError(f"{what} needs the rows of all clients; of this shard only {self._whose()} are here. Do it before.")

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
