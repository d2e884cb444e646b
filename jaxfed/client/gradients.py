"""From a batch to a gradient: losses as Models, and gradient rules that are Parts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxfed import checks, part, trees
from jaxfed.base import Model
from jaxfed.messages import Batch, Params, RoundStart, Stats
from jaxfed.part import Part

Rule = Callable[[Model, Params, Stats, Batch, jax.Array], tuple[jax.Array, Stats, Params]]
"""``(model, params, stats, batch, key) -> (loss, stats, gradient)``."""


def as_model(where: str, loss: Any) -> Model:
    """A Model as it is, or one lifted from a plain loss ``(params, batch, key) -> values [B]`` or ``(values, {name: [B]})``.

    A loss is a module-level function, or ``jax.tree_util.Partial(function, arrays)``: a lambda made anew retraces.

    Raises:
        TypeError: If ``loss`` is neither.
    """
    if isinstance(loss, Model):
        return loss
    if not callable(loss):
        raise TypeError(f"{where}: expected a loss(params, batch, key) or a Model, got {checks.describe(loss)}.")
    loss = part.as_function(where, loss)
    lifted = [jax.tree_util.Partial(f, loss) for f in (_no_init, _lifted_loss, _no_predict, _lifted_metrics)]
    return Model(*lifted)


def model() -> Any:
    """A field that holds a Model or a plain loss."""
    return part.field(as_model)


def _split(output: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    return output if isinstance(output, tuple) else (output, {})


def _lifted_loss(loss: Callable, params: Params, stats: Stats, batch: Batch, key: Any) -> tuple[jax.Array, Stats]:
    return _split(loss(params, batch, key))[0], stats


def _lifted_metrics(loss: Callable, params: Params, stats: Stats, batch: Batch) -> dict[str, jax.Array]:
    del stats
    values, metrics = _split(loss(params, batch, None))
    return {"loss": values, **metrics}


def _no_init(loss: Callable, key: jax.Array) -> Any:
    raise ValueError(f"{loss} is a plain loss without initial weights; pass params to init(params, key=...).")


def _no_predict(loss: Callable, params: Params, stats: Stats, batch: Batch) -> Any:
    raise ValueError(f"{loss} is a plain loss and predicts nothing; pass a Model, such as from_linen(...) makes.")


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of ``values [B]`` where ``mask [B]``; 0 if nowhere. Others leave through ``where``: NaN there does no harm.

    Raises:
        ValueError: While tracing, if there is not one value per example.

    >>> print(masked_mean(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])))
    2.0
    """
    if jnp.shape(values) != mask.shape:
        remedy = "Return the loss of every example, not their mean."
        raise ValueError(f"The loss must give values of shape [B] = {mask.shape}, got {jnp.shape(values)}. {remedy}")
    return jnp.where(mask, values, 0).sum() / jnp.maximum(mask.sum(), 1)


class GradientRule(Part, kind="gradient"):
    """From a batch to ``(loss, stats, gradient)``."""

    @property
    def needs_survey(self) -> bool:
        """Whether :meth:`start_round` uses what a first pass over the cohort found."""
        return False

    @property
    def uncorrected(self) -> "GradientRule":
        """The rule without what turns it towards the cohort's common optimum: a personal model has its own."""
        return self

    def start_round(self, start: RoundStart) -> Rule:
        """The rule for one client's round, which may know where the round began; default: the rule itself."""
        del start
        return self

    def __call__(
        self, model: Model, params: Params, stats: Stats, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Stats, Params]:
        """The batch's loss (a scalar), the new statistics and the gradient, like ``params``."""
        raise NotImplementedError(f"{type(self).__name__} defines no __call__.")


class MeanGradient(GradientRule):
    """The gradient of the mean loss over a batch's real rows."""

    name = "mean"

    def __call__(
        self, model: Model, params: Params, stats: Stats, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Stats, Params]:
        """See :class:`GradientRule`."""

        def mean_loss(params: Params) -> tuple[jax.Array, Stats]:
            values, new_stats = model.loss(params, stats, batch, key)
            return masked_mean(values, batch["mask"]), new_stats

        (loss, stats), gradient = jax.value_and_grad(mean_loss, has_aux=True)(params)
        return loss, stats, gradient


class SVRG(GradientRule):
    r"""Replaces a batch's own gradient at the round's anchor by the cohort's mean gradient there.

    .. math:: g = \nabla f_i(w; b) - \nabla f_i(w_t; b) + c, \qquad c = \mathrm{mean}_{j \in S} \nabla f_j(w_t)

    ``c`` is what a first pass over the cohort found: the algorithm needs ``survey=FullGradient()``. Both gradients of a batch are
    taken with the same key. Outside of a round it is ``rule``.

    Args:
        rule: How a gradient is taken.

    References:
        Johnson and Zhang, Accelerating Stochastic Gradient Descent using Predictive Variance Reduction, 2013;
        Karimireddy et al., `Breaking the centralized barrier (Mime) <https://arxiv.org/abs/2008.03606>`_, 2021
    """

    name = "svrg"
    rule: GradientRule = part.part("gradient", default=MeanGradient())

    @property
    def needs_survey(self) -> bool:
        """True."""
        return True

    @property
    def uncorrected(self) -> GradientRule:
        """``rule`` alone."""
        return self.rule.uncorrected

    def start_round(self, start: RoundStart) -> Rule:
        """The corrected rule of this round."""

        def corrected(
            model: Model, params: Params, stats: Stats, batch: Batch, key: jax.Array
        ) -> tuple[jax.Array, Stats, Params]:
            loss, stats, gradient = self.rule(model, params, stats, batch, key)
            _, _, anchored = self.rule(model, start.params, start.stats, batch, key)
            correction = jax.tree.map(lambda c, g: c - g, start.survey, trees.widen(anchored))
            return loss, stats, jax.tree.map(lambda g, c: g + c.astype(g.dtype), gradient, correction)

        return corrected

    def __call__(
        self, model: Model, params: Params, stats: Stats, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Stats, Params]:
        """The gradient without correction."""
        return self.rule(model, params, stats, batch, key)
