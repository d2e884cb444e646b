"""Differential privacy of whole clients: means of clipped updates with Gaussian noise, DP-FedAvg's."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxfed import checks, part, trees
from jaxfed.base import Aggregator
from jaxfed.messages import CohortInfo, Params, Upload
from jaxfed.optimizer.clipping import clip

# The streams of a round's key: noise on the sum, noise on the count.
_SUM, _COUNT = range(2)


class Private(Aggregator, register=False):
    """What hides single clients by noise, as its ``noise_multiplier`` says."""

    def aggregate(self, updates: Params, weights: jax.Array) -> Params:
        """The rule on stacked updates (of the first round, where rounds differ), without noise."""
        return Aggregator.aggregate(self.replace(noise_multiplier=0.0), updates, weights)


class PrivateMean(Private):
    r"""The sum of updates that are clipped to a greatest norm, with Gaussian noise, over a fixed number of clients.

    .. math::
        u = \frac{1}{n} \Big( \sum_i u_i \min\Big(1, \frac{C}{\lVert u_i \rVert_2}\Big) + z C \, \mathcal{N}(0, I) \Big)

    All clients weigh alike, and ``n`` is their expected number and not the round's own: one client changes the sum by at most
    ``C``, and the noise of the mean has the standard deviation :math:`z C / n`. What the guarantee covers is the model; metrics
    in reports are those of a simulation. :meth:`aggregate` shows the rule without noise.

    Args:
        expected: ``n``.
        max_norm: ``C``, over all leaves of an update together.
        noise_multiplier: ``z``; :func:`jaxfed.accounting.noise_multiplier` finds the one that a budget asks for.

    Raises:
        ValueError: While tracing, if uploads hold auxiliary variables or statistics, which would travel without noise; or where
            ``finalize`` gets no key.

    Example:
        >>> print(PrivateMean(expected=2, max_norm=1.0).aggregate(jnp.array([[3.0, 4.0], [0.0, 0.5]]), jnp.ones(2)))
        [0.3  0.65]

    References:
        McMahan et al., `Learning Differentially Private Recurrent Language Models <https://arxiv.org/abs/1710.06963>`_, 2018
    """

    name = "private-mean"
    expected: int = part.count(at_least=1)
    max_norm: float = part.number(default=1.0, above=0)
    noise_multiplier: float = part.number(default=1.0, at_least=0)

    def prepare(self, upload: Upload, sent: Any) -> Params:
        """The clipped update."""
        _refuse_what_has_no_noise(self.name, upload)
        return clip(trees.widen(upload.delta), self.max_norm)

    def finalize(self, total: Params, state: Any, info: CohortInfo) -> tuple[Params, Any]:
        """Adds noise and divides."""
        noisy = trees.add_noise(total, self.noise_multiplier * self.max_norm, _key_of(self.name, info, _SUM))
        return trees.divide(noisy, self.expected), state


class AdaptivePrivateMean(Private):
    r"""As :class:`PrivateMean`, with a greatest norm that follows a quantile of the clients' norms.

    .. math::
        C \leftarrow C \, e^{-\eta (b - \gamma)}, \qquad
        b = \frac{1}{2} + \frac{1}{n} \Big( \sum_i \big( [\lVert u_i \rVert_2 \le C] - \tfrac{1}{2} \big)
        + \mathcal{N}(0, \sigma_b^2) \Big), \qquad
        z_\Delta = \big( z^{-2} - (2 \sigma_b)^{-2} \big)^{-1/2}

    A part of the budget hides the count, to which a client adds or takes a half, so the sum gets a little more noise,
    :math:`z_\Delta C`; both together are as private as ``z`` alone.

    Args:
        expected: ``n``.
        max_norm: ``C`` in the first round.
        noise_multiplier: ``z``, below twice ``count_std``.
        quantile: ``gamma``, the share of clients whose updates are not to be clipped.
        rate: ``eta``.
        count_std: ``sigma_b``, above 0; the paper takes a twentieth of ``n``.

    Raises:
        ValueError: If the count takes all of the budget; and as :class:`PrivateMean`.

    Example:
        >>> rule = AdaptivePrivateMean(expected=100, max_norm=1.0, noise_multiplier=1.0, count_std=5.0)
        >>> print(f"{rule.sum_multiplier:.6f}")
        1.005038

    References:
        Andrew et al., `Differentially Private Learning with Adaptive Clipping <https://arxiv.org/abs/1905.03871>`_, 2021
    """

    name = "adaptive-private-mean"
    expected: int = part.count(at_least=1)
    max_norm: float = part.number(default=0.1, above=0)
    noise_multiplier: float = part.number(default=1.0, at_least=0)
    quantile: float = part.number(default=0.5, above=0, below=1)
    rate: float = part.number(default=0.2, at_least=0)
    count_std: float = part.number(default=5.0, above=0)

    def check(self) -> None:
        """That the count leaves something to the sum."""
        ratio = self.noise_multiplier / self.count_std
        checks.number("AdaptivePrivateMean.noise_multiplier / count_std", ratio, checks.Bounds(below=2))

    @property
    def sum_multiplier(self) -> Any:
        """``z_Delta``."""
        return self.noise_multiplier / (1 - (self.noise_multiplier / (2 * self.count_std)) ** 2) ** 0.5

    def init(self, params: Params) -> jax.Array:
        """``C``."""
        return jnp.asarray(self.max_norm, float)

    def send(self, state: jax.Array) -> jax.Array:
        """``C``."""
        return state

    def prepare(self, upload: Upload, sent: jax.Array) -> tuple[Params, jax.Array]:
        """The clipped update, and a half if it was short enough, else minus a half."""
        _refuse_what_has_no_noise(self.name, upload)
        # Of 1 and 0 a client could move the sum by one, which would take twice the noise.
        return clip(trees.widen(upload.delta), sent), (trees.norm(upload.delta) <= sent).astype(float) - 0.5

    def finalize(self, total: tuple[Params, jax.Array], state: jax.Array, info: CohortInfo) -> tuple[Params, jax.Array]:
        """Adds noise to both sums, divides, and moves the norm."""
        update, short = total
        noisy = trees.add_noise(update, self.sum_multiplier * state, _key_of(self.name, info, _SUM))
        # Without noise on the sum there is no budget to keep, and the count needs none either.
        std = jnp.where(jnp.asarray(self.noise_multiplier) > 0, self.count_std, 0.0)
        share = 0.5 + trees.add_noise(short, std, _key_of(self.name, info, _COUNT)) / self.expected
        return trees.divide(noisy, self.expected), state * jnp.exp(-self.rate * (share - self.quantile))


def _key_of(name: str, info: CohortInfo, stream: int) -> jax.Array:
    if info.key is None:
        raise ValueError(f"{name}: expected a CohortInfo with a key to draw noise from, got none. Give it a new one each round.")
    return jax.random.fold_in(info.key, stream)


def _refuse_what_has_no_noise(name: str, upload: Upload) -> None:
    for what, value in (("auxiliary variables", upload.aux), ("statistics of the model", upload.stats)):
        if jax.tree.leaves(value):
            raise ValueError(f"{name}: uploads hold {what}, which would travel without noise. Use a client or model without.")
