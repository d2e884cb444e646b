"""FedDyn's halves: a dynamic regularizer that bends each local problem until its optimum is the common one."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxfed import part, trees
from jaxfed.base import OptiModule
from jaxfed.messages import CohortInfo, Params, RoundStart


class FedDynState(NamedTuple):
    """A client's linear term and the round's anchor."""

    linear: Params
    anchor: Params


class FedDynClient(OptiModule):
    r"""FedDyn's client half: a linear and a proximal term, of which the linear one learns the client's own gradient.

    ===========  ==========================================================================
    Init         :math:`h_i = 0`
    Step         :math:`g \leftarrow g - h_i + \alpha (w - w_t)`
    Keep         :math:`h_i \leftarrow h_i - \alpha (w_{end} - w_t)`
    Send         nothing but the weights
    ===========  ==========================================================================

    Once a local problem is solved, :math:`h_i` is the gradient of the client's loss at its solution. Kept in float32 or wider.

    Args:
        alpha: The strength of both terms, above 0; the paper takes 0.1, 0.01 or 0.001.

    References:
        Acar et al., `Federated Learning Based on Dynamic Regularization <https://arxiv.org/abs/2111.04263>`_, 2021
    """

    name = "feddyn-client"
    aux_name = "feddyn"
    aux_reduction: ClassVar[str] = "mean"
    alpha: float = part.number(default=0.01, above=0)

    @property
    def carries_on(self) -> bool:
        """False: what lasts is kept by the module itself."""
        return False

    def advice(self, optimizer: Any) -> str:
        """It completes the gradient, so it belongs before whatever transforms one."""
        if optimizer.modules[0].name == self.name:
            return ""
        return f"feddyn-client completes the gradient, but {optimizer.modules[0].name!r} comes before it. Put it first."

    def init(self, params: Params) -> FedDynState:
        """No linear term, and an anchor in buffers of its own."""
        return FedDynState(self.init_kept(params, None), trees.copy(params))

    def init_kept(self, params: Params, key: jax.Array | None) -> Params:
        """A linear term of zero."""
        del key
        return trees.zeros_like(trees.widen(params))

    def start_round(self, kept: Params, start: RoundStart) -> FedDynState:
        """The linear term that was kept, anchored at the broadcast weights."""
        return FedDynState(kept, trees.copy(start.params))

    def update(self, updates: Params, state: FedDynState, params: Params | None = None) -> tuple[Params, FedDynState]:
        """Adds both terms.

        Raises:
            ValueError: If ``params`` is missing.
        """
        if params is None:
            raise ValueError("feddyn-client needs the weights: call update(updates, state, params) with params.")
        bent = trees.subtract(trees.widen(updates), state.linear)
        bent = trees.add_scaled(bent, self.alpha, trees.widen(trees.subtract(params, state.anchor)))
        return trees.cast_like(bent, updates), state

    def end_round(self, state: FedDynState, begin: Params, end: Params) -> tuple[Params, tuple]:
        """The linear term after the round's way."""
        del begin
        way = trees.widen(trees.subtract(end, state.anchor))
        return trees.add_scaled(state.linear, -self.alpha, way), ()


class FedDynServerState(NamedTuple):
    """The correction of the mean, and the cohort's share of the population's weight."""

    correction: Params
    share: jax.Array


class FedDynServer(OptiModule):
    r"""FedDyn's server half: corrects the mean of the clients' weights by the mean of their linear terms.

    ===========  ====================================================================================================
    Init         :math:`s = 0`
    Step         :math:`s \leftarrow s + \frac{\sum_{i \in S} n_i}{\sum_{i=1}^{N} n_i} u, \quad u \leftarrow u + s`
    ===========  ====================================================================================================

    where :math:`u` is the pseudo-gradient, the mean of :math:`w_t - w_i`. These are the paper's :math:`h \leftarrow h -
    \frac{\alpha}{N} \sum_S (w_i - w_t)` and :math:`w \leftarrow \mathrm{mean}_S w_i - h / \alpha` with :math:`s = h / \alpha`,
    so that the strength cancels. The weights are the aggregator's own (uniform in the paper). The server's learning rate is 1.

    References:
        Acar et al., `Federated Learning Based on Dynamic Regularization <https://arxiv.org/abs/2111.04263>`_, 2021
    """

    name = "feddyn-server"
    aux_name = "feddyn"

    def init(self, params: Params) -> FedDynServerState:
        """No correction."""
        return FedDynServerState(trees.zeros_like(trees.widen(params)), jnp.zeros(()))

    def update(self, updates: Params, state: FedDynServerState, params: Params | None = None) -> tuple[Params, FedDynServerState]:
        """Moves the correction and adds it to the pseudo-gradient."""
        del params
        mean = trees.widen(updates)
        correction = trees.add_scaled(state.correction, state.share, mean)
        corrected = jax.tree.map(jnp.add, mean, correction)
        return trees.cast_like(corrected, updates), state._replace(correction=correction)

    def receive(self, state: FedDynServerState, aux: Any, info: CohortInfo) -> FedDynServerState:
        """Notes how much of the population took part."""
        del aux
        share = jnp.asarray(info.weight, state.share.dtype) / info.population_weight
        return state._replace(share=share.astype(state.share.dtype))
