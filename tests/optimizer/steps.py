"""What the tests of optimizer parts share: a plain loop over steps, and parts with random hyper-parameters."""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxfed import part


def run(module: Any, gradients: Any, params: Any = None) -> tuple[Any, Any]:
    """Updates of a plain loop over ``[K, ...]`` gradients, stacked, and the last state; a module with ``init`` and ``update``."""
    state = module.init(jnp.zeros_like(gradients[0]) if params is None else params)
    updates = []
    for gradient in gradients:
        update, state = module.update(gradient, state, params)
        updates.append(update)
    return jnp.stack(updates), state


def gradients(steps: int = 6, size: int = 4, seed: int = 0) -> np.ndarray:
    """Random float32 gradients ``[steps, size]``, some of which are zero."""
    values = np.random.default_rng(seed).normal(size=(steps, size))
    values[steps // 2, :2] = 0.0
    return values.astype(np.float32)


def random_part(cls: type, seed: int) -> Any:
    """An instance none of whose hyper-parameters is the default."""
    rng = np.random.default_rng(seed)
    return cls(
        **{field.name: _other(field, rng) for field in dataclasses.fields(cls) if field.name not in ("safe_mode", "labels")}
    )


def _other(field: dataclasses.Field, rng: np.random.Generator) -> Any:
    if field.name == "bias_correction":
        return str(rng.choice(["after-max", "after-eps", "none"]))
    if field.type in (bool, "bool"):
        return not field.default if isinstance(field.default, bool) else True
    if field.type in (int, int | None):
        return int(rng.integers(2, 9))
    return float(rng.uniform(0.05, 0.95))


def through_json(value: Any) -> Any:
    """The part that a written and read config builds."""
    return part.build(value.kind, json.loads(json.dumps(part.spec(value))))
