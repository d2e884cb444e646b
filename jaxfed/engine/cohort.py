"""All clients of a cohort: dealt to the devices by their work, visited there, and what they give brought together."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfed.engine.lanes import Lane, Outcome, Visit, fold_waves
from jaxfed.engine.mesh import BY_DEVICE, BY_MACHINE, EVERYWHERE, Devices
from jaxfed.engine.population import Population
from jaxfed.messages import Cohort

Client = jax.tree_util.Partial
"""``(lane, kept row, *rows) -> Outcome``, for one client with its :class:`ClientRows` in every population.

A ``Partial`` of a module's function: what it holds goes to every device.
"""


class Tables(NamedTuple):
    """What clients keep between rounds ``[rows, ...]``, a row for each client, and which have taken part ``[N]``."""

    kept: Any
    seen: jax.Array


class Folded(NamedTuple):
    """What a cohort gave.

    Attributes:
        total: The sum of the summands.
        tables: The new tables.
        rows: Every outcome's ``row``, ``[C, ...]`` in the order of the cohort.
        stacked: Every outcome's ``stacked``, likewise.
        counts: ``[C]``.
    """

    total: Any
    tables: Tables
    rows: Any
    stacked: Any
    counts: jax.Array


def fold_clients(
    client: Client,
    cohort: Cohort,
    steps: jax.Array,
    key: jax.Array,
    tables: Tables,
    populations: tuple[Population, ...],
    lanes: int,
) -> Folded:
    """Runs every client of a cohort.

    Clients are sorted by their local steps and dealt like cards, so that those of a wave end together and all devices have about
    the same work: time grows with the examples, not with C times the longest client.

    Args:
        client: What one client does.
        cohort: ``[C]``; C need not be a multiple of lanes or devices. A client that is not valid is not visited.
        steps: ``[C]`` local steps.
        key: Folded with a client's number it is that client's own.
        tables: The kept rows.
        populations: Whose rows clients see, all of the same clients.
        lanes: ``L`` on each device, static.
    """
    home, size = populations[0], tables.seen.shape[0]
    seen = tables.seen[jnp.clip(cohort.ids, 0, size - 1)]
    # All at once: in the loop over clients a call of the generator would cost as much as a small local step.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, cohort.ids)
    everyone = Lane(keys, home.slots(cohort.ids), home.places(cohort.ids), seen, cohort.work, cohort.age)
    steps = jnp.where(cohort.valid, steps, -1)
    args = (populations, tables.kept, client, everyone, steps)
    on_device = partial(_on_device, devices=home.devices, lanes=lanes)
    if home.devices.mesh is None:
        total, kept, outcome = on_device(*args)
    else:
        total, kept, outcome = home.devices.run(on_device, args, *_layouts(*args))
    seen = tables.seen.at[jnp.where(outcome.counts, cohort.ids, size)].set(True, mode="drop")
    return Folded(total, Tables(kept, seen), outcome.row, outcome.stacked, outcome.counts)


def _on_device(
    populations: tuple[Population, ...],
    kept: Any,
    client: Client,
    everyone: Lane,
    steps: jax.Array,
    *,
    devices: Devices,
    lanes: int,
) -> tuple[Any, Any, Outcome]:
    """One device's part of a cohort: ``(total, kept, outcome)``, as :meth:`Devices.add` and its like leave them."""
    size = steps.shape[0]
    mine = (steps >= 0) & (populations[0].owners[everyone.slot] == devices.machine())
    deck, waves = deal(jnp.where(mine, steps, -1), mine.sum(), devices.per_machine, lanes)
    visit = partial(_visit, client, populations)
    if populations[0].fixed:
        # Empty waves run too, so that reverse mode passes their loop, and a client's insides are computed again on the way back.
        visit, waves = jax.checkpoint(visit), deck.shape[1]
    total, kept, outcome = _visit_dealt(visit, everyone, deck, waves, kept, devices)
    places = deck[devices.index()]
    rows, counts = devices.spread((outcome.row, outcome.counts), places, size)
    stacked = devices.exchange(outcome.stacked, places, size)
    return devices.add(total), kept, outcome._replace(row=rows, stacked=stacked, counts=counts)


def _visit(client: Client, populations: tuple[Population, ...], lane: Lane, kept: Any) -> Outcome:
    return client(lane, kept, *(p.client(lane.slot, lane.work) for p in populations))


def _layouts(populations: tuple[Population, ...], kept: Any, client: Client, everyone: Lane, steps: jax.Array) -> tuple[Any, Any]:
    """Where arguments and results of :func:`_on_device` lie."""
    devices = populations[0].devices
    everywhere, by_device = (partial(jax.tree.map, lambda _, spec=spec: spec) for spec in (EVERYWHERE, BY_DEVICE))
    first, row = jax.tree.map(lambda x: x[0], (everyone, kept))
    example = jax.eval_shape(lambda: _visit(client, populations, first, row))
    counts: Any = EVERYWHERE
    outcome = Outcome((), (), everywhere(example.row), devices.split_rows(example.stacked), counts)
    in_specs = (tuple(map(_by_machine, populations)), by_device(kept), *everywhere((client, everyone, steps)))
    return in_specs, (devices.split(example.summand), by_device(kept), outcome)


def deal(steps: jax.Array, count: jax.Array, devices: int, lanes: int) -> tuple[jax.Array, jax.Array]:
    """Who comes when: the clients by falling steps, a group of ``lanes`` to each device, in turn and back again.

    A group takes as many steps as its longest client. No device then has more steps than another one and the longest client
    together: what a device gets in one wave, every other one got at least in the wave before.

    Args:
        steps: ``[C]``; the ``count`` largest are dealt.
        count: How many clients there are.
        devices: ``D``.
        lanes: ``L``.

    Returns:
        Places in the cohort ``[D, W, L]``, C where there is nobody, and the number of waves that have somebody.

    >>> deck, waves = deal(jnp.array([3, 9, -1, 5, 7, 1]), jnp.array(5), devices=2, lanes=1)
    >>> print(deck[:, :, 0], waves)
    [[1 0 5]
     [4 3 6]] 3
    """
    size, group = steps.shape[0], devices * lanes
    waves = -(-size // group)
    order = jnp.argsort(steps, descending=True)
    order = jnp.where(jnp.arange(size) < count, order, size)
    deck = jnp.pad(order, (0, waves * group - size), constant_values=size).reshape(waves, devices, lanes)
    deck = jnp.where(jnp.arange(waves)[:, None, None] % 2 == 1, deck[:, ::-1], deck)
    return deck.swapaxes(0, 1), -(-count // group)


def _visit_dealt(
    visit: Visit, everyone: Lane, deck: jax.Array, waves: jax.Array | int, kept: Any, devices: Devices
) -> tuple[Any, Any, Outcome]:
    """The waves of one device, on the table itself where a machine has one device, else on a copy of the rows it needs."""
    size = everyone.slot.shape[0]
    dealt = jax.tree.map(lambda x: x[jnp.minimum(deck, size - 1)], everyone)
    # Where nobody sits there is no work, and nothing counts.
    dealt = dealt._replace(work=jnp.where(deck < size, dealt.work, 0))
    lanes = jax.tree.map(lambda x: x[devices.index()], dealt)
    if devices.per_machine == 1:
        return fold_waves(visit, lanes, waves, kept)
    rows = jnp.where(deck < size, dealt.place, jnp.iinfo(jnp.int32).max).reshape(devices.per_machine, -1)
    lanes = lanes._replace(place=jnp.arange(lanes.place.size).reshape(lanes.place.shape))
    total, new, outcome = fold_waves(visit, lanes, waves, devices.fetch(kept, rows))
    return total, devices.store(kept, rows, new), outcome


def _by_machine(population: Population) -> Population:
    everywhere = jax.tree.map(lambda _: EVERYWHERE, population)
    return dataclasses.replace(everywhere, arrays=dict.fromkeys(population.arrays, BY_MACHINE))
