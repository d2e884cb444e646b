"""A module of your own: registered, serialised, compiled and checked, in under ten lines.

Run:  python examples/own_module.py
"""

import jax
import jax.numpy as jnp

import jaxfed
from jaxfed.testing import check_module


class Lion(jaxfed.OptiModule):
    """The sign of an interpolated momentum (Chen et al., https://arxiv.org/abs/2302.06675, 2023)."""

    name = "lion"
    beta_1: float = jaxfed.number(default=0.9, at_least=0, below=1)
    beta_2: float = jaxfed.number(default=0.99, at_least=0, below=1)

    def init(self, params):
        return jaxfed.trees.zeros_like(params)

    def update(self, updates, state, params=None):
        signs = jax.tree.map(jnp.sign, jaxfed.trees.average(self.beta_1, state, updates))
        return signs, jaxfed.trees.average(self.beta_2, state, updates)


def main() -> jaxfed.Optimizer:
    """Checks the module, finds it by name, and takes it through a config."""
    check_module(Lion(0.8))
    optimizer = jaxfed.Optimizer(0.01, modules=[("lion", {"beta_1": 0.95})])
    assert jaxfed.Optimizer.from_config(optimizer.get_config()) == optimizer
    return optimizer


if __name__ == "__main__":
    print(main())
