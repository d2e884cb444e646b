"""FedEM: every client's data as a mixture of M distributions, with a model for each."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxfed import checks, part, trees
from jaxfed.base import ClientUpdate, Model
from jaxfed.client.batches import OPTIMIZER, Batches, BatchPolicy, ClientRows
from jaxfed.client.gradients import GradientRule, MeanGradient
from jaxfed.client.local import metrics_of
from jaxfed.messages import Batch, Broadcast, Params, RoundStart, Stats, Upload
from jaxfed.optimizer.optimizer import Optimizer, as_optimizer
from jaxfed.personal.wrapper import refuse_pairs

_POSTERIOR = "fedem_posterior"


def stacked_starts(model: Model, key: jax.Array, models: int) -> tuple[Params, Stats]:
    """``M`` initial weights and statistics of one model, each from a key of its own, stacked ``[M, ...]``.

    A model whose initial weights do not depend on the key (zeros) gives equal ones, which then stay equal for ever.

    >>> from jaxfed.models.functions import from_functions
    >>> model = from_functions(lambda key: jax.random.normal(key, (2,)), lambda w, batch, key: w, lambda w, batch: w)
    >>> stacked_starts(model, jax.random.key(0), models=3)[0].shape
    (3, 2)
    """
    # One after the other: several batched QR decompositions, those of orthogonal initializers, wait for each other for ever in
    # one program of XLA's CPU backend (jaxlib 0.10.2).
    return jax.lax.map(model.init, jax.random.split(key, models))


def _as_predicting(where: str, value: Any) -> Model:
    remedy = "A mixture is one of probabilities, so a plain loss is not enough. Use from_functions(init, loss, predict)."
    return checks.instance(where, value, Model, remedy)


class FedEMKept(NamedTuple):
    """A client's mixture weights ``[M]``, and what the M Optimizers keep."""

    weights: jax.Array
    optimizer: Any


class FedEM(ClientUpdate):
    r"""M models for all clients, and for each client the weights :math:`\pi_i` with which it mixes their predictions.

    A round is one step of expectation maximisation. For every example of client i, by the models as they were broadcast,

    .. math:: q_m(x, y) \propto \pi_{im} \exp(-\ell_m(x, y)),

    each model then trains on the losses weighted by its :math:`q_m`, and :math:`\pi_{im}` becomes the mean of :math:`q_m` over
    the client's rows, which it keeps. The server averages each model by itself. Global weights have a leading ``[M]``; the M must
    differ at the start: ``Simulation.init(key=...)`` draws them apart, :func:`stacked_starts` is what it calls.

    A client predicts :math:`\sum_m \pi_{im} p_m(y | x)`, with :math:`\pi_i` brought up to date on its training rows; the global
    model is the mixture of equal weights. An example is a row, which may have many labels (a text, one at every position): it has
    one posterior, and its predictions are mixed label by label.

    Args:
        loss: A Model whose ``predict`` gives logits ``[B, ..., classes]``, for integer labels ``[B, ...]``. Its loss stands for
            :math:`-\log p_m(y | x)`, up to a constant; where it is the mean over a row's labels, as the losses of this package
            and of the authors' program are, posteriors are softer than by the probability of the whole row. The mixture has the
            Model's own metrics, or those of classes if it has no ``measure``.
        optimizer: Each model's Optimizer, or a learning rate.
        batches: The policy.
        models: ``M``.
        passes: How often a client goes through its rows to bring its weights up to date before it predicts. One is what a round
            does; a client never seen gains by more.
        gradient: From a batch to a gradient.

    Raises:
        TypeError: For a plain loss, which predicts nothing.
        ValueError: If the Optimizer exchanges auxiliary variables; when a run begins, for weights without a leading ``[M]``.

    Example:
        >>> import jaxfed
        >>> from jaxfed.models.functions import from_functions
        >>> from jaxfed.models.losses import cross_entropy
        >>> def init(key):
        ...     return jax.random.normal(key, (2, 3))
        >>> def predict(w, batch):
        ...     return batch["x"] @ w
        >>> def loss(w, batch, key):
        ...     return cross_entropy(predict(w, batch), batch)
        >>> client = FedEM(from_functions(init, loss, predict), 0.1, jaxfed.Epochs(10), models=2)
        >>> params, stats = client.model.init(jax.random.key(0))
        >>> params.shape, client.init_kept(Broadcast(params, stats, {}, 0), jax.random.key(1)).weights.tolist()
        ((2, 2, 3), [0.5, 0.5])

    References:
        Marfoq et al., `Federated Multi-Task Learning under a Mixture of Distributions <https://arxiv.org/abs/2108.10252>`_, 2021
    """

    name: ClassVar[str] = "fedem"
    loss: Model = part.field(_as_predicting)
    optimizer: Optimizer = part.field(as_optimizer)
    batches: BatchPolicy = part.part("batches")
    models: int = part.size(default=3)
    passes: int = part.count(default=1)
    gradient: GradientRule = part.part("gradient", default=MeanGradient())

    def check(self) -> None:
        """Refuses modules in two halves."""
        reason = "It is made for one model, and FedEM trains M weighted ones. Drop the module."
        refuse_pairs("FedEM.optimizer", self.optimizer, reason)

    @property
    def model(self) -> Model:
        """The M models as one, of equal weights: what a client without data would predict with."""
        bound = {name: jax.tree_util.Partial(f, self.loss) for name, f in _EQUAL_MIXTURE.items()}
        return Model(init=jax.tree_util.Partial(_Starts(self.models), self.loss), measure=self.loss.measure, **bound)

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """The one that trains each model."""
        return (self.optimizer,)

    @property
    def needs_survey(self) -> bool:
        """Whether its gradient does."""
        return self.gradient.needs_survey

    def num_steps(self, sizes: ArrayLike, work: ArrayLike, capacity: int) -> jax.Array:
        """Local steps of clients with ``sizes`` rows, M models each."""
        return self.batches.num_steps(sizes, work, capacity)

    def init_kept(self, start: Broadcast, key: jax.Array) -> FedEMKept:
        """Equal weights.

        Raises:
            ValueError: If the weights have no leading ``[M]``.
        """
        for name, leaf in zip(trees.names(start.params), jax.tree.leaves(start.params)):
            if jnp.shape(leaf)[:1] != (self.models,):
                remedy = "Let the run draw them: init(key=...), or make them with stacked_starts(model, key, models)."
                where = f"params, leaf {name or '(the whole)'}"
                raise ValueError(f"{where}: expected a leading axis of {self.models} models, got {jnp.shape(leaf)}. {remedy}")
        optimizer = jax.vmap(self.optimizer.init_kept)(start.params, self._keys(key))
        return FedEMKept(jnp.full(self.models, 1 / self.models, float), optimizer)

    def run(self, start: Broadcast, kept: FedEMKept, rows: ClientRows, key: jax.Array) -> tuple[Upload, FedEMKept]:
        """Trains each model on its share of every example, and renews the mixture weights."""
        optimizer_key = jax.random.fold_in(key, OPTIMIZER)
        batches = self.batches.of(rows, key)
        weights = self._mean_posterior(kept.weights, start, batches)
        each = jnp.full(self.models, start.round)
        anchors = RoundStart(start.params, start.stats, {}, each, self._keys(optimizer_key))
        states = jax.vmap(self.optimizer.start_round)(kept.optimizer, anchors)
        carry = (start.params, start.stats, states, jnp.zeros(()))

        def step(carry: tuple, batch: dict, key: jax.Array) -> tuple:
            params, stats, state, total = carry
            posterior = self._posterior(kept.weights, start, batch)
            component = lambda *model: self._component_step(batch, *model)  # noqa: E731
            params, stats, state, losses = jax.vmap(component)(anchors, params, stats, state, posterior, self._keys(key))
            return params, stats, state, total + losses.sum().astype(total.dtype)

        params, stats, state, total = batches.fold(step, carry)
        optimizer = jax.vmap(lambda *round: self.optimizer.end_round(*round)[0])(state, start.params, params)
        delta = trees.subtract(trees.widen(start.params), trees.widen(params))
        return Upload(delta, stats, {}, metrics_of(batches, total)), FedEMKept(weights, optimizer)

    def personalize(self, start: Broadcast, kept: FedEMKept, rows: ClientRows, key: jax.Array) -> tuple[jax.Array, Params, Stats]:
        """``(weights [M], params, stats)``: the global models, and how this client mixes them."""
        batches = self.batches.of(rows, key)
        update = lambda _, weights: self._mean_posterior(weights, start, batches)  # noqa: E731
        return jax.lax.fori_loop(0, self.passes, update, kept.weights), start.params, start.stats

    def metrics(self, personal: tuple[jax.Array, Params, Stats], batch: Batch) -> dict[str, jax.Array]:
        """The metrics of the mixture's predictions, ``loss`` among them (``-log p(y | x)``)."""
        return mixture_metrics(self.loss, mixture_log_probabilities(self.loss, *personal, batch), batch)

    def _keys(self, key: jax.Array) -> jax.Array:
        """``[M]``, one for each model; a split inside the loop over clients would count as a second use of the key."""
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(self.models))

    def _posterior(self, weights: jax.Array, start: Broadcast, batch: Batch) -> jax.Array:
        """``q`` as ``[M, B]``, by the broadcast models."""
        losses = jax.vmap(lambda params, stats: self.loss.loss(params, stats, batch, None)[0])(start.params, start.stats)
        return jax.nn.softmax(jnp.log(weights)[:, None] - losses, axis=0)

    def _mean_posterior(self, weights: jax.Array, start: Broadcast, batches: Batches) -> jax.Array:
        """``[M]``, the mean of ``q`` over all rows; the weights as they were for a client that does no work."""

        def add(total: jax.Array, batch: dict) -> jax.Array:
            posterior = self._posterior(weights, start, batch)
            return total + jnp.where(batch["mask"][None], posterior, 0).sum(1).astype(total.dtype)

        total = batches.fold_all(add, jnp.zeros_like(weights))
        rows = total.sum()  # a row's posteriors add up to one
        return jnp.where(rows > 0, total / jnp.where(rows > 0, rows, 1), weights)

    def _component_step(
        self, batch: Batch, anchor: RoundStart, params: Params, stats: Stats, state: Any, posterior: jax.Array, key: jax.Array
    ) -> tuple:
        """One model's step on the losses weighted by its posterior ``[B]``."""
        # Under vmap over the models a rule of their round cannot be made before the loop.
        rule = self.gradient.start_round(anchor)
        weighted = self.loss.replace(loss=jax.tree_util.Partial(_weighted_loss, self.loss.loss))
        loss, stats, gradient = rule(weighted, params, stats, {**batch, _POSTERIOR: posterior}, key)
        updates, state = self.optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), stats, state, loss


def _weighted_loss(loss: Any, params: Params, stats: Stats, batch: Batch, key: Any) -> tuple[jax.Array, Stats]:
    values, stats = loss(params, stats, batch, key)
    return values * batch[_POSTERIOR].astype(values.dtype), stats


def mixture_log_probabilities(model: Model, weights: jax.Array, params: Params, stats: Stats, batch: Batch) -> jax.Array:
    """``log sum_m weights_m softmax(logits_m)``, ``[B, ..., classes]``.

    Raises:
        ValueError: While tracing, if the model does not predict ``[B, ..., classes]``, two classes or more.
    """
    logits = jax.vmap(lambda params, stats: model.predict(params, stats, batch))(params, stats)
    if logits.ndim < 3 or logits.shape[-1] < 2:
        remedy = "A single logit for two classes needs a second one, of zeros."
        raise ValueError(f"FedEM: expected logits [B, ..., classes] of the model's predict, got {logits.shape[1:]}. {remedy}")
    return jax.nn.logsumexp(jax.nn.log_softmax(logits) + jnp.log(weights).reshape(-1, *[1] * (logits.ndim - 1)), axis=0)


def mixture_metrics(model: Model, log_probabilities: jax.Array, batch: Batch) -> dict[str, jax.Array]:
    """The Model's metrics ``[B]`` of log probabilities ``[B, ..., classes]``; without a ``measure``, ``loss`` and ``accuracy``.

    Raises:
        TypeError: While tracing, if ``batch["y"]`` are no integer labels ``[B, ...]``; without a ``measure``, if it is missing.
    """
    labels, shape = batch.get("y"), log_probabilities.shape[:-1]
    if labels is not None and (labels.shape != shape or not jnp.issubdtype(labels.dtype, jnp.integer)):
        raise TypeError(f'FedEM: expected integer labels batch["y"] {shape}, got {labels.dtype} {labels.shape}.')
    if model.measure is not None:
        return model.measure(log_probabilities, batch)
    if labels is None:
        raise TypeError(f'FedEM: expected integer labels batch["y"] {shape}, got none.')
    chosen = jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)
    values = {"loss": -chosen, "accuracy": log_probabilities.argmax(-1) == labels}
    return {name: value.reshape(value.shape[0], -1).mean(1) for name, value in values.items()}


@dataclasses.dataclass(frozen=True)
class _Starts:
    """:func:`stacked_starts` as a function that is equal to another of the same M, so that it is compiled once."""

    models: int

    def __call__(self, model: Model, key: jax.Array) -> tuple[Params, Stats]:
        return stacked_starts(model, key, self.models)


def _equal_predict(model: Model, params: Params, stats: Stats, batch: Batch) -> jax.Array:
    models = jax.tree.leaves(params)[0].shape[0]
    return mixture_log_probabilities(model, jnp.full(models, 1 / models, float), params, stats, batch)


def _equal_metrics(model: Model, params: Params, stats: Stats, batch: Batch) -> dict[str, jax.Array]:
    return mixture_metrics(model, _equal_predict(model, params, stats, batch), batch)


def _equal_loss(model: Model, params: Params, stats: Stats, batch: Batch, key: Any) -> tuple[jax.Array, Stats]:
    del key
    return _equal_metrics(model, params, stats, batch)["loss"], stats


_EQUAL_MIXTURE = {"loss": _equal_loss, "predict": _equal_predict, "metrics": _equal_metrics}
