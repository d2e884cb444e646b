"""Programs run for milliseconds here and compile for seconds, so XLA is asked to compile fast. What they compute is the same."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _compile_fast():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
