"""``.npz`` files: whole, or the rows of some clients without the others' in memory."""

import contextlib
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.lib import format as npy

from jaxfed import checks
from jaxfed.data.federated import FederatedData

Keys = Sequence[str] | Mapping[str, str] | None

_PIECE_BYTES = 2**24


def npz(path: str | Path, *, client_key: str = "client", keys: Keys = None) -> FederatedData:
    """A federation from an ``.npz`` file that holds arrays and the client id of each example.

    Args:
        path: The file. Pickled objects in it are refused.
        client_key: The array of client ids ``[examples]``, integers or strings.
        keys: Names of the arrays to take, or ``{key: name in the file}``. Without it every other array with one row per
            client id is taken.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For a file that is no ``.npz`` or is cut short, and for names that it does not hold.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/two.npz", image=np.ones((3, 8)), writer=["ann", "bob", "ann"])
    ...     npz(f"{folder}/two.npz", client_key="writer", keys={"x": "image"})
    FederatedData(clients=2, examples=3, sizes=1/1.5/2, x: float64[8])
    """
    with Archive(path) as archive:
        ids = archive.read(client_key)
        names = archive.names(keys, besides=client_key, rows=ids.size)
        return FederatedData.from_arrays({key: archive.read(name) for key, name in names.items()}, ids)


def npz_arrays(path: str | Path, *, keys: Keys = None) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file, to be dealt over clients by a partition.

    Args:
        path: The file. Pickled objects in it are refused.
        keys: Names of the arrays to take, or ``{key: name in the file}``. Without it all are taken.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For a file that is no ``.npz`` or is cut short, and for names that it does not hold.
    """
    with Archive(path) as archive:
        return {key: archive.read(name) for key, name in archive.names(keys).items()}


class Archive:
    """An open ``.npz`` file; a context manager.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For a file that is no ``.npz``.
    """

    def __init__(self, path: str | Path):
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no file {str(path)!r}. Give the path of an .npz file.")
        # NumPy would take other files for pickles and advise to allow them.
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{str(path)!r} is no .npz file, or is cut short. Write one with numpy.savez_compressed.")
        self.path, self._npz = str(path), np.load(path, allow_pickle=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._npz.close()

    def names(self, keys: Keys, *, besides: str | None = None, rows: int | None = None) -> dict[str, str]:
        """The arrays to take, ``{key: name in the file}``.

        Args:
            keys: What the user says. Without it all, or, with ``rows``, all but ``besides`` that have so many.
            besides: The array of ids.
            rows: How many ids there are.
        """
        if isinstance(keys, str):
            raise TypeError(f'keys must be a list of names or {{key: name in the file}}, got {keys!r}. Write ["{keys}"].')
        if isinstance(keys, Mapping):
            return dict(keys)
        if keys is not None or rows is None:
            return {name: name for name in (self._npz.files if keys is None else keys)}
        return {name: name for name in self._npz.files if name != besides and self._header(name).shape[:1] == (rows,)}

    def read(self, name: str) -> np.ndarray:
        """An array."""
        with self._reading(name):
            array = self._npz[name]
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{self.path!r}: {name!r} is not an array. Write the file with numpy.savez_compressed.")
        return array

    def rows(self, names: Mapping[str, str], rows: np.ndarray, count: int) -> dict[str, np.ndarray]:
        """Some rows, whose numbers ascend, of arrays that have ``count``: ``{key: array [n, ...]}``."""
        return {key: self._rows(name, rows, count) for key, name in names.items()}

    def _rows(self, name: str, rows: np.ndarray, count: int) -> np.ndarray:
        header = self._header(name)
        if header.shape[:1] != (count,):
            raise ValueError(
                f"Array {name!r} has shape {header.shape}, but client_ids has {count} rows; the first axes must agree."
            )
        width = math.prod(header.shape[1:]) * header.dtype.itemsize
        if header.by_column or width == 0 or header.dtype.hasobject:
            return self.read(name)[rows]
        taken, filled = np.empty((len(rows), *header.shape[1:]), header.dtype), 0
        step = max(1, _PIECE_BYTES // width)
        with self._reading(name), self._npz.zip.open(self._member(name)) as file:
            _header(file)
            # To the end even where no more rows are wanted: the sum that tells damage stands there.
            for first in range(0, count, step):
                piece = np.frombuffer(file.read(min(step, count - first) * width), header.dtype).reshape(-1, *header.shape[1:])
                wanted = rows[filled : np.searchsorted(rows, first + step)]
                taken[filled : filled + len(wanted)] = piece[wanted - first]
                filled += len(wanted)
        return taken

    def _header(self, name: str) -> "_Header":
        with self._reading(name), self._npz.zip.open(self._member(name)) as file:
            return _header(file)

    def _member(self, name: str) -> str:
        # As NumPy looks a name up; other writers than its own may leave the ending out.
        return name if name in self._npz.zip.namelist() else f"{name}.npy"

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        files = self._npz.files
        if name not in files:
            held = ", ".join(files) or "none"
            raise ValueError(f"{self.path!r} has no array {name!r}.{checks.closest(name, files)} It holds: {held}.")
        try:
            yield
        except (ValueError, EOFError, OSError, KeyError, IndexError, zipfile.BadZipFile, zlib.error) as error:
            what = f"array {name!r} cannot be read: {error} Store plain arrays, not objects."
            raise ValueError(f"{self.path!r}: {what}") from error


class _Header(NamedTuple):
    """What an array's file says of it; ``by_column`` where the first axis is not the slowest."""

    shape: tuple[int, ...]
    by_column: bool
    dtype: np.dtype


def _header(file: Any) -> _Header:
    read = {1: npy.read_array_header_1_0, 2: npy.read_array_header_2_0}
    major, _ = npy.read_magic(file)
    if major not in read:
        raise ValueError(f"version {major} of NumPy's format is for arrays with named fields.")
    shape, by_column, dtype = read[major](file)
    return _Header(shape, by_column and len(shape) > 1, dtype)
