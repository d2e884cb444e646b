"""What a run's bits depend on beside its config: versions and machine; and the command's compilation cache."""

import contextlib
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that compute.

    >>> versions()["jax"] == jax.__version__
    True
    """
    names = ("jaxfed", "jax", "jaxlib", "optax", "flax", "numpy")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def environment() -> dict[str, Any]:
    """Versions, and the devices that compute: equal ones give equal bits."""
    device = jax.devices()[0]
    devices = {"backend": device.platform, "device": device.device_kind, "devices": jax.device_count()}
    return {**versions(), **devices, "machine": platform.machine(), "x64": jax.numpy.result_type(float).itemsize == 8}


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two environments, as texts.

    >>> differences({"jax": "0.10.1", "numpy": "2.4"}, {"jax": "0.10.2", "numpy": "2.4"})
    ['jax 0.10.1 then, 0.10.2 now']
    """
    return [f"{key} {then.get(key)} then, {now.get(key)} now" for key in now if then.get(key) != now.get(key)]


@contextlib.contextmanager
def extra(what: str) -> Iterator[None]:
    """Around the import of an optional library: says how to install it.

    Raises:
        ImportError: Where the library is missing.

    >>> with extra("The picture"):
    ...     import a_library_that_is_missing
    Traceback (most recent call last):
    ...
    ImportError: The picture needs a_library_that_is_missing. Install it with  pip install "jaxfed[run]"
    """
    try:
        yield
    except ImportError as error:
        remedy = 'Install it with  pip install "jaxfed[run]"'
        raise ImportError(f"{what} needs {error.name}. {remedy}", name=error.name) from error


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second run starts at once. For a command, not a library."""
    # A folder that the user has set stays.
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "jaxfed" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def make_devices(count: int | None, *, alone: bool = True) -> None:
    """Asks for so many CPU devices, before JAX has looked for any; where there are others, they are used. For a command.

    Args:
        count: How many; None makes one for each core, which run their own clients faster than one device with all cores does.
        alone: Whether this process is the whole run; each of several has one CPU device unless ``count`` says otherwise.

    Raises:
        RuntimeError: If JAX has looked already, and has fewer than ``count``.
    """
    wanted = (_cores() if alone else 1) if count is None else count
    if wanted > jax.config.jax_num_cpu_devices:  # type: ignore[attr-defined]
        with contextlib.suppress(*[RuntimeError] if count is None else []):
            jax.config.update("jax_num_cpu_devices", wanted)


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    # Imported from a source folder.
    except metadata.PackageNotFoundError:
        return "unknown"
