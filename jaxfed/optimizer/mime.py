"""Mime's halves: the server keeps the state of an optimizer, and every local step applies it without changing it."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxfed import part, trees
from jaxfed.base import OptiModule
from jaxfed.messages import CohortInfo, Params, RoundStart
from jaxfed.optimizer.momentum import EWMA


class MimeState(NamedTuple):
    """The server's optimizer, its state, and the full gradient at the broadcast weights."""

    base: OptiModule
    state: Any
    gradient: Params


class MimeClient(OptiModule):
    r"""Mime's client half: each local step is the one that the server's optimizer would take from its present state.

    ===========  ==========================================================================
    Receive      the optimizer :math:`(U, V)` and its state :math:`s`
    Step         :math:`g \leftarrow U(g, s)`
    Send         :math:`\nabla f_i(w_t)`, or the cohort's mean of it where a survey found it
    ===========  ==========================================================================

    By itself this is MimeLite; with the gradient rule ``svrg`` and the survey ``full-gradient`` it is Mime.

    References:
        Karimireddy et al., `Breaking the centralized barrier for cross-device federated learning
        <https://arxiv.org/abs/2008.03606>`_, 2021
    """

    name = "mime-client"
    aux_name = "mime"
    aux_reduction: ClassVar[str] = "mean"

    @property
    def carries_on(self) -> bool:
        """False: what lasts is the server's."""
        return False

    def advice(self, optimizer: Any) -> str:
        """It is the whole of an optimizer."""
        if optimizer.modules == (self,):
            return ""
        return "mime-client applies the server's optimizer to gradients; another module beside it changes what that means."

    def init(self, params: Params) -> MimeState:
        """Plain SGD: outside of a round there is no server."""
        base = EWMA(0.0)
        return MimeState(base, base.init(params), trees.zeros_like(params))

    def start_round(self, kept: Any, start: RoundStart) -> MimeState:
        """Takes the server's optimizer, and the full gradient unless a survey has it."""
        del kept
        base, state = start.aux
        surveyed = jax.tree.structure(start.survey) == jax.tree.structure(start.params)
        if not surveyed and start.full_gradient is None:
            raise ValueError("mime-client needs the full gradient: RoundStart(..., full_gradient=...).")
        return MimeState(base, state, start.survey if surveyed else start.full_gradient(start.params))  # type: ignore[misc]

    def update(self, updates: Params, state: MimeState, params: Params | None = None) -> tuple[Params, MimeState]:
        """One step from the server's state, which stays."""
        return state.base.update(updates, state.state, params)[0], state

    def end_round(self, state: MimeState, begin: Params, end: Params) -> tuple[tuple, Params]:
        """Keeps nothing, sends the full gradient."""
        del begin, end
        return (), state.gradient


class MimeServer(OptiModule):
    r"""Mime's server half: moves an optimizer's state by the cohort's mean gradient at the broadcast weights.

    ===========  ==============================================================================
    Send         the optimizer :math:`(U, V)` and its state :math:`s`
    Receive      :math:`s \leftarrow V(\mathrm{mean}_{i \in S} \nabla f_i(w_t), s)`
    Step         the pseudo-gradient as it is
    ===========  ==============================================================================

    A module's ``update(g, s)`` is ``(U(g, s), V(g, s))``. The paper's SGD with momentum is ``ewma``, its Adam ``mime-adam``; with
    ``adam`` the square of the gradient in hand enters the step, as in FedJAX.

    Args:
        base: The optimizer: a module that needs no weights and exchanges nothing.

    Raises:
        ValueError: If ``base`` exchanges an auxiliary variable itself.

    References:
        Karimireddy et al., `Breaking the centralized barrier for cross-device federated learning
        <https://arxiv.org/abs/2008.03606>`_, 2021
    """

    name = "mime-server"
    aux_name = "mime"
    base: OptiModule = part.part("module", default=EWMA(0.9))

    def check(self) -> None:
        """Refuses a base that is half of a pair."""
        if self.base.aux_name:
            raise ValueError(f"MimeServer.base: expected a module that exchanges nothing, got {self.base.name!r}.")

    def init(self, params: Params) -> Any:
        """The optimizer's first state."""
        return self.base.init(params)

    def update(self, updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        """The pseudo-gradient as it is."""
        del params
        return updates, state

    def send(self, state: Any) -> tuple[OptiModule, Any]:
        """The optimizer and its state."""
        return self.base, state

    def receive(self, state: Any, aux: Params, info: CohortInfo) -> Any:
        """The state after the mean gradient."""
        del info
        return trees.cast_like(self.base.update(aux, state)[1], state)


class MimeAdamState(NamedTuple):
    """The first and the second moment."""

    m: Params
    v: Params


class MimeAdam(OptiModule):
    r"""Adam whose step divides by the second moment of the steps before: Mime's. No bias correction.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad g' = \frac{m}{\sqrt{v} + \epsilon}, \qquad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad g \leftarrow g'

    Args:
        beta_1: How much of the past gradients is kept, in [0, 1).
        beta_2: How much of the past squares is kept, in [0, 1).
        eps: Added to the root.
        init_v: Starting value of the second moment; the first round divides by its root alone.

    Example:
        >>> module = MimeAdam(beta_1=0.0, beta_2=0.0, eps=0.0)
        >>> first, state = module.update(jnp.array([3.0]), module.init(jnp.zeros(1)))
        >>> print(first, module.update(jnp.array([6.0]), state)[0])
        [3.] [2.]

    References:
        Karimireddy et al., `Breaking the centralized barrier for cross-device federated learning
        <https://arxiv.org/abs/2008.03606>`_, 2021
    """

    name = "mime-adam"
    beta_1: float = part.number(default=0.9, at_least=0, below=1)
    beta_2: float = part.number(default=0.99, at_least=0, below=1)
    eps: float = part.number(default=1e-3, at_least=0)
    init_v: float = part.number(default=1.0, above=0)

    def init(self, params: Params) -> MimeAdamState:
        """No momentum, and ``init_v``."""
        wide = trees.widen(params)
        return MimeAdamState(trees.zeros_like(wide), trees.full_like(wide, self.init_v))

    def update(self, updates: Params, state: MimeAdamState, params: Params | None = None) -> tuple[Params, MimeAdamState]:
        """Divides the new first moment by the root of the old second one."""
        del params
        gradients = trees.widen(updates)
        m = trees.average(self.beta_1, state.m, gradients)
        scaled = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + trees.cast(self.eps, v)), m, state.v)
        return trees.cast_like(scaled, updates), MimeAdamState(m, trees.average(self.beta_2, state.v, trees.square(gradients)))
