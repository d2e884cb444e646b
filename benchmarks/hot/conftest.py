"""How a compiled function is timed: arguments on the device, compiled before the clock starts, results waited for."""

from collections.abc import Callable
from typing import Any

import jax
import pytest


@pytest.fixture
def timed(benchmark: Any) -> Callable[..., Any]:
    """``timed(fn, *arguments)`` benchmarks ``jit(fn)``, and returns what it gives."""

    def run(fn: Callable, *arguments: Any) -> Any:
        compiled = jax.jit(fn).lower(*arguments).compile()
        arguments = jax.block_until_ready(jax.device_put(arguments))
        return benchmark(lambda: jax.block_until_ready(compiled(*arguments)))

    return run
