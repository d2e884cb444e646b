"""APFL: a mixture of the weights of a personal and the global model."""

from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxfed import part, trees
from jaxfed.client.batches import OPTIMIZER, PERSONAL, ClientRows
from jaxfed.client.gradients import Rule
from jaxfed.client.local import LocalTraining, anchor_of, metrics_of
from jaxfed.messages import Broadcast, Params, RoundStart, Stats, Upload
from jaxfed.optimizer.optimizer import Optimizer
from jaxfed.personal.wrapper import (
    Wrapper,
    idle_if,
    optional_optimizer,
    refuse_pairs,
    refuse_unless,
)


class APFLKept(NamedTuple):
    """What both Optimizers keep, the personal weights, the mixture's statistics and weight, and whether they have trained."""

    client: Any
    optimizer: Any
    params: Params
    stats: Stats
    alpha: jax.Array
    trained: jax.Array


class Trained(NamedTuple):
    """One of the two models while it trains: weights, statistics, its Optimizer's state."""

    params: Params
    stats: Stats
    state: Any


class APFL(Wrapper):
    r"""A client predicts with :math:`\bar v_i = \alpha_i v_i + (1 - \alpha_i) w`, its own weights and the global ones mixed.

    In each local step, from one batch, with the weights as they were before it,

    .. math::
        w_i \leftarrow w_i - \eta \nabla f_i(w_i), \qquad
        v_i \leftarrow v_i - \eta \nabla_{v_i} f_i(\bar v_i) = v_i - \eta \alpha_i \nabla f_i(\bar v_i)

    with :math:`w_i` from the broadcast weights in each round, and :math:`v_i` kept from the last (at first, the global weights).
    An adaptive :math:`\alpha_i` takes one step a round, at the first batch, and stays between 0 and 1:

    .. math:: \alpha_i \leftarrow \alpha_i - \eta_\alpha \langle v_i - w_i, \nabla f_i(\bar v_i) \rangle

    Only :math:`w_i` travels. For evaluation the mixture is with the present global weights, and a client that has never taken
    part trains :math:`v_i` for one round's work.

    Args:
        client: The LocalTraining of the global model.
        alpha: :math:`\alpha_i` of a new client, from 0 (the global model) to 1 (local training alone).
        alpha_lrate: :math:`\eta_\alpha`; with 0, :math:`\alpha_i` stays.
        optimizer: The Optimizer or learning rate of the personal weights; None takes the client's.

    Raises:
        TypeError: If ``client`` is not a LocalTraining.
        ValueError: If an Optimizer exchanges auxiliary variables with the server.

    Example:
        >>> import jaxfed
        >>> training = LocalTraining(lambda v, batch, key: (v - batch["x"]) ** 2 / 2, 0.1, jaxfed.Steps(None, steps=2))
        >>> apfl, rows = APFL(training, alpha=0.5), jaxfed.ClientRows.of({"x": jnp.array([4.0])})
        >>> start, key = Broadcast(jnp.array(0.0), {}, {}, 0), jax.random.key(0)
        >>> _, kept = apfl.run(start, apfl.init_kept(start, key), rows, key)
        >>> print(f"{kept.params:.3f}")  # 0.05 * 4, and 0.05 * (4 - (0.2 + 0.4) / 2) more
        0.385

    References:
        Deng et al., `Adaptive Personalized Federated Learning <https://arxiv.org/abs/2003.13461>`_, 2020
    """

    name: ClassVar[str] = "apfl"
    client: LocalTraining = part.part("client")
    alpha: float = part.number(default=0.5, at_least=0, at_most=1)
    alpha_lrate: float = part.number(default=0.0, at_least=0)
    optimizer: Optimizer | None = optional_optimizer()

    def check(self) -> None:
        """Refuses clients without one set of weights, and modules in two halves."""
        refuse_unless("APFL.client", self.client, (LocalTraining,), "APFL mixes all weights of two models.")
        reason = "APFL's two models train side by side, and the server's other half knows of one. Drop the module."
        for where, optimizer in (("APFL.client", self.client.optimizer), ("APFL.optimizer", self.optimizer)):
            if optimizer is not None:
                refuse_pairs(where, optimizer, reason)

    def init_kept(self, start: Broadcast, key: jax.Array) -> APFLKept:
        """Personal weights that equal the global ones."""
        optimizer = self._personal.init_kept(start.params, jax.random.fold_in(key, PERSONAL))
        alpha, trained = jnp.asarray(self.alpha, float), jnp.array(False)
        return APFLKept(self.client.init_kept(start, key), optimizer, start.params, start.stats, alpha, trained)

    def run(self, start: Broadcast, kept: APFLKept, rows: ClientRows, key: jax.Array) -> tuple[Upload, APFLKept]:
        """Trains both models, uploads the global one's change."""
        training, optimizer_key = self.client, jax.random.fold_in(key, OPTIMIZER)
        batches = training.batches.of(rows, key)
        anchor = anchor_of(start, training.gradient, training.loss, batches, optimizer_key)
        own = anchor._replace(params=kept.params, stats=kept.stats, key=jax.random.fold_in(optimizer_key, PERSONAL))
        step = partial(self._step, *(training.gradient.start_round(one) for one in (anchor, own)))
        begin = (_begin(training.optimizer, kept.client, anchor), _begin(self._personal, kept.optimizer, own))
        local, personal, alpha, _, total = batches.fold(step, (*begin, kept.alpha, jnp.array(True), jnp.zeros(())))
        client, aux = self.client.optimizer.end_round(local.state, start.params, local.params)
        optimizer, _ = self._personal.end_round(personal.state, kept.params, personal.params)
        delta = trees.subtract(trees.widen(start.params), trees.widen(local.params))
        trained = kept.trained | (batches.steps > 0)
        kept = APFLKept(client, optimizer, personal.params, personal.stats, alpha, trained)
        measured = {m.name: m(self.client.loss, start, batches, delta) for m in self.client.measures}
        return Upload(delta, local.stats, aux, metrics_of(batches, total) | measured), kept

    def personalize(self, start: Broadcast, kept: APFLKept, rows: ClientRows, key: jax.Array) -> tuple[Params, Stats]:
        """The mixture with the present global weights; a client that has never trained trains its own now."""
        _, kept = self.run(start, kept, idle_if(kept.trained, rows), key)
        return trees.average(kept.alpha, kept.params, start.params), kept.stats

    @property
    def _personal(self) -> Optimizer:
        return self.client.optimizer if self.optimizer is None else self.optimizer

    def _step(self, rule: Rule, own_rule: Rule, carry: tuple, batch: dict, key: jax.Array) -> tuple:
        """One step of both from the weights as they are; ``first`` is True in the round's first."""
        local, personal, alpha, first, total = carry
        training = self.client
        mixed = trees.average(alpha, personal.params, local.params)
        loss, stats, gradient = rule(training.loss, local.params, local.stats, batch, key)
        _, mixed_stats, slope = own_rule(training.loss, mixed, personal.stats, batch, jax.random.fold_in(key, PERSONAL))
        direction = _dot(trees.subtract(personal.params, local.params), slope).astype(alpha.dtype)
        adapted = jnp.clip(alpha - trees.cast(self.alpha_lrate, alpha) * direction, 0, 1)
        local = _apply(training.optimizer, local, gradient, stats)
        personal = _apply(self._personal, personal, trees.scale(alpha, slope), mixed_stats)
        return local, personal, jnp.where(first, adapted, alpha), jnp.array(False), total + loss.astype(total.dtype)


def _begin(optimizer: Optimizer, kept: Any, anchor: RoundStart) -> Trained:
    return Trained(anchor.params, anchor.stats, optimizer.start_round(kept, anchor))


def _apply(optimizer: Optimizer, model: Trained, gradient: Params, stats: Stats) -> Trained:
    updates, state = optimizer.update(gradient, model.state, model.params)
    return Trained(optax.apply_updates(model.params, updates), stats, state)


def _dot(left: Params, right: Params) -> jax.Array:
    products = jax.tree.map(lambda x, y: (x * y).sum(), trees.widen(left), trees.widen(right))
    return jnp.stack(jax.tree.leaves(products)).sum()
