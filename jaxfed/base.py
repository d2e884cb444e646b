"""The nouns of a federated round and what each promises. Read this page, then ``engine/round.py``.

Axis letters, the same in every docstring: ``N`` clients in the population, ``C`` clients in a cohort, ``L`` lanes (clients
that run side by side), ``K`` local steps, ``B`` examples in a batch, ``R`` rounds, ``M`` models.

Every rule is written for one client. That there are many is known to the engine alone.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxfed import checks, part, trees
from jaxfed.messages import Batch, Broadcast, Cohort, CohortInfo, Params, RoundStart, Upload
from jaxfed.part import Part


class OptiModule(Part, kind="module"):
    """A step from gradients to updates, a building block of an Optimizer, and a valid optax transformation.

    ``init`` and ``update`` are optax's contract. Three more methods are the client's half of a round, two the server's; their
    defaults keep nothing and send nothing, so most modules define ``init`` and ``update`` only.

    A client's module starts each round afresh unless its Optimizer says ``keep_state=True``; the server's lives as long as the
    run. Auxiliary variables go from the server to all clients (one value for all), and come back reduced over the cohort: their
    leaves are averaged with the aggregator's weights (``aux_reduction = "mean"``) or added up (``"sum"``), or as a dict says for
    each of its keys; ``aux_name`` pairs the halves.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> class Sign(OptiModule):
        ...     name = "doctest-sign"
        ...     scale: float = part.number(default=1.0, above=0)
        ...     def update(self, updates, state, params=None):
        ...         return jax.tree.map(lambda g: self.scale * jnp.sign(g), updates), state
        >>> chain = optax.chain(Sign(0.1), optax.scale(-1.0))
        >>> weights = jnp.array([1.0, 2.0])
        >>> updates, _ = chain.update(jnp.array([3.0, -4.0]), chain.init(weights), weights)
        >>> print(updates)
        [-0.1  0.1]
    """

    aux_name: ClassVar[str | None] = None
    aux_reduction: ClassVar[str | Mapping[str, str]] = "sum"

    @property
    def carries_on(self) -> bool:
        """Whether an Optimizer with ``keep_state=True`` begins a client's round with the state that the last one ended with."""
        return True

    def init(self, params: Params) -> Any:
        """The state before the first step."""
        del params
        return ()

    def update(self, updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        """One step: ``(updates, state) -> (updates, state)``, the same tree, shapes and dtypes."""
        raise NotImplementedError(f"{type(self).__name__} defines no update(updates, state, params).")

    def init_kept(self, params: Params, key: jax.Array) -> Any:
        """What a client keeps before it first takes part; ``params`` are that round's global weights."""
        del params, key
        return ()

    def start_round(self, kept: Any, start: RoundStart) -> Any:
        """The state with which a client's round begins."""
        del kept
        return self.init(start.params)

    def end_round(self, state: Any, begin: Params, end: Params) -> tuple[Any, Any]:
        """``(kept, aux)`` after local training took the weights from ``begin`` to ``end``."""
        del state, begin, end
        return (), ()

    def advice(self, optimizer: Any) -> str:
        """A warning for a client's Optimizer in which this module does not do what it promises; empty if all is well."""
        del optimizer
        return ""

    def send(self, state: Any) -> Any:
        """Server half: the auxiliary variable that goes to all clients of the coming round."""
        del state
        return ()

    def receive(self, state: Any, aux: Any, info: CohortInfo) -> Any:
        """Server half: the state after the cohort's reduced auxiliary variable has come back."""
        del aux, info
        return state


class Regularizer(OptiModule, kind="regularizer"):
    """An OptiModule that adds a penalty's gradient, before the modules. Its state is the anchor, set anew every round."""

    @property
    def carries_on(self) -> bool:
        """False: an anchor belongs to its round."""
        return False


class Aggregator(Part, kind="aggregator"):
    """How the uploads of a cohort become one pseudo-gradient: ``prepare`` at each client, a sum, ``finalize`` at the server.

    Uploads are never seen together, so the sum streams over lanes, devices and machines alike. A rule that must see them
    together (a median) says ``stacks = True`` and defines :meth:`combine` instead; memory is then C models.
    """

    stacks: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ()
    """Metrics that it needs beside those that always travel; the client must measure them."""

    def init(self, params: Params) -> Any:
        """The state before the first round."""
        del params
        return ()

    def send(self, state: Any) -> Any:
        """What ``prepare`` gets from the server."""
        del state
        return ()

    def weigh(self, metrics: dict[str, jax.Array]) -> jax.Array:
        """A client's weight from its metrics, a scalar that is at least 0; also averages statistics and auxiliary variables."""
        return jnp.ones_like(metrics["examples"])

    def prepare(self, upload: Upload, sent: Any) -> Any:
        """One client's summand, a pytree."""
        raise NotImplementedError(f"{type(self).__name__} defines no prepare(upload, sent).")

    def finalize(self, total: Any, state: Any, info: CohortInfo) -> tuple[Params, Any]:
        """The pseudo-gradient and the new state from the sum of the summands."""
        raise NotImplementedError(f"{type(self).__name__} defines no finalize(total, state, info).")

    def combine(self, uploads: Upload, weights: jax.Array, state: Any, info: CohortInfo) -> tuple[Upload, Any]:
        """What a rule that ``stacks`` defines: one upload and the new state from those of the whole cohort.

        The default is for rules that are sums: it prepares every update, adds up and finalizes.

        Args:
            uploads: Leaves ``[C, ...]`` in float32 or wider; zeros for a client that is left out.
            weights: ``[C]``, 0 for a client that is left out: it may have no influence.
            state: From :meth:`init` or the round before.
            info: What is known of the round.
        """
        sent = self.send(state)
        summands = jax.vmap(lambda upload: trees.widen(self.prepare(upload, sent)))(uploads)
        total = jax.tree.map(lambda x: x.sum(0, dtype=x.dtype), trees.where_rows(weights > 0, summands))
        gradient, state = self.finalize(total, state, info)
        return trees.weighted_mean(uploads, weights)._replace(delta=gradient), state

    def aggregate(self, updates: Params, weights: jax.Array) -> Params:
        """The rule on stacked updates, without an engine.

        Args:
            updates: Like ``params`` with a leading ``[C]``.
            weights: ``[C]`` what each client would weigh: its examples and its steps; 0 leaves it out, as does an update that is
                not finite.

        Returns:
            The aggregate, like ``params``.

        Raises:
            ValueError: If there is no leaf, or a leaf and the weights differ in their leading axis.
        """
        leaves, weights = jax.tree.leaves(updates), jnp.asarray(weights)
        if not leaves:
            raise ValueError(f"aggregate: expected updates with at least one array, got {checks.describe(updates)}.")
        if weights.ndim != 1 or any(jnp.shape(leaf)[:1] != weights.shape for leaf in leaves):
            got = [jnp.shape(leaf) for leaf in leaves]
            raise ValueError(f"aggregate: expected weights [C] and leaves [C, ...], got weights {weights.shape}, leaves {got}.")
        weights = trees.widen(jnp.asarray(weights, float))
        metrics = {"examples": weights, "steps": weights} | {name: jnp.ones_like(weights) for name in ("loss", *self.reads)}
        counts = (weights > 0) & jax.vmap(trees.all_finite)(updates)
        weighed = jnp.where(counts, jax.vmap(self.weigh)(metrics), 0)
        uploads = trees.where_rows(weighed > 0, Upload(trees.widen(updates), (), {}, metrics))
        one = jax.tree.map(lambda x: x[0], updates)
        info = CohortInfo(0, len(weights), weighed.sum(), (weighed > 0).sum(), weighed.sum(), jax.random.key(0))
        return trees.cast_like(self.combine(uploads, weighed, self.init(one), info)[0].delta, one)


class Selector(Part, kind="selector"):
    """Which clients take part in a round. ``init(population)``, ``select``, ``observe``, ``report``."""

    reads: ClassVar[tuple[str, ...]] = ()
    """Metrics that it needs beside those that always travel; the client must measure them."""

    @property
    def versions(self) -> int:
        """``T``: clients begin from the broadcasts of so many rounds, this one's and those before it. 1: all begin now."""
        return 1

    def init(self, population: int) -> Any:
        """The state before the first round."""
        del population
        return ()

    def cohort_size(self, population: int) -> int:
        """``C``, the same in every round; raises ValueError if the population is too small."""
        raise NotImplementedError(f"{type(self).__name__} defines no cohort_size(population).")

    def select(self, state: Any, key: jax.Array, round: jax.Array, population: int) -> Cohort:
        """The cohort of a round."""
        raise NotImplementedError(f"{type(self).__name__} defines no select(state, key, round, population).")

    def observe(self, state: Any, cohort: Cohort, metrics: dict[str, jax.Array]) -> Any:
        """The state after the round, from the cohort's metrics ``[C]``."""
        del cohort, metrics
        return state

    def report(self, state: Any) -> dict[str, jax.Array]:
        """Scalars by name that a round's report shows of the state after it."""
        del state
        return {}


class ClientUpdate(Part, kind="client"):
    """What a client does with a broadcast, written for one client: ``(broadcast, kept, rows, key) -> (Upload, kept)``."""

    @property
    def optimizers(self) -> tuple[Any, ...]:
        """All Optimizers of the client, whose auxiliary variables must find their other half at the server."""
        return ()

    @property
    def aux_reductions(self) -> dict[str, Any]:
        """How each auxiliary variable of the upload is reduced over clients."""
        return {name: how for optimizer in self.optimizers for name, how in optimizer.aux_reductions.items()}

    @property
    def measured(self) -> tuple[str, ...]:
        """The metrics that it sends beside those that always travel."""
        return ()

    @property
    def needs_survey(self) -> bool:
        """Whether its rounds need what a first pass over the cohort found."""
        return False

    @property
    def of_global(self) -> "ClientUpdate":
        """What trains the global model: itself, or the client inside of one that only adds personal models."""
        return self

    def num_steps(self, sizes: ArrayLike, work: ArrayLike, capacity: int) -> jax.Array:
        """Local steps of clients with ``sizes`` rows that do ``work`` of their work; ``capacity`` is the largest size."""
        raise NotImplementedError(f"{type(self).__name__} defines no num_steps(sizes, work, capacity).")

    def shared(self, params: Params) -> Params:
        """What the server trains, with None in place of the leaves that never leave a client."""
        return params

    def init_kept(self, start: Broadcast, key: jax.Array) -> Any:
        """What a client keeps before it first takes part, from what is sent in that round; its shapes are the same in all."""
        del start, key
        return ()

    def run(self, start: Broadcast, kept: Any, rows: Any, key: jax.Array) -> tuple[Upload, Any]:
        """A client's round over its rows, a :class:`~jaxfed.client.batches.ClientRows`."""
        raise NotImplementedError(f"{type(self).__name__} defines no run(start, kept, rows, key).")

    @property
    def personalizes(self) -> bool:
        """Whether a client predicts with more than the global model."""
        return type(self).personalize is not ClientUpdate.personalize

    def personalize(self, start: Broadcast, kept: Any, rows: Any, key: jax.Array) -> Any:
        """What this client predicts with, from the global model, what it kept and its training rows; default: global."""
        del kept, rows, key
        return start.params, start.stats

    def metrics(self, personal: Any, batch: Batch) -> dict[str, jax.Array]:
        """Values ``[B]`` by name of what :meth:`personalize` gave, on a batch of this client."""
        raise NotImplementedError(f"{type(self).__name__} defines no metrics(personal, batch).")


class Model(Part, register=False):
    """A model as pure functions.

    Attributes:
        init: ``key -> (params, stats)``.
        loss: ``(params, stats, batch, key) -> (values [B], stats)``; a ``key`` of None is evaluation.
        predict: ``(params, stats, batch) -> outputs [B, ...]``.
        metrics: ``(params, stats, batch) -> {name: values [B]}``, what evaluation averages; at least ``"loss"``.
        measure: ``(outputs, batch) -> {name: values [B]}``, the same of outputs that come from elsewhere, such as a mixture's;
            None if they are not known apart from the model.
    """

    init: Callable = part.function()
    loss: Callable = part.function()
    predict: Callable = part.function()
    metrics: Callable = part.function()
    measure: Callable | None = part.function(default=None, optional=True)
