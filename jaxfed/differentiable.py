"""Rounds that reverse mode passes: gradients with respect to rates, strengths, aggregation weights and start weights."""

import dataclasses
from collections.abc import Callable

import jax

from jaxfed import checks
from jaxfed.engine.algorithm import Algorithm
from jaxfed.engine.population import Population, weigh_population
from jaxfed.engine.round import run_round
from jaxfed.messages import RunState
from jaxfed.simulation import Simulation


def differentiable_rounds(simulation: Simulation, rounds: int, *, lanes: int = 1) -> Callable[[Algorithm, RunState], RunState]:
    r"""A number of rounds as one pure function ``(algorithm, state) -> state``, for ``jax.grad``.

    .. math:: \frac{\partial}{\partial h} F(w_R), \qquad w_{t+1} = \mathrm{round}_h(w_t)

    The values are those of ``simulation.run``. What is differentiated with respect to is put into the algorithm (its fields take
    tracers) or into the state (``state._replace(params=...)``). Every loop has a trip count that the program knows, so epochs and
    local steps are plain numbers, and a selector's ``work`` is at most 1.

    Only the states between rounds are stored, and while a round is gone back through, the weights between a client's steps: the
    rest is computed again. A table of what clients keep is stored for each round.

    Cohorts, the order of rows and who counts have no derivative. A client that is left out because its upload is not finite
    makes the gradient NaN.

    Args:
        simulation: Data, selector, and the shapes of an algorithm; not its numbers.
        rounds: ``R``, at least 1.
        lanes: ``L``, clients that run side by side. With 1, short clients cost no empty steps.

    Example:
        >>> import jax.numpy as jnp, jaxfed
        >>> def loss(w, batch, key):
        ...     return (w - batch["x"]) ** 2 / 2
        >>> data = jaxfed.FederatedData.from_arrays({"x": jnp.array([1.0, 3.0])}, [0, 1])
        >>> algorithm = jaxfed.fedavg(loss, lrate=0.5, batch_size=1)
        >>> simulation = jaxfed.Simulation(algorithm, data)
        >>> state, rounds = simulation.init(jnp.zeros(()), key=jax.random.key(0)), differentiable_rounds(simulation, 2)
        >>> print(jax.grad(lambda rate: rounds(algorithm.replace(server=rate), state).params)(1.0))  # w = 2 - 2 (1 - rate / 2)^2
        1.0
    """
    checks.instance("simulation", simulation, Simulation)
    rounds = checks.count("rounds", rounds, checks.Bounds(at_least=1))
    lanes = min(checks.count("lanes", lanes, checks.Bounds(at_least=1)), simulation.cohort_size)
    selector, population = simulation.selector, dataclasses.replace(simulation.population, fixed=True)

    def run(algorithm: Algorithm, state: RunState) -> RunState:
        """The state after the rounds."""
        checks.instance("algorithm", algorithm, Algorithm)
        simulation._check_state(state)
        weighed = population_for(algorithm, population)

        @jax.checkpoint
        def one(state: RunState, _: None) -> tuple[RunState, None]:
            return run_round(algorithm, selector, weighed, state, lanes)[0], None

        return jax.lax.scan(one, state, length=rounds)[0]

    return run


def population_for(algorithm: Algorithm, population: Population) -> Population:
    """The population as this algorithm weighs it: its weight may depend on numbers that are traced."""
    weight = weigh_population(algorithm.client, algorithm.aggregator, population.sizes, capacity=population.capacity)
    return dataclasses.replace(population, weight=weight)
