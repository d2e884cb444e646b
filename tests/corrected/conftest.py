"""Float64, and programs that run for milliseconds are compiled fast; what they compute is the same."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _exact_and_compiled_fast(x64):
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
