"""Differential privacy of a client's rows: gradients that are clipped row by row and noised, DP-SGD's."""

import jax
import jax.numpy as jnp

from jaxfed import part, trees
from jaxfed.base import Model
from jaxfed.client.gradients import GradientRule
from jaxfed.messages import Batch, Params, Stats
from jaxfed.optimizer.clipping import clip

# The stream of a step's key that draws noise; the key itself is the loss's.
_NOISE = 1


class PrivateGradient(GradientRule):
    r"""Every row's gradient is clipped to a greatest norm; Gaussian noise is added to their sum.

    .. math::
        g = \frac{1}{B} \Big( \sum_b \nabla f_b \min\Big(1, \frac{C}{\lVert \nabla f_b \rVert_2}\Big)
        + \sigma C \, \mathcal{N}(0, I) \Big)

    The norm is over all leaves together. ``B`` is the expected number of rows and not a batch's own, which would tell how many
    there were. For what accountants assume, batches are drawn by :class:`Poisson`; ``expected`` is then the rate times the
    client's rows. A batch takes the memory of B gradients.

    Args:
        expected: ``B``.
        max_norm: ``C``.
        noise_multiplier: ``sigma``; :func:`jaxfed.accounting.noise_multiplier` finds the one that a budget asks for.

    Raises:
        ValueError: While tracing, for a model with statistics: a batch norm mixes rows, so that no gradient is one row's.

    Example:
        >>> from jaxfed.client.gradients import as_model
        >>> model = as_model("loss", lambda w, batch, key: batch["x"] @ w)
        >>> batch = {"x": jnp.array([[3.0, 4.0], [0.0, 0.5], [9.0, 9.0]]), "mask": jnp.array([True, True, False])}
        >>> rule = PrivateGradient(expected=2, max_norm=1.0, noise_multiplier=0.0)
        >>> print(rule(model, jnp.zeros(2), {}, batch, jax.random.key(0))[2])
        [0.3  0.65]

    References:
        Abadi et al., `Deep Learning with Differential Privacy <https://arxiv.org/abs/1607.00133>`_, 2016
    """

    name = "private"
    expected: float = part.number(above=0)
    max_norm: float = part.number(default=1.0, above=0)
    noise_multiplier: float = part.number(default=1.0, at_least=0)

    def __call__(
        self, model: Model, params: Params, stats: Stats, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Stats, Params]:
        """See :class:`GradientRule`."""
        if jax.tree.leaves(stats):
            raise ValueError("PrivateGradient: the model has statistics, which mix the rows of a batch. Use another norm layer.")

        def loss_of(params: Params, row: Batch) -> jax.Array:
            one = jax.tree.map(lambda x: x[None], row)
            return model.loss(params, stats, one, key)[0][0]

        def clipped(row: Batch) -> tuple[jax.Array, Params]:
            loss, gradient = jax.value_and_grad(loss_of)(params, row)
            return loss, clip(trees.widen(gradient), self.max_norm)

        mask = batch["mask"]
        losses, gradients = jax.vmap(clipped)(batch)
        total = jax.tree.map(lambda x: x.sum(0), trees.where_rows(mask, gradients))
        noisy = trees.add_noise(total, self.noise_multiplier * self.max_norm, jax.random.fold_in(key, _NOISE))
        loss = jnp.where(mask, losses, 0).sum() / jnp.maximum(mask.sum(), 1)
        return loss, stats, trees.cast_like(trees.divide(noisy, self.expected), params)
