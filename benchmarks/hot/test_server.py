"""What the server does with a cohort's uploads: aggregation, robust rules, its optimizer."""

import jax
import jax.numpy as jnp
import pytest

import jaxfed

CLIENTS = 50
RULES = {
    "mean": jaxfed.Mean("uniform"),
    "masked mean": jaxfed.GradientMaskedMean("uniform"),
    "norm bound": jaxfed.NormBound(max_norm=0.5),
    "median": jaxfed.Median(),
    "trimmed mean": jaxfed.TrimmedMean(0.1),
    "geometric median": jaxfed.GeometricMedian(),
    "krum": jaxfed.Krum(5),
    "bulyan": jaxfed.Bulyan(5),
}
SERVERS = {
    "sgd": jaxfed.Optimizer(1.0),
    "momentum": jaxfed.Optimizer(1.0, modules=["momentum"]),
    "adam": jaxfed.Optimizer(0.01, modules=["adam"]),
    "yogi": jaxfed.Optimizer(0.01, modules=["yogi"]),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [610, 100_000])
def test_aggregator(timed, rule, size):
    """50 uploads of ``size`` numbers."""
    updates = jax.random.normal(jax.random.key(0), (CLIENTS, size))
    timed(RULES[rule].aggregate, updates, jnp.ones(CLIENTS))


@pytest.mark.parametrize("name", SERVERS)
def test_server_update(timed, name):
    """A million weights."""
    params = {"w": jnp.ones((1000, 1000)), "b": jnp.ones(1000)}
    server = SERVERS[name]
    state = server.start_server(params, jax.random.key(0))
    timed(server.update, params, state, params)
