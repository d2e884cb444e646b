"""Programs run for milliseconds here and compile for seconds, so XLA is asked to compile fast. What they compute is the same."""

import jax
import pytest

from jaxfed.engine import mesh


@pytest.fixture(autouse=True)
def _compile_fast():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def _split_small_leaves(monkeypatch):
    """The weights of these models travel in parts wherever they divide, as large ones do."""
    monkeypatch.setattr(mesh, "_SMALLEST_SPLIT", 4)
