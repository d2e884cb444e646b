"""Fine-tuning: a client trains the model on its own rows before it predicts."""

from typing import Any, ClassVar

import jax

from jaxfed import part
from jaxfed.base import ClientUpdate
from jaxfed.client.batches import BatchPolicy, ClientRows
from jaxfed.client.local import LocalTraining
from jaxfed.messages import Broadcast, Params, Stats
from jaxfed.optimizer.optimizer import Optimizer
from jaxfed.personal.apfl import APFL
from jaxfed.personal.ditto import Ditto
from jaxfed.personal.partial import LocalLeaves
from jaxfed.personal.wrapper import Wrapper, optional_optimizer, refuse_pairs, refuse_unless, training_of


class Finetuned(Wrapper):
    """Rounds are the wrapped client's; for evaluation a client trains on from what it would predict with, on its own rows.

    Nothing is kept: fine-tuning begins anew from the present global weights whenever it is asked for, with an Optimizer state of
    its own. Its draws are those of the evaluation's key. Regularizers pull towards the weights with which it begins.

    Args:
        client: LocalTraining, LocalLeaves, Ditto or APFL.
        optimizer: The Optimizer or learning rate of fine-tuning; None takes the client's.
        batches: Its batches; None takes the client's.

    Raises:
        TypeError: If ``client`` is something else.
        ValueError: If the Optimizer exchanges auxiliary variables with the server.

    Example:
        >>> import jax.numpy as jnp, jaxfed
        >>> training = LocalTraining(lambda v, batch, key: (v - batch["x"]) ** 2 / 2, 0.5, jaxfed.Steps(None, steps=1))
        >>> start, rows = Broadcast(jnp.array(0.0), {}, {}, 0), jaxfed.ClientRows.of({"x": jnp.array([4.0])})
        >>> tuned = Finetuned(training, batches=jaxfed.Steps(None, steps=2))
        >>> print(tuned.personalize(start, tuned.init_kept(start, jax.random.key(0)), rows, jax.random.key(1))[0])
        3.0

    References:
        Yu et al., `Salvaging Federated Learning by Local Adaptation <https://arxiv.org/abs/2002.04758>`_, 2020
    """

    name: ClassVar[str] = "finetuned"
    optimizer: Optimizer | None = optional_optimizer()
    batches: BatchPolicy | None = part.part("batches", default=None, optional=True)

    def check(self) -> None:
        """Refuses clients that do not predict with one set of weights, and corrections towards the global optimum."""
        allowed = (LocalTraining, LocalLeaves, Ditto, APFL)
        refuse_unless("Finetuned.client", self.client, allowed, "Fine-tuning needs one set of weights and its local training.")
        reason = (
            "It corrects steps towards the common optimum, away from the client's own. Give Finetuned an optimizer= of its own."
        )
        refuse_pairs("Finetuned.optimizer", self.training.optimizer, reason)

    @property
    def of_global(self) -> ClientUpdate:
        """That of the wrapped client."""
        return self.client.of_global

    @property
    def training(self) -> LocalTraining:
        """The local training of fine-tuning."""
        client = training_of(self.client)
        optimizer = client.optimizer if self.optimizer is None else self.optimizer
        batches = client.batches if self.batches is None else self.batches
        return client.replace(optimizer=optimizer, gradient=client.gradient.uncorrected, batches=batches, measures=())

    def personalize(self, start: Broadcast, kept: Any, rows: ClientRows, key: jax.Array) -> tuple[Params, Stats]:
        """What the wrapped client predicts with, trained on its rows."""
        begin_key, first_key, train_key = (jax.random.fold_in(key, stream) for stream in range(3))
        params, stats = self.client.personalize(start, kept, rows, begin_key)
        training = self.training
        anchor = start._replace(params=params, stats=stats)
        end, upload, _ = training.train(anchor, params, training.init_kept(anchor, first_key), rows, train_key)
        return end, upload.stats
