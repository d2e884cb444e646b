"""What a client measures beside the metrics that always travel. Nothing is computed that nobody asks for."""

import jax
import jax.numpy as jnp

from jaxfed.base import Broadcast, Model
from jaxfed.client.batches import Batches
from jaxfed.part import Part


class Measure(Part, kind="measure"):
    """A scalar of one client, which travels with its upload under the measure's ``name``."""

    def __call__(self, model: Model, start: Broadcast, batches: Batches) -> jax.Array:
        """The scalar, from the broadcast and the client's rows."""
        raise NotImplementedError(f"{type(self).__name__} defines no __call__(model, start, batches).")


class StartLoss(Measure):
    r"""The mean loss of the broadcast model over all the client's rows, a pass of its own.

    .. math:: F_i(w_t) = \frac{1}{n_i} \sum_j f(w_t; x_{ij})

    It is evaluated as in evaluation, without a key.
    """

    name = "start_loss"

    def __call__(self, model: Model, start: Broadcast, batches: Batches) -> jax.Array:
        """``F_i(w_t)``."""

        def step(total: jax.Array, batch: dict) -> jax.Array:
            values = model.metrics(start.params, start.stats, batch)["loss"]
            return total + jnp.where(batch["mask"], values, 0).sum().astype(total.dtype)

        return batches.fold_all(step, jnp.zeros(())) / jnp.maximum(batches.rows.size, 1)


class Domain(Measure):
    """The domain of a client: what its first row has under the key ``"domain"``, a number from 0."""

    name = "domain"

    def __call__(self, model: Model, start: Broadcast, batches: Batches) -> jax.Array:
        """The number.

        Raises:
            ValueError: While tracing, if the data have no such key.
        """
        arrays = batches.rows.arrays
        if "domain" not in arrays:
            raise ValueError(f"The measure 'domain' needs data with the key 'domain', a number per row; got {sorted(arrays)}.")
        return jnp.take(arrays["domain"], batches.rows.start, axis=0, mode="clip").astype(float)
