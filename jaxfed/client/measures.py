"""What a client measures beside the metrics that always travel. Nothing is computed that nobody asks for."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxfed import trees
from jaxfed.base import Model
from jaxfed.client.batches import Batches
from jaxfed.messages import Broadcast, Params
from jaxfed.part import Part

# Keeps weights of 0 from dividing.
_SMALL = 1e-8


class Measure(Part, kind="measure"):
    """A scalar of one client, which travels with its upload under the measure's ``name``."""

    def __call__(self, model: Model, start: Broadcast, batches: Batches, delta: Params) -> jax.Array:
        """The scalar, from the broadcast, the client's rows and its update, ``begin - end``."""
        raise NotImplementedError(f"{type(self).__name__} defines no __call__(model, start, batches, delta).")


class StartLoss(Measure):
    r"""The mean loss of the broadcast model over all the client's rows, a pass of its own.

    .. math:: F_i(w_t) = \frac{1}{n_i} \sum_j f(w_t; x_{ij})

    It is evaluated as in evaluation, without a key.
    """

    name = "start_loss"

    def __call__(self, model: Model, start: Broadcast, batches: Batches, delta: Params) -> jax.Array:
        """``F_i(w_t)``."""
        return _mean_of_losses(lambda values: values, model, start, batches)


class RootMeanSquareLoss(Measure):
    r"""The root of the mean squared loss of the broadcast model over all the client's rows, a pass of its own.

    .. math:: \sqrt{\tfrac{1}{n_i} \sum_j f(w_t; x_{ij})^2}

    Times the rows it is what :class:`~jaxfed.server.oort.Oort` holds a client to be worth.
    """

    name = "loss_rms"

    def __call__(self, model: Model, start: Broadcast, batches: Batches, delta: Params) -> jax.Array:
        """The root."""
        return jnp.sqrt(_mean_of_losses(jnp.square, model, start, batches))


class UpdateNorm(Measure):
    """The Euclidean norm of the client's update."""

    name = "update_norm"

    def __call__(self, model: Model, start: Broadcast, batches: Batches, delta: Params) -> jax.Array:
        """``|w_t - w_i|``."""
        return trees.norm(delta)


class UpdateDivergence(Measure):
    r"""How far the client's update is from the broadcast weights, relative to them and on average over coordinates.

    .. math:: \frac{1}{d} \sum_k \left| \frac{\delta_k}{w_k + 10^{-8}} \right|
    """

    name = "update_divergence"

    def __call__(self, model: Model, start: Broadcast, batches: Batches, delta: Params) -> jax.Array:
        """The mean."""
        ratios = jax.tree.map(lambda u, w: jnp.abs(u / (w + _SMALL)).sum(), delta, trees.widen(start.params))
        return jnp.asarray(sum(jax.tree.leaves(ratios))) / sum(leaf.size for leaf in jax.tree.leaves(delta))


class Domain(Measure):
    """The domain of a client: what its first row has under the key ``"domain"``, a number from 0."""

    name = "domain"

    def __call__(self, model: Model, start: Broadcast, batches: Batches, delta: Params) -> jax.Array:
        """The number.

        Raises:
            ValueError: While tracing, if the data have no such key.
        """
        arrays = batches.rows.arrays
        if "domain" not in arrays:
            raise ValueError(f"The measure 'domain' needs data with the key 'domain', a number per row; got {sorted(arrays)}.")
        return jnp.take(arrays["domain"], batches.rows.start, axis=0, mode="clip").astype(float)


def _mean_of_losses(function: Callable[[jax.Array], jax.Array], model: Model, start: Broadcast, batches: Batches) -> jax.Array:
    """The mean over all rows of a function of their losses under the broadcast model."""

    def step(total: jax.Array, batch: dict) -> jax.Array:
        values = function(model.metrics(start.params, start.stats, batch)["loss"])
        return total + jnp.where(batch["mask"], values, 0).sum().astype(total.dtype)

    return batches.fold_all(step, jnp.zeros(())) / jnp.maximum(batches.rows.size, 1)
