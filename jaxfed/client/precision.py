"""Matrix products of half-precision factors with float32 sums, in whatever a function computes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxfed import part
from jaxfed.base import Model
from jaxfed.client.gradients import GradientRule, MeanGradient, Rule
from jaxfed.messages import Batch, Params, RoundStart, Stats

_PRODUCTS = ("dot_general", "conv_general_dilated")


class HalfPrecision(GradientRule):
    r"""Takes gradients with matrix products of bfloat16 factors, added up in float32; all else stays in float32.

    .. math:: C_{ij} = \sum_k \mathrm{round}(A_{ik}) \, \mathrm{round}(B_{kj})

    Forward and backward alike, convolutions too. Weights, activations, losses, statistics of batch norms, the gradient and what
    is made of it are as wide as without, so no small step is lost: a weight in bfloat16 would not see a step below 1/512 of it.
    Evaluation is not touched, nor is a product with a ``precision`` of its own.

    On GPUs and TPUs the products run on the units that are made for it. XLA's CPU backend has no such product for every shape:
    there factors are rounded and multiplied in float32, which gives the same numbers and no gain.

    Args:
        rule: How a gradient is taken.
        dtype: Of the factors: ``"bfloat16"`` has the range of float32 and 8 bits; ``"float16"`` has 11, but what is below 6e-5
            may become 0, gradients above all: there is no scaling of the loss.

    Example:
        >>> import jaxfed
        >>> def loss(w, batch, key):
        ...     return batch["x"] @ w
        >>> rule = HalfPrecision()
        >>> batch = {"x": jnp.array([[1.001, 2.0]]), "mask": jnp.array([True])}
        >>> _, _, gradient = rule(jaxfed.fedavg(loss, lrate=0.1, batch_size=1).client.model, jnp.ones(2), {}, batch, None)
        >>> print(gradient, gradient.dtype)
        [1. 2.] float32

    References:
        Micikevicius et al., `Mixed Precision Training <https://arxiv.org/abs/1710.03740>`_, 2018;
        Kalamkar et al., `A Study of BFLOAT16 for Deep Learning Training <https://arxiv.org/abs/1905.12322>`_, 2019
    """

    name = "half-precision"
    rule: GradientRule = part.part("gradient", default=MeanGradient())
    dtype: str = part.static(default="bfloat16", choices=("bfloat16", "float16"))

    @property
    def needs_survey(self) -> bool:
        """Whether ``rule`` does."""
        return self.rule.needs_survey

    @property
    def uncorrected(self) -> GradientRule:
        """Such products in the ``uncorrected`` of ``rule``."""
        return self.replace(rule=self.rule.uncorrected)

    def start_round(self, start: RoundStart) -> Rule:
        """``rule`` for this round, with such products."""
        return with_products_in(self.dtype, self.rule.start_round(start))

    def __call__(
        self, model: Model, params: Params, stats: Stats, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Stats, Params]:
        """See :class:`GradientRule`."""
        return with_products_in(self.dtype, self.rule)(model, params, stats, batch, key)


def with_products_in(dtype: Any, function: Callable) -> Callable:
    """A function whose products and convolutions have factors of ``dtype``; types of arguments and results stay.

    The program of the function is rewritten, inside of loops, branches and nested calls too. So put a gradient inside: the
    products of a derivative that is taken afterwards are as wide as their cotangents.

    Args:
        dtype: A floating type; products of factors that are no wider stay as they are.
        function: Of pytrees of arrays.

    Example:
        >>> rounded = with_products_in("bfloat16", jnp.dot)(jnp.array([1.001, 256.0]), jnp.array([1.0, 1.0]))
        >>> print(rounded, rounded.dtype)
        257.0 float32
    """

    @functools.wraps(function)
    def computed(*arguments: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        found = core.jaxpr_as_fun(_rewritten(dtype, program))(*jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shapes), found)

    return computed


def _rewritten(dtype: Any, value: Any) -> Any:
    """A program with such products; of other values of an equation's parameters, those in tuples too, the programs alone."""
    if isinstance(value, core.ClosedJaxpr):
        return value.replace(jaxpr=_rewritten(dtype, value.jaxpr))
    if isinstance(value, core.Jaxpr):
        return value.replace(eqns=[_equation(dtype, eqn) for eqn in value.eqns])
    return tuple(_rewritten(dtype, one) for one in value) if type(value) is tuple else value


def _equation(dtype: Any, eqn: core.JaxprEqn) -> core.JaxprEqn:
    if not _is_wide_product(dtype, eqn):
        return eqn.replace(params={name: _rewritten(dtype, value) for name, value in eqn.params.items()})
    options = {**eqn.params, "preferred_element_type": _dtype(eqn.outvars[0])}

    @jax.jit
    def product(left: jax.Array, right: jax.Array) -> jax.Array:
        return eqn.primitive.bind(_rounded(dtype, left), _rounded(dtype, right), **options)

    [call] = jax.make_jaxpr(product)(*(atom.aval for atom in eqn.invars)).eqns
    return call.replace(invars=eqn.invars, outvars=eqn.outvars)


def _rounded(dtype: Any, factor: jax.Array) -> jax.Array:
    if jax.default_backend() != "cpu":
        return factor.astype(dtype)
    # Read at trace time. XLA's CPU backend (jaxlib 0.10) multiplies a few layouts of narrow factors with wide sums, and fails on
    # others when it runs ("Unsupported element type for DotThunk"). In float32 the product of rounded factors is the same.
    bits = jnp.finfo(dtype)
    return jax.lax.reduce_precision(factor, bits.nexp, bits.nmant)


def _is_wide_product(dtype: Any, eqn: core.JaxprEqn) -> bool:
    if eqn.primitive.name not in _PRODUCTS or eqn.params["precision"] is not None:
        return False
    types = [_dtype(atom) for atom in (*eqn.invars, *eqn.outvars)]
    return all(jnp.issubdtype(t, jnp.floating) and t.itemsize > jnp.dtype(dtype).itemsize for t in types)


def _dtype(atom: Any) -> jnp.dtype:
    return atom.aval.dtype
