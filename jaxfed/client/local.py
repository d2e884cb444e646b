"""Local training: from what the server sent to what the client sends back."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxfed import part, trees
from jaxfed.base import ClientUpdate, Model
from jaxfed.client.batches import OPTIMIZER, Batches, BatchPolicy, ClientRows
from jaxfed.client.gradients import GradientRule, MeanGradient, as_model
from jaxfed.client.measures import Measure
from jaxfed.messages import Broadcast, Params, RoundStart, Stats, Upload
from jaxfed.optimizer.optimizer import Optimizer, as_optimizer


class LocalTraining(ClientUpdate):
    """Local steps of an Optimizer over a client's batches, from the broadcast weights.

    The model's statistics (those of a batch norm) train along and travel: the engine averages them with the aggregator's weights,
    and they never pass the server's Optimizer; statistics of integer type stay the server's.

    Args:
        loss: A Model, or a loss ``(params, batch, key) -> values [B]`` or ``(values, {name: [B]})``.
        optimizer: The client's Optimizer, or a learning rate for plain SGD.
        batches: The policy: ``Epochs``, ``Steps`` or ``Poisson``.
        gradient: From a batch to a gradient.
        measures: Metrics that travel beside ``examples``, ``steps`` and ``loss``: ``"start_loss"``, ``"loss_rms"``,
            ``"update_norm"``, ``"update_divergence"``, ``"domain"``.
    """

    name = "local-training"
    loss: Model = part.field(as_model)
    optimizer: Optimizer = part.field(as_optimizer)
    batches: BatchPolicy = part.part("batches")
    gradient: GradientRule = part.part("gradient", default=MeanGradient())
    measures: tuple[Measure, ...] = part.parts("measure", default=())

    @property
    def model(self) -> Model:
        """The model that is trained."""
        return self.loss

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """All Optimizers of the client, whose auxiliary variables must find their other half."""
        return (self.optimizer,)

    @property
    def measured(self) -> tuple[str, ...]:
        """The names of its measures."""
        return tuple(measure.name for measure in self.measures)

    @property
    def needs_survey(self) -> bool:
        """Whether its gradient does."""
        return self.gradient.needs_survey

    def num_steps(self, sizes: ArrayLike, work: ArrayLike, capacity: int) -> jax.Array:
        """Local steps of clients with ``sizes`` rows."""
        return self.batches.num_steps(sizes, work, capacity)

    def init_kept(self, start: Broadcast, key: jax.Array) -> Any:
        """What the client's Optimizer keeps."""
        return self.optimizer.init_kept(start.params, key)

    def run(self, start: Broadcast, kept: Any, rows: ClientRows, key: jax.Array) -> tuple[Upload, Any]:
        """Trains from the broadcast weights and returns the upload and what is kept."""
        params, upload, kept = self.train(start, start.params, kept, rows, key)
        del params
        return upload, kept

    def train(self, start: Broadcast, begin: Params, kept: Any, rows: ClientRows, key: jax.Array) -> tuple[Params, Upload, Any]:
        """Trains from the weights ``begin``, anchored at the broadcast ones: ``(end, upload, kept)``.

        What wraps local training (a personal model, local leaves) calls this; ``upload.delta`` is ``begin - end``.
        """
        batches = self.batches.of(rows, key)
        anchor = anchor_of(start, self.gradient, self.loss, batches, jax.random.fold_in(key, OPTIMIZER))
        rule = self.gradient.start_round(anchor)
        carry = (begin, start.stats, self.optimizer.start_round(kept, anchor), jnp.zeros(()))

        def step(carry: tuple, batch: dict, key: jax.Array) -> tuple:
            params, stats, state, total = carry
            loss, stats, gradient = rule(self.loss, params, stats, batch, key)
            updates, state = self.optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), stats, state, total + loss.astype(total.dtype)

        params, stats, state, total = batches.fold(step, carry)
        kept, aux = self.optimizer.end_round(state, begin, params)
        delta = trees.subtract(trees.widen(begin), trees.widen(params))
        metrics = metrics_of(batches, total) | {m.name: m(self.loss, start, batches, delta) for m in self.measures}
        return params, Upload(delta, stats, aux, metrics), kept

    def full_gradient(self, params: Params, stats: Stats, batches: Batches) -> Params:
        """The gradient of the mean loss over all the client's rows."""
        return mean_over_rows(self.gradient, self.loss, params, stats, batches)

    def metrics(self, personal: Any, batch: dict) -> dict[str, jax.Array]:
        """The model's metrics with these ``(params, stats)``."""
        return self.loss.metrics(*personal, batch)


def anchor_of(start: Broadcast, gradient: GradientRule, model: Model, batches: Batches, key: jax.Array) -> RoundStart:
    """What Optimizers and gradient rules know of a client's round when it begins."""

    def full_gradient(params: Params) -> Params:
        return mean_over_rows(gradient, model, params, start.stats, batches)

    return RoundStart(start.params, start.stats, start.aux, start.round, key, full_gradient, start.survey)


def metrics_of(batches: Batches, total_loss: jax.Array) -> dict[str, jax.Array]:
    """The scalars that travel with every upload."""
    return {
        "examples": jnp.asarray(batches.rows.size, float),
        "steps": batches.steps.astype(float),
        "loss": total_loss / jnp.maximum(batches.steps, 1),
    }


def mean_over_rows(gradient: GradientRule, model: Model, params: Params, stats: Stats, batches: Batches) -> Params:
    """The gradient of the mean loss over all the client's rows, batch by batch in the order of the data."""

    def step(carry: tuple[Params, jax.Array], batch: dict) -> tuple[Params, jax.Array]:
        total, number = carry
        _, _, one = gradient(model, params, stats, batch, jax.random.fold_in(batches.pass_key, number))
        return trees.add_scaled(total, batch["mask"].sum(), trees.widen(one)), number + 1

    total, _ = batches.fold_all(step, (trees.zeros_like(trees.widen(params)), jnp.zeros((), jnp.int32)))
    return trees.cast_like(trees.divide(total, jnp.maximum(batches.rows.size, 1)), params)
