"""Modules in two halves: one at every client, one at the server, exchanging auxiliary variables."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxfed import checks, part, trees
from jaxfed.base import OptiModule
from jaxfed.messages import CohortInfo, Params, RoundStart
from jaxfed.part import Part


class ScaffoldState(NamedTuple):
    """A client's SCAFFOLD during a round: what it kept, ``c_i - c``, the sum of gradients so far, and option I's gradient."""

    kept: Any
    correction: Params
    total: Params
    steps: jax.Array
    control: Params


class ScaffoldKept(NamedTuple):
    """What a client keeps: its control variate, and whether the server has heard of it (0 or 1)."""

    control: Params
    known: jax.Array


class ScaffoldClient(OptiModule):
    r"""SCAFFOLD's client half: corrects each gradient by the difference of control variates.

    ===========  =======================================================================
    Init         :math:`c_i = 0`
    Receive      :math:`c`
    Step         :math:`g \leftarrow g - c_i + c`
    Send         :math:`c_i^+ - c_i`, with :math:`c_i^+` the mean of the gradients seen
    ===========  =======================================================================

    Option II's :math:`c_i - c + (x - y_i) / (K \eta)` is the mean of the gradients that the module saw, for plain SGD with a
    constant rate and the module first in line; composing it otherwise warns. Option I takes the full gradient at the broadcast
    weights instead, one more pass.

    Args:
        option: ``"II"`` or ``"I"``.

    References:
        Karimireddy et al., `SCAFFOLD: Stochastic Controlled Averaging <https://arxiv.org/abs/1910.06378>`_, 2020
    """

    name = "scaffold-client"
    aux_name = "scaffold"
    aux_reduction: ClassVar[str] = "mean"
    option: str = part.static(default="II", choices=("I", "II"))

    @property
    def carries_on(self) -> bool:
        """False: what lasts is kept by the module itself."""
        return False

    def advice(self, optimizer: Any) -> str:
        """Option II needs plain SGD with a constant rate and the module first in line."""
        plain = optimizer.parts == (self,) and optimizer.w_decay == 0.0 and not isinstance(optimizer.lrate, Part)
        if self.option == "I" or plain or checks.is_traced(optimizer.lrate):
            return ""
        return (
            "scaffold-client (option II) is exact for plain SGD with a constant learning rate, no decay, and no other module or "
            "regularizer. Drop them, or use ScaffoldClient(option='I')."
        )

    def init(self, params: Params) -> ScaffoldState:
        """No correction: outside of a round there is no server."""
        return self._begin(self.init_kept(params, None), trees.zeros_like(params), params, ())

    def init_kept(self, params: Params, key: jax.Array | None) -> ScaffoldKept:
        """A control variate of zero."""
        del key
        return ScaffoldKept(trees.zeros_like(params), jnp.zeros(()))

    def start_round(self, kept: ScaffoldKept, start: RoundStart) -> ScaffoldState:
        """Takes the server's control variate."""
        if self.option == "I" and start.full_gradient is not None:
            return self._begin(kept, start.aux, start.params, start.full_gradient(start.params))
        return self._begin(kept, start.aux, start.params, ())

    def update(self, updates: Params, state: ScaffoldState, params: Params | None = None) -> tuple[Params, ScaffoldState]:
        """Corrects a gradient and adds it to the sum."""
        del params
        total = jax.tree.map(lambda s, g: s + g.astype(s.dtype), state.total, updates)
        return trees.subtract(updates, state.correction), state._replace(total=total, steps=state.steps + 1)

    def end_round(self, state: ScaffoldState, begin: Params, end: Params) -> tuple[ScaffoldKept, dict[str, Any]]:
        """The new control variate, and its change."""
        del begin, end
        mean = trees.divide(state.total, jnp.maximum(state.steps, 1))
        seen = mean if self.option == "II" else state.control
        control = trees.select(state.steps > 0, trees.cast_like(seen, state.correction), state.kept.control)
        change = trees.subtract(control, state.kept.control)
        return ScaffoldKept(control, jnp.ones(())), {"change": change, "new": 1 - state.kept.known}

    def _begin(self, kept: ScaffoldKept, server: Params, params: Params, control: Params) -> ScaffoldState:
        total = trees.zeros_like(trees.widen(params))
        return ScaffoldState(kept, trees.subtract(kept.control, server), total, jnp.zeros((), jnp.int32), control)


class ScaffoldServerState(NamedTuple):
    """The server's control variate; the sum of the clients' and the weight of those heard of, for ``denominator="seen"``."""

    control: Params
    total: Params
    weight: jax.Array


class ScaffoldServer(OptiModule):
    r"""SCAFFOLD's server half: the weighted mean of all clients' control variates.

    ===========  ==================================================================================
    Init         :math:`c = 0`
    Send         :math:`c`
    Receive      :math:`c \leftarrow c + \sum_{i \in S} n_i (c_i^+ - c_i) / \sum_{i=1}^{N} n_i`
    Step         the pseudo-gradient as it is
    ===========  ==================================================================================

    The weights are the aggregator's own (uniform in the paper): with others the fixed point is another objective's optimum.

    Args:
        denominator: ``"population"`` divides by the weight of all N clients, as in the paper; ``"seen"`` by that of the clients
            heard of so far, as declearn does, which overshoots while few have taken part.

    References:
        Karimireddy et al., `SCAFFOLD: Stochastic Controlled Averaging <https://arxiv.org/abs/1910.06378>`_, 2020
    """

    name = "scaffold-server"
    aux_name = "scaffold"
    presets = ("paper", "declearn")
    denominator: str = part.static(default="population", choices=("population", "seen"))

    @classmethod
    def paper(cls) -> "ScaffoldServer":
        """Divides by the population."""
        return cls(denominator="population")

    @classmethod
    def declearn(cls) -> "ScaffoldServer":
        """Divides by the clients seen so far."""
        return cls(denominator="seen")

    def init(self, params: Params) -> ScaffoldServerState:
        """A control variate of zero."""
        return ScaffoldServerState(trees.zeros_like(params), trees.zeros_like(trees.widen(params)), jnp.zeros(()))

    def update(self, updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        """The pseudo-gradient as it is."""
        del params
        return updates, state

    def send(self, state: ScaffoldServerState) -> Params:
        """The control variate."""
        return state.control

    def receive(self, state: ScaffoldServerState, aux: dict[str, Any], info: CohortInfo) -> ScaffoldServerState:
        """Adds the weighted changes of the cohort."""
        total = trees.add_scaled(state.total, info.weight, aux["change"])
        weight = state.weight + info.weight * aux["new"]
        divisor = info.population_weight if self.denominator == "population" else jnp.maximum(weight, 1e-12)
        control = trees.cast_like(trees.divide(total, divisor), state.control)
        return ScaffoldServerState(control, total, weight)


class AdaAlterState(NamedTuple):
    """The accumulator at the last synchronisation, the squares summed since then, and the steps taken since."""

    synced: Params
    total: Params
    steps: jax.Array


class AdaAlterClient(OptiModule):
    r"""Local AdaAlter's client half: AdaGrad whose accumulator is shared, and used with the delay of a round.

    ===========  =========================================================================
    Receive      :math:`B^2`
    Step         :math:`g_t \leftarrow g_t / \sqrt{B^2 + t \epsilon^2}` with t from 1 in each round
    Send         :math:`\sum_t g_t^2`
    ===========  =========================================================================

    Args:
        eps: Stands in for the squares that are not yet in :math:`B^2`, above 0.

    References:
        Xie et al., `Local AdaAlter: Communication-Efficient SGD <https://arxiv.org/abs/1911.09030>`_, 2019
    """

    name = "adaalter-client"
    aux_name = "adaalter"
    aux_reduction: ClassVar[str] = "mean"
    eps: float = part.number(default=1.0, above=0)

    @property
    def carries_on(self) -> bool:
        """False: what lasts is the server's accumulator."""
        return False

    def init(self, params: Params) -> AdaAlterState:
        """An accumulator of one: outside of a round there is no server."""
        return self._begin(trees.full_like(params, 1))

    def start_round(self, kept: Any, start: RoundStart) -> AdaAlterState:
        """Takes the server's accumulator."""
        del kept
        return self._begin(start.aux)

    def update(self, updates: Params, state: AdaAlterState, params: Params | None = None) -> tuple[Params, AdaAlterState]:
        """Divides by the delayed root and accumulates the square."""
        del params
        ahead = (state.steps + 1) * self.eps**2
        scaled = jax.tree.map(lambda g, b: g / jnp.sqrt(b + trees.cast(ahead, b)), updates, state.synced)
        total = jax.tree.map(lambda s, g: s + jnp.square(g.astype(s.dtype)), state.total, updates)
        return scaled, AdaAlterState(state.synced, total, state.steps + 1)

    def end_round(self, state: AdaAlterState, begin: Params, end: Params) -> tuple[tuple, Params]:
        """Keeps nothing, sends the sum of squares."""
        del begin, end
        return (), state.total

    def _begin(self, synced: Params) -> AdaAlterState:
        return AdaAlterState(synced, trees.zeros_like(trees.widen(synced)), jnp.zeros((), jnp.int32))


class AdaAlterServer(OptiModule):
    r"""Local AdaAlter's server half: averages the clients' squared gradients.

    ===========  ==============================================================
    Init         :math:`B^2 = b_0^2`
    Send         :math:`B^2`
    Receive      :math:`B^2 \leftarrow B^2 + \mathrm{mean}_i \sum_t g_{i,t}^2`
    Step         the pseudo-gradient as it is
    ===========  ==============================================================

    Args:
        init_v: :math:`b_0^2`, above 0.

    References:
        Xie et al., `Local AdaAlter: Communication-Efficient SGD <https://arxiv.org/abs/1911.09030>`_, 2019
    """

    name = "adaalter-server"
    aux_name = "adaalter"
    init_v: float = part.number(default=1.0, above=0)

    def init(self, params: Params) -> Params:
        """The first accumulator."""
        return trees.full_like(params, self.init_v)

    def update(self, updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        """The pseudo-gradient as it is."""
        del params
        return updates, state

    def send(self, state: Params) -> Params:
        """The accumulator."""
        return state

    def receive(self, state: Params, aux: Params, info: CohortInfo) -> Params:
        """Adds the cohort's mean of squares."""
        del info
        return jax.tree.map(lambda b, s: b + s.astype(b.dtype), state, aux)
