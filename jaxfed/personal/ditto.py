"""Ditto: a personal model beside the global one, pulled towards it."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxfed import part
from jaxfed.base import ClientUpdate
from jaxfed.client.batches import PERSONAL, BatchPolicy, ClientRows
from jaxfed.client.local import LocalTraining
from jaxfed.messages import Broadcast, Params, Stats, Upload
from jaxfed.optimizer.optimizer import Optimizer
from jaxfed.optimizer.regularizers import FedProx
from jaxfed.personal.partial import LocalLeaves
from jaxfed.personal.wrapper import (
    Wrapper,
    idle_if,
    optional_optimizer,
    refuse_pairs,
    refuse_unless,
    training_of,
)


class DittoKept(NamedTuple):
    """What the client keeps; the personal weights and statistics, what their Optimizer keeps, and whether they have trained."""

    client: Any
    params: Params
    stats: Stats
    optimizer: Any
    trained: jax.Array


class Ditto(Wrapper):
    r"""A personal model :math:`v_i` for each client, pulled towards the global weights :math:`w_t`; only the global one travels.

    .. math:: v_i \leftarrow v_i - \eta (\nabla f_i(v_i) + \lambda (v_i - w_t))

    The global model trains as ``client`` says, from :math:`w_t` as if there were no other, and alone has what corrects steps
    towards the common optimum (SCAFFOLD's, Mime's). Both use the weights that the round began with, so their order does not
    matter. :math:`v_i` begins as the global weights of the client's first round, lasts from round to round, and is what the
    client predicts with. For evaluation, a client that has never taken part trains it for one round's work. In a round in which
    :math:`v_i` ceases to be finite the client does not count, its global model included: it is reported as excluded, and keeps
    the :math:`v_i` it had.

    Args:
        client: What trains the global model: LocalTraining, or LocalLeaves, whose client's own leaves then anchor those of v.
        optimizer: The personal model's Optimizer or learning rate; None takes the client's.
        strength: :math:`\lambda`, at least 0: with 0 a client trains alone, with a large one it follows the global model.
        batches: The personal model's batches; None takes the client's.

    Raises:
        TypeError: If ``client`` is something else.
        ValueError: If the personal Optimizer exchanges auxiliary variables with the server.

    Example:
        >>> import jaxfed
        >>> training = LocalTraining(lambda v, batch, key: (v - batch["x"]) ** 2 / 2, 0.1, jaxfed.Steps(None, steps=100))
        >>> ditto, rows = Ditto(training, strength=1.0), jaxfed.ClientRows.of({"x": jnp.array([4.0])})
        >>> start, key = Broadcast(jnp.array(0.0), {}, {}, 0), jax.random.key(0)
        >>> _, kept = ditto.run(start, ditto.init_kept(start, key), rows, key)
        >>> print(jnp.round(kept.params, 3))
        2.0

    References:
        Li et al., `Ditto: Fair and Robust Federated Learning Through Personalization <https://arxiv.org/abs/2012.04221>`_, 2021
    """

    name: ClassVar[str] = "ditto"
    optimizer: Optimizer | None = optional_optimizer()
    strength: float = part.number(default=0.1, at_least=0)
    batches: BatchPolicy | None = part.part("batches", default=None, optional=True)

    def check(self) -> None:
        """Refuses clients without one set of weights, and personal Optimizers that talk to the server."""
        refuse_unless("Ditto.client", self.client, (LocalTraining, LocalLeaves), "The personal model is pulled to its weights.")
        optimizer = training_of(self.client).optimizer if self.optimizer is None else self.optimizer
        reason = "The server's other half belongs to the global model. Give the personal one an optimizer= of its own."
        refuse_pairs("Ditto.optimizer", optimizer, reason)

    @property
    def of_global(self) -> ClientUpdate:
        """That of the wrapped client."""
        return self.client.of_global

    @property
    def training(self) -> LocalTraining:
        """The personal model's local training, pull included."""
        client = training_of(self.client)
        optimizer = client.optimizer if self.optimizer is None else self.optimizer
        pulled = optimizer.replace(regularizers=(*optimizer.regularizers, FedProx(self.strength)))
        batches = client.batches if self.batches is None else self.batches
        return client.replace(optimizer=pulled, gradient=client.gradient.uncorrected, batches=batches, measures=())

    def init_kept(self, start: Broadcast, key: jax.Array) -> DittoKept:
        """A personal model that equals the global one."""
        optimizer = self.training.init_kept(start, jax.random.fold_in(key, PERSONAL))
        return DittoKept(self.client.init_kept(start, key), start.params, start.stats, optimizer, jnp.array(False))

    def run(self, start: Broadcast, kept: DittoKept, rows: ClientRows, key: jax.Array) -> tuple[Upload, DittoKept]:
        """The wrapped client's round, and the personal model's."""
        upload, client = self.client.run(start, kept.client, rows, key)
        personal = self._train(start, kept, rows, key)
        return upload, DittoKept(client, *personal, kept.trained | (upload.metrics["steps"] > 0))

    def personalize(self, start: Broadcast, kept: DittoKept, rows: ClientRows, key: jax.Array) -> tuple[Params, Stats]:
        """The personal model; a client that has never trained trains it now."""
        params, stats, _ = self._train(start, kept, idle_if(kept.trained, rows), key)
        return params, stats

    def _train(self, start: Broadcast, kept: DittoKept, rows: ClientRows, key: jax.Array) -> tuple[Params, Stats, Any]:
        anchor = self.client.own(start, kept.client) if isinstance(self.client, LocalLeaves) else start
        anchor, key = anchor._replace(stats=kept.stats), jax.random.fold_in(key, PERSONAL)
        params, upload, optimizer = self.training.train(anchor, kept.params, kept.optimizer, rows, key)
        return params, upload.stats, optimizer
