"""pFedMe: personal models as Moreau envelopes of the clients' losses."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxfed import part, trees
from jaxfed.base import ClientUpdate, Model
from jaxfed.client.batches import OPTIMIZER, PERSONAL, BatchPolicy, ClientRows
from jaxfed.client.gradients import GradientRule, MeanGradient, Rule, as_model
from jaxfed.client.local import anchor_of, metrics_of
from jaxfed.messages import Batch, Broadcast, Params, Stats, Upload
from jaxfed.optimizer.optimizer import Optimizer, as_optimizer
from jaxfed.personal.wrapper import refuse_pairs


class Inner(NamedTuple):
    """The personal model during a round: weights, statistics, its Optimizer's state, its loss at the last inner step."""

    params: Params
    stats: Stats
    state: Any
    loss: jax.Array


class PFedMe(ClientUpdate):
    r"""Each client's weights :math:`w_i` follow a personal model :math:`\theta_i` that is pulled back towards them.

    For every batch, ``inner_steps`` steps approximate the first line, then :math:`w_i` takes one of the second:

    .. math::
        \theta_i &\approx \arg\min_\theta f_i(\theta) + \tfrac{\lambda}{2} \|\theta - w_i\|^2 \\
        w_i &\leftarrow w_i - \eta \lambda (w_i - \theta_i)

    Both begin each round as the broadcast weights; :math:`\theta_i` goes on from batch to batch, it is not reset to :math:`w_i`.
    The change of :math:`w_i` is uploaded; the server's rate is the paper's :math:`\beta`. Nothing is kept: a client predicts with
    the :math:`\theta_i` at which a round's work from the present global weights arrives, whether it has taken part or not.

    Args:
        loss: A Model, or a loss ``(params, batch, key) -> values [B]``.
        optimizer: The Optimizer of :math:`w_i`, or its rate :math:`\eta`; its gradient is :math:`\lambda (w_i - \theta_i)`.
        personal: That of :math:`\theta_i`, or its rate; its gradient is :math:`\nabla f_i + \lambda (\theta_i - w_i)`.
        batches: The policy.
        strength: :math:`\lambda`, above 0.
        inner_steps: Steps of :math:`\theta_i` on each batch, at least 1.
        gradient: From a batch to a gradient of the loss.

    Raises:
        ValueError: If an Optimizer exchanges auxiliary variables with the server.

    Example:
        >>> import jaxfed
        >>> def loss(params, batch, key):
        ...     return (params - batch["x"]) ** 2 / 2
        >>> client = PFedMe(loss, 0.1, 0.2, jaxfed.Steps(None, steps=1), strength=1.0, inner_steps=50)
        >>> start, rows = Broadcast(jnp.array(0.0), {}, {}, 0), jaxfed.ClientRows.of({"x": jnp.array([4.0])})
        >>> upload, kept = client.run(start, client.init_kept(start, jax.random.key(0)), rows, jax.random.key(1))
        >>> print(f"{-upload.delta:.4f}")  # theta is 2, the pull on w is 0 - 2
        0.2000

    References:
        Dinh et al., `Personalized Federated Learning with Moreau Envelopes <https://arxiv.org/abs/2006.08848>`_, 2020
    """

    name: ClassVar[str] = "pfedme"
    loss: Model = part.field(as_model)
    optimizer: Optimizer = part.field(as_optimizer)
    personal: Optimizer = part.field(as_optimizer)
    batches: BatchPolicy = part.part("batches")
    strength: float = part.number(default=15.0, above=0)
    inner_steps: int = part.count(default=5, at_least=1)
    gradient: GradientRule = part.part("gradient", default=MeanGradient())

    def check(self) -> None:
        """Refuses modules in two halves."""
        reason = "It is made for gradients of the loss, and here steps go along strength * (w - theta). Drop the module."
        for name in ("optimizer", "personal"):
            refuse_pairs(f"PFedMe.{name}", getattr(self, name), reason)

    @property
    def model(self) -> Model:
        """The model that is trained."""
        return self.loss

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """Both."""
        return self.optimizer, self.personal

    @property
    def needs_survey(self) -> bool:
        """Whether its gradient does."""
        return self.gradient.needs_survey

    def num_steps(self, sizes: ArrayLike, work: ArrayLike, capacity: int) -> jax.Array:
        """Batches that clients with ``sizes`` rows take; each costs ``inner_steps`` gradients."""
        return self.batches.num_steps(sizes, work, capacity)

    def init_kept(self, start: Broadcast, key: jax.Array) -> tuple[Any, Any]:
        """What the two Optimizers keep."""
        optimizer = self.optimizer.init_kept(start.params, key)
        return optimizer, self.personal.init_kept(start.params, jax.random.fold_in(key, PERSONAL))

    def run(self, start: Broadcast, kept: tuple, rows: ClientRows, key: jax.Array) -> tuple[Upload, tuple]:
        """Trains, and uploads the change of ``w``."""
        _, upload, kept = self.train(start, kept, rows, key)
        return upload, kept

    def personalize(self, start: Broadcast, kept: tuple, rows: ClientRows, key: jax.Array) -> tuple[Params, Stats]:
        """``theta`` after a round's work."""
        inner, _, _ = self.train(start, kept, rows, key)
        return inner.params, inner.stats

    def metrics(self, personal: Any, batch: Batch) -> dict[str, jax.Array]:
        """The model's metrics with these ``(params, stats)``."""
        return self.loss.metrics(*personal, batch)

    def train(self, start: Broadcast, kept: tuple, rows: ClientRows, key: jax.Array) -> tuple[Inner, Upload, tuple]:
        """``(personal model, upload, kept)`` after a round's work."""
        optimizer_key = jax.random.fold_in(key, OPTIMIZER)
        batches = self.batches.of(rows, key)
        anchor = anchor_of(start, self.gradient, self.loss, batches, optimizer_key)
        rule = self.gradient.start_round(anchor)
        outer = self.optimizer.start_round(kept[0], anchor)
        state = self.personal.start_round(kept[1], anchor._replace(key=jax.random.fold_in(optimizer_key, PERSONAL)))
        inner = Inner(start.params, start.stats, state, jnp.zeros(()))

        def step(carry: tuple, batch: dict, key: jax.Array) -> tuple:
            params, outer, inner, total = carry
            inner = self._approach(rule, inner, params, batch, key)
            pull = trees.scale(self.strength, trees.subtract(params, inner.params))
            updates, outer = self.optimizer.update(pull, outer, params)
            return optax.apply_updates(params, updates), outer, inner, total + inner.loss

        params, outer, inner, total = batches.fold(step, (start.params, outer, inner, jnp.zeros(())))
        kept_outer, _ = self.optimizer.end_round(outer, start.params, params)
        kept_inner, _ = self.personal.end_round(inner.state, start.params, inner.params)
        delta = trees.subtract(trees.widen(start.params), trees.widen(params))
        return inner, Upload(delta, inner.stats, {}, metrics_of(batches, total)), (kept_outer, kept_inner)

    def _approach(self, rule: Rule, inner: Inner, anchor: Params, batch: Batch, key: jax.Array) -> Inner:
        """``inner_steps`` steps towards the minimum of the batch's loss with the pull to ``anchor``."""

        def step(k: jax.Array, inner: Inner) -> Inner:
            key_k = jax.random.fold_in(key, k)
            loss, stats, gradient = rule(self.loss, inner.params, inner.stats, batch, key_k)
            gradient = trees.add_scaled(gradient, self.strength, trees.subtract(inner.params, anchor))
            updates, state = self.personal.update(gradient, inner.state, inner.params)
            return Inner(optax.apply_updates(inner.params, updates), stats, state, loss.astype(inner.loss.dtype))

        return jax.lax.fori_loop(0, self.inner_steps, step, inner)
