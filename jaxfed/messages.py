"""What goes between server, clients and rounds: the values that the nouns of :mod:`jaxfed.base` take and give."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Params = Any
"""A pytree of trained weights."""
Stats = Any
"""A pytree of statistics that are not trained (the means of a batch norm); ``{}`` where a model has none."""
Batch = Any
"""A dict of a client's rows by their own keys, ``[B, ...]`` each, and ``"mask"`` ``[B]``: False on padded rows."""


class Broadcast(NamedTuple):
    """What the server sends to every client of a cohort.

    Attributes:
        params: The global weights.
        stats: The global statistics of the model.
        aux: Auxiliary variables by ``aux_name``.
        round: The number of the round, from 0.
        survey: What a first pass over the same cohort found, where the algorithm asks for one.
    """

    params: Params
    stats: Stats
    aux: dict[str, Any]
    round: jax.Array | int
    survey: Any = ()


class RoundStart(NamedTuple):
    """What a part of a client's optimizer knows when a round begins.

    Attributes:
        params: The weights that anchor the round (the broadcast ones); training may begin elsewhere.
        stats: The statistics that were broadcast.
        aux: The auxiliary variable sent to this part.
        round: The number of the round, from 0.
        key: A PRNG key that belongs to this client, round and part alone.
        full_gradient: ``params -> gradient`` of the mean loss over all the client's rows: a pass that costs only if called.
        survey: What a first pass over the same cohort found, where the algorithm asks for one.
    """

    params: Params
    stats: Stats = ()
    aux: Any = ()
    round: jax.Array | int = 0
    key: jax.Array | None = None
    full_gradient: Callable[[Params], Params] | None = None
    survey: Any = ()


class CohortInfo(NamedTuple):
    """What the server knows of a finished round, beside the sums.

    Attributes:
        round: The number of the round, from 0.
        population: ``N``.
        population_weight: The sum of the aggregator's weights over the whole population.
        clients: How many clients counted.
        weight: The sum of their weights.
        key: For what the server draws, new in every round.
    """

    round: jax.Array | int
    population: jax.Array | int
    population_weight: jax.Array | float
    clients: jax.Array | int
    weight: jax.Array | float
    key: jax.Array | None = None


class Upload(NamedTuple):
    """What a client sends back.

    Attributes:
        delta: ``w_start - w_end``, like ``params``: a server that takes an SGD step of rate 1 along the mean of these is FedAvg.
        stats: The model's statistics after local training.
        aux: Auxiliary variables by ``aux_name``.
        metrics: Scalars: ``examples`` (rows the client holds), ``steps`` (local steps taken), ``loss`` (mean over its batches).
    """

    delta: Params
    stats: Stats
    aux: dict[str, Any]
    metrics: dict[str, jax.Array]


class Cohort(NamedTuple):
    """The clients of one round.

    Attributes:
        ids: ``[C]`` client numbers, 0 to N - 1.
        valid: ``[C]`` bool; False where there are fewer clients than C.
        work: ``[C]`` how much of its local work each client does, as a factor of the policy's epochs or steps (1.0 is all).
        age: ``[C]`` how many rounds ago each client began, from that round's broadcast; () where all begin now.
        memo: What the selector wants to be told again by ``observe``.
    """

    ids: jax.Array
    valid: jax.Array
    work: jax.Array
    age: Any = ()
    memo: Any = ()


class RunState(NamedTuple):
    """Everything that must survive a crash, one pytree: saving it and going on gives the run that was never interrupted.

    Attributes:
        round: Rounds done.
        params: The global weights.
        stats: The model's statistics.
        server: The state of the server's optimizer.
        aggregator: The state of the aggregator.
        selector: The state of the client selection.
        kept: What clients keep between rounds, ``[N, ...]``.
        seen: ``[N]`` whether a client has taken part.
        key: The run's root PRNG key.
        past: The broadcasts of the last rounds ``[T, ...]``, from which late clients began; () where all begin now.
    """

    round: jax.Array
    params: Params
    stats: Stats
    server: Any
    aggregator: Any
    selector: Any
    kept: Any
    seen: jax.Array
    key: jax.Array
    past: Any = ()
