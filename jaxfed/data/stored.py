"""A federation in a folder: every array a file that is mapped into memory, so that data may be larger than it.

============================  ============================================================================
``federation.json``           the version, and of each array its key, file, dtype and shape
``offsets.npy``               where each client's rows begin, and the end of the last ``[N+1]``
``clients.npy``               the clients' ids ``[N]``
``array-0.npy``, ...          the arrays ``[examples, ...]``
============================  ============================================================================
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxfed import files

_VERSION = 1
_MANIFEST = "federation.json"
_WHAT = "which says what the arrays are"


class Stored(NamedTuple):
    """What a folder holds: arrays by key, mapped into memory, offsets and the clients' ids."""

    arrays: dict[str, np.ndarray]
    offsets: np.ndarray
    client_names: np.ndarray


def write(folder: Path, arrays: Mapping[str, np.ndarray], offsets: np.ndarray, client_names: np.ndarray) -> None:
    """Writes a folder that is whole or absent.

    Raises:
        FileExistsError: If there is something at ``folder`` already.
    """
    own = {"offsets": offsets, "clients": client_names}
    named = {f"array-{number}": array for number, array in enumerate(arrays.values())}
    entries = {name: {"file": f"{name}.npy", **_type(array)} for name, array in {**own, **named}.items()}
    with files.new_folder(folder) as partial:
        for name, array in {**own, **named}.items():
            np.save(partial / f"{name}.npy", _bytes_of(array), allow_pickle=False)
        listed = [{"key": key, **entries[name]} for key, name in zip(arrays, named)]
        manifest = {"version": _VERSION, "arrays": listed, **{name: entries[name] for name in own}}
        files.write(partial / _MANIFEST, json.dumps(manifest, indent=1))


def read(folder: Path) -> Stored:
    """Opens a folder; of the arrays only what is looked at is read.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: For a folder that is no federation, and for a file that is missing, cut short or altered.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}. Write one with FederatedData.save(folder).")
    manifest = files.read_json(folder / _MANIFEST, _WHAT)
    if manifest.get("version") != _VERSION:
        found = manifest.get("version")
        raise ValueError(f"{folder / _MANIFEST}: expected version {_VERSION}, got {found!r}. A later jaxfed may have written it.")
    try:
        offsets, names = (_array(folder, manifest[name], mapped=False) for name in ("offsets", "clients"))
        arrays = {entry["key"]: _array(folder, entry, mapped=True) for entry in manifest["arrays"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / _MANIFEST}, {_WHAT}, is altered: {error!r}.") from None
    _check(folder, arrays, offsets, names)
    return Stored(arrays, offsets, names)


def _array(folder: Path, entry: dict[str, Any], *, mapped: bool) -> np.ndarray:
    # A name with folders in it would lead elsewhere.
    path, dtype, shape = folder / Path(entry["file"]).name, jnp.dtype(entry["dtype"]), tuple(entry["shape"])
    if not path.is_file():
        raise ValueError(f"{folder} has no {path.name}, which holds {entry.get('key', path.stem)!r}.")
    try:
        # There is nothing to map of an array without elements.
        array = np.load(path, mmap_mode="r" if mapped and 0 not in shape else None, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is cut short or altered: {error}") from None
    if array.dtype != _plain(dtype) or array.shape != shape:
        what = f"expected {_plain(dtype)}{list(shape)}, got {array.dtype}{list(array.shape)}"
        raise ValueError(f"{path} is altered: {what}.")
    return array.view(dtype)


def _check(folder: Path, arrays: dict[str, np.ndarray], offsets: np.ndarray, names: np.ndarray) -> None:
    if offsets.shape != (len(names) + 1,) or offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise ValueError(f"{folder / 'offsets.npy'} is altered: expected {len(names) + 1} ascending numbers from 0.")
    for key, array in arrays.items():
        if len(array) != offsets[-1]:
            raise ValueError(f"{folder}: the clients hold {offsets[-1]} rows, the array {key!r} has {len(array)}.")


def _type(array: np.ndarray) -> dict[str, Any]:
    # The names of strings' dtypes lack their length.
    dtype = array.dtype.str if array.dtype.kind == "U" else array.dtype.name
    return {"dtype": dtype, "shape": list(array.shape)}


def _plain(dtype: np.dtype) -> np.dtype:
    """What a file says of a dtype: those that NumPy does not know, such as bfloat16, are integers of their width there."""
    return np.dtype(f"u{dtype.itemsize}") if dtype.kind == "V" else dtype


def _bytes_of(array: np.ndarray) -> np.ndarray:
    return array.view(_plain(array.dtype))
