"""Settings for all tests: silent broadcasting raises, and a PRNG key used twice raises."""

import os
from pathlib import Path

import jax
import pytest

from jaxfed.engine import mesh

# Some tests ask for several devices; the others, and the doctests of the package, see one.
jax.config.update("jax_num_cpu_devices", 8)
mesh.default_devices = lambda: jax.devices()[:1]
# Programs run for milliseconds here and compile for seconds, so XLA is asked to compile fast, in processes that tests start too.
# What they compute is the same;  JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest  has them compiled as users do.
COMPILE_FAST = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") != "0"
jax.config.update("jax_disable_most_optimizations", COMPILE_FAST)


@pytest.fixture(autouse=True)
def strict():
    """For the tests only: users' code, as in the README, may broadcast as NumPy does."""
    with jax.numpy_rank_promotion("raise"), jax.debug_key_reuse(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs of a finished module would pile up to gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def compiled_as_users_do():
    """For tests that compute for longer than they compile, and those of what the compiler makes."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", COMPILE_FAST)


@pytest.fixture
def x64():
    """Float64 inside the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def shared():
    """The folder of reference data beside the project; the test is skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the reference data that lie beside the project's folder in development")
    return folder
