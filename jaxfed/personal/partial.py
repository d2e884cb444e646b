"""Leaves of the model that never leave their client: FedBN, FedPer, FedRep."""

import fnmatch
import re
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxfed import checks, part, trees
from jaxfed.client.batches import ClientRows
from jaxfed.client.local import LocalTraining
from jaxfed.messages import Batch, Broadcast, Params, Stats, Upload
from jaxfed.personal.wrapper import Wrapper, idle_if, refuse_pairs, refuse_unless

_NORM = re.compile(r"norm|(^|[/_])bn\d*([/_]|$)", re.IGNORECASE)


def norm_layers(name: str) -> bool:
    """Whether a leaf belongs to a normalisation layer, by its name: ``BatchNorm_0/scale``, ``bn1/bias``, ``layer_norm/scale``.

    >>> norm_layers("BatchNorm_0/scale"), norm_layers("bn1/bias"), norm_layers("subnet/bias")
    (True, True, False)
    """
    return _NORM.search(name) is not None


def _as_leaves(where: str, value: Any) -> Any:
    if callable(value):
        return value
    patterns = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else ()
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        expected = 'patterns over the names of leaves such as ["head/*"], or a function of a name'
        raise TypeError(f"{where}: expected {expected}, got {checks.describe(value)}.")
    return patterns


class LocalKept(NamedTuple):
    """A client's own leaves (None in place of shared ones) and statistics, what its Optimizers keep, whether it has trained."""

    params: Params
    stats: Stats
    client: Any
    head: Any
    trained: jax.Array


class LocalLeaves(Wrapper):
    r"""Some leaves of the model belong to the client: trained there, kept there, never sent.

    With weights :math:`w = (s, l_i)` of shared and local leaves, a client trains both from :math:`(s_t, l_i)`, uploads the change
    of :math:`s` and keeps :math:`l_i`. A new client's :math:`l_i` are those of the initial global weights. With a ``head``, the
    local leaves are trained first while the shared ones are held, then ``client`` trains the shared ones alone.

    For evaluation, a client that has never taken part trains its local leaves for one round's work, the shared ones held.

    Args:
        client: The LocalTraining of all leaves together; of the shared ones if there is a ``head``.
        leaves: Which are local: patterns over names (``"head/*"``; ``*`` crosses slashes), or a function of a name.
        statistics: Whether the model's statistics are local, too.
        head: Another LocalTraining, of the local leaves alone (FedRep).

    Raises:
        TypeError: If ``client`` or ``head`` is not a LocalTraining.
        ValueError: If an Optimizer exchanges auxiliary variables; when a run begins, if a pattern matches no leaf or no leaf is
            shared.

    Example:
        >>> import jaxfed
        >>> training = LocalTraining(lambda params, batch, key: batch["x"], 0.1, jaxfed.Epochs(10))
        >>> LocalLeaves(training, leaves="head/*").shared({"body": {"w": 1}, "head": {"w": 2}})
        {'body': {'w': 1}, 'head': {'w': None}}

    References:
        Li et al., `FedBN <https://arxiv.org/abs/2102.07623>`_, 2021;
        Arivazhagan et al., `Federated Learning with Personalization Layers <https://arxiv.org/abs/1912.00818>`_, 2019;
        Collins et al., `Exploiting Shared Representations <https://arxiv.org/abs/2102.07078>`_, 2021 (FedRep)
    """

    name: ClassVar[str] = "local-leaves"
    client: LocalTraining = part.part("client")
    leaves: Any = part.field(_as_leaves, is_static=True)
    statistics: bool = part.static(default=False, choices=(False, True))
    head: LocalTraining | None = part.part("client", default=None, optional=True)

    def check(self) -> None:
        """Refuses what cannot be trained in parts, and modules in two halves."""
        for name, training in (("client", self.client), ("head", self.head)):
            if training is not None:
                where = f"LocalLeaves.{name}"
                refuse_unless(where, training, (LocalTraining,), "Wrap LocalLeaves in Ditto or Finetuned, not the other way.")
                reason = "It holds every leaf of the model, and local leaves never leave the client. Drop the module."
                refuse_pairs(where, training.optimizer, reason)

    def shared(self, params: Params) -> Params:
        """The shared leaves, and None in place of the local ones."""
        local = self._names(params)
        return trees.keep_leaves(params, lambda name: name not in local)

    def init_kept(self, start: Broadcast, key: jax.Array) -> LocalKept:
        """The local leaves of the global weights, and with ``statistics`` the global ones."""
        client_key, head_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
        local, stats = self._local(start.params), start.stats if self.statistics else ()
        if self.head is None:
            kept = (self.client.init_kept(start, client_key), ())
        else:
            shared = start._replace(params=self.shared(start.params))
            kept = (self.client.init_kept(shared, client_key), self.head.init_kept(start._replace(params=local), head_key))
        return LocalKept(local, stats, *kept, jnp.array(False))

    def own(self, start: Broadcast, kept: LocalKept) -> Broadcast:
        """The broadcast as this client sees it, with its own leaves and statistics in place."""
        stats = kept.stats if self.statistics else start.stats
        return start._replace(params=trees.merge(kept.params, start.params), stats=stats)

    def run(self, start: Broadcast, kept: LocalKept, rows: ClientRows, key: jax.Array) -> tuple[Upload, LocalKept]:
        """Trains, uploads the shared leaves and keeps the local ones."""
        train = self._train_together if self.head is None else self._train_in_turn
        end, upload, client, head = train(self.own(start, kept), kept, rows, key)
        trained = kept.trained | (upload.metrics["steps"] > 0)
        kept = LocalKept(self._local(end), upload.stats if self.statistics else (), client, head, trained)
        delta = trees.keep_leaves(upload.delta, trees.names(self.shared(end)).__contains__)
        # Where statistics are local, what came goes back: the server's stay as they were.
        stats = start.stats if self.statistics else upload.stats
        return upload._replace(delta=delta, stats=stats), kept

    def personalize(self, start: Broadcast, kept: LocalKept, rows: ClientRows, key: jax.Array) -> tuple[Params, Stats]:
        """The shared leaves with the client's own; a client that has never trained trains its own now."""
        first_key, train_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
        own = self.own(start, kept)
        first = self._head.init_kept(own._replace(params=self._local(own.params)), first_key)
        params, stats, _ = self._train_local(own, first, idle_if(kept.trained, rows), train_key)
        return params, stats if self.statistics else start.stats

    @property
    def _head(self) -> LocalTraining:
        return self.client if self.head is None else self.head

    def _train_together(self, own: Broadcast, kept: LocalKept, rows: ClientRows, key: jax.Array) -> tuple:
        end, upload, client = self.client.train(own, own.params, kept.client, rows, key)
        return end, upload, client, ()

    def _train_in_turn(self, own: Broadcast, kept: LocalKept, rows: ClientRows, key: jax.Array) -> tuple:
        head_key, body_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
        params, stats, head = self._train_local(own, kept.head, rows, head_key)
        shared = self.shared(params)
        body = holding(self.client, params)
        end, upload, client = body.train(own._replace(params=shared, stats=stats), shared, kept.client, rows, body_key)
        return trees.merge(end, params), upload, client, head

    def _train_local(self, own: Broadcast, kept: Any, rows: ClientRows, key: jax.Array) -> tuple[Params, Stats, Any]:
        local = self._local(own.params)
        training = holding(self._head, own.params)
        end, upload, kept = training.train(own._replace(params=local), local, kept, rows, key)
        return trees.merge(end, own.params), upload.stats, kept

    def _local(self, params: Params) -> Params:
        return trees.keep_leaves(params, self._names(params).__contains__)

    def _names(self, params: Params) -> frozenset[str]:
        """The names of the local leaves; refuses a choice that cannot be meant."""
        names = trees.names(params)
        local = _matches(self.leaves, names)
        if len(local) == len(names):
            remedy = "Leave some to be shared; training that shares nothing needs no federation."
            raise ValueError(f"LocalLeaves: all leaves are local: {checks.listing(names)}. {remedy}")
        return local


def _matches(leaves: Any, names: list[str]) -> frozenset[str]:
    if callable(leaves):
        local = frozenset(name for name in names if leaves(name))
        if not local:
            none = "the model has no normalisation layer" if leaves is norm_layers else "the function chooses none"
            raise ValueError(f"LocalLeaves: {none}, by the names of its leaves: {checks.listing(names)}. Name the local ones.")
        return local
    found = {pattern: [name for name in names if fnmatch.fnmatchcase(name, pattern)] for pattern in leaves}
    for pattern, matched in found.items():
        if not matched:
            raise ValueError(f"LocalLeaves: the pattern {pattern!r} matches no leaf. Leaves: {checks.listing(names)}.")
    return frozenset(name for matched in found.values() for name in matched)


def holding(training: LocalTraining, whole: Params) -> LocalTraining:
    """Local training of some leaves (None in place of the others), which are constants taken from ``whole``."""
    model = training.loss
    held = {name: jax.tree_util.Partial(_with_held, getattr(model, name), whole) for name in ("loss", "predict", "metrics")}
    return training.replace(loss=model.replace(**held))


def _with_held(function: Callable, whole: Params, params: Params, stats: Stats, batch: Batch, *key: Any) -> Any:
    return function(trees.merge(params, whole), stats, batch, *key)
