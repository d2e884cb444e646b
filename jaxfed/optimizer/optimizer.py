"""The Optimizer: regularizers -> modules -> learning rate -> weight decay, for clients and the server alike."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxfed import part, trees
from jaxfed.base import OptiModule, Regularizer
from jaxfed.messages import CohortInfo, Params, RoundStart
from jaxfed.optimizer.foreign import wrap_optax
from jaxfed.optimizer.rates import rate, rates


class OptimizerState(NamedTuple):
    """The steps taken, the round, and a state per regularizer and module."""

    step: jax.Array
    round: jax.Array
    regularizers: tuple
    modules: tuple


class OptimizerKept(NamedTuple):
    """What a client's Optimizer keeps: per part what it asks for and, with ``keep_state``, its last state; the steps so far."""

    kept: tuple
    last: tuple
    step: Any


class Optimizer(OptiModule, register=False):
    r"""Regularizers, modules, a learning rate and weight decay, in this order; a valid optax transformation.

    .. math:: w \leftarrow w - [\eta \, M_k(\ldots M_1(R_j(\ldots R_1(g, w)))) + \lambda w]

    The first of a list acts first. The decay is not multiplied by the learning rate, as in declearn and unlike ``optax.adamw``;
    with ``decay_mode="scaled"`` it is :math:`\eta \lambda w`.

    A client's state begins afresh every round and steps count from 0; with ``keep_state=True`` modules go on where they stopped
    when the client last took part (declearn's habit), apart from those built with ``round_reset=True``.

    Args:
        lrate: The learning rate: a number, a schedule of (step, round), an ``optax.Schedule``, or ``{label: rate}`` by leaf.
        w_decay: The weight decay, likewise.
        regularizers: Instances, names or ``(name, {hyper-parameters})``.
        modules: Likewise; any optax transformation too.
        keep_state: Whether module states last from round to round.
        decay_mode: ``"independent"`` or ``"scaled"``.

    Raises:
        ValueError: If two parts share an ``aux_name``.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> optimizer = Optimizer(0.1, modules=[("momentum", {"beta": 0.9}), optax.clip(1.0)], regularizers=["fedprox"])
        >>> weights = jnp.array([1.0, 2.0])
        >>> updates, state = optimizer.update(jnp.array([0.5, -4.0]), optimizer.init(weights), weights)
        >>> print(optax.apply_updates(weights, updates))
        [0.95 2.1 ]
    """

    name: ClassVar[str] = "optimizer"
    aliases: ClassVar[Mapping[str, str]] = {"lr": "lrate", "decay": "w_decay", "weight_decay": "w_decay"}
    lrate: Any = rate()
    w_decay: Any = rate(default=0.0)
    regularizers: tuple = part.parts("regularizer", default=())
    modules: tuple = part.parts("module", default=(), wrap=wrap_optax)
    keep_state: bool = part.static(default=False)
    decay_mode: str = part.static(default="independent", choices=("independent", "scaled"))

    def check(self) -> None:
        """Refuses two parts of one ``aux_name``, and a regularizer among the modules."""
        for module in self.modules:
            if isinstance(module, Regularizer):
                raise ValueError(f"Optimizer.modules: {module.name!r} is a regularizer; put it into regularizers=[...].")
        names = [p.aux_name for p in self.parts if p.aux_name]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"Optimizer: two parts exchange the auxiliary variable {twice[0]!r}; leave one out.")

    @property
    def parts(self) -> tuple[OptiModule, ...]:
        """Regularizers and modules in the order in which they act."""
        return (*self.regularizers, *self.modules)

    @property
    def aux_names(self) -> tuple[str, ...]:
        """The auxiliary variables that the parts exchange."""
        return tuple(p.aux_name for p in self.parts if p.aux_name)

    @property
    def aux_reductions(self) -> dict[str, Any]:
        """How each auxiliary variable is reduced over clients."""
        return {p.aux_name: p.aux_reduction for p in self.parts if p.aux_name}

    def init(self, params: Params) -> OptimizerState:
        """The state outside of any round, as plain optax has it."""
        return self._state(0, 0, tuple(p.init(params) for p in self.parts))

    def update(self, updates: Params, state: OptimizerState, params: Params | None = None) -> tuple[Params, OptimizerState]:
        """Gradients to signed updates, to be added to the weights.

        Raises:
            ValueError: If regularizers or weight decay lack the weights.
        """
        self._check_params(params)
        done = []
        for optimizer_part, part_state in zip(self.parts, (*state.regularizers, *state.modules)):
            updates, part_state = optimizer_part.update(updates, part_state, params)
            done.append(part_state)
        steps = rates(self.lrate, state.step, state.round, updates)
        updates = jax.tree.map(lambda g, lr: -trees.cast(lr, g) * g, updates, steps)
        if params is not None:
            updates = self._decay(updates, steps, state, params)
        return updates, self._state(state.step + 1, state.round, tuple(done))

    def init_kept(self, params: Params, key: jax.Array) -> OptimizerKept:
        """What the parts keep, and room for their states with ``keep_state``."""
        kept = tuple(p.init_kept(params, jax.random.fold_in(key, i)) for i, p in enumerate(self.parts))
        last = tuple(p.init(params) if self._lasts(p) else () for p in self.parts)
        return OptimizerKept(kept, last, jnp.zeros((), jnp.int32) if self.keep_state else ())

    def start_round(self, kept: OptimizerKept, start: RoundStart) -> OptimizerState:
        """Each part's state for the round, from what it kept and its own auxiliary variable and key."""
        states = tuple(
            last if self._lasts(p) else p.start_round(k, self._share(start, i))
            for i, (p, k, last) in enumerate(zip(self.parts, kept.kept, kept.last))
        )
        return self._state(kept.step if self.keep_state else 0, start.round, states)

    def end_round(self, state: OptimizerState, begin: Params, end: Params) -> tuple[OptimizerKept, dict[str, Any]]:
        """What is kept, and the auxiliary variables by name."""
        states = (*state.regularizers, *state.modules)
        ended = [p.end_round(s, begin, end) for p, s in zip(self.parts, states)]
        last = tuple(s if self._lasts(p) else () for p, s in zip(self.parts, states))
        aux = {p.aux_name: aux for p, (_, aux) in zip(self.parts, ended) if p.aux_name}
        return OptimizerKept(tuple(kept for kept, _ in ended), last, state.step if self.keep_state else ()), aux

    def start_server(self, params: Params, key: jax.Array) -> OptimizerState:
        """The server's state before the first round; it lives as long as the run."""
        start = RoundStart(params, round=0, key=key)
        kept = self.init_kept(params, key)
        states = tuple(p.start_round(k, self._share(start, i)) for i, (p, k) in enumerate(zip(self.parts, kept.kept)))
        return self._state(0, 0, states)

    def at_round(self, state: OptimizerState, params: Params, round: jax.Array) -> OptimizerState:
        """The server's state at a new round: schedules see the round, regularizers are anchored anew."""
        return state._replace(round=jnp.asarray(round, jnp.int32), regularizers=tuple(r.init(params) for r in self.regularizers))

    def send(self, state: OptimizerState) -> dict[str, Any]:
        """Server: the auxiliary variables by name."""
        return {m.aux_name: m.send(s) for m, s in zip(self.modules, state.modules) if m.aux_name}

    def receive(self, state: OptimizerState, aux: dict[str, Any], info: CohortInfo) -> OptimizerState:
        """Server: hands each module its own reduced auxiliary variable."""
        pairs = zip(self.modules, state.modules)
        return state._replace(modules=tuple(m.receive(s, aux[m.aux_name], info) if m.aux_name else s for m, s in pairs))

    def _share(self, start: RoundStart, position: int) -> RoundStart:
        """A part sees its own auxiliary variable only, and its key differs from its neighbours'."""
        name = self.parts[position].aux_name
        aux = start.aux[name] if name and start.aux else ()
        key = None if start.key is None else jax.random.fold_in(start.key, position)
        return start._replace(aux=aux, key=key)

    def _lasts(self, optimizer_part: OptiModule) -> bool:
        return self.keep_state and optimizer_part.carries_on

    def _state(self, step: Any, round: Any, states: tuple) -> OptimizerState:
        split = len(self.regularizers)
        return OptimizerState(jnp.asarray(step, jnp.int32), jnp.asarray(round, jnp.int32), states[:split], states[split:])

    def _decay(self, updates: Params, steps: Params, state: OptimizerState, params: Params) -> Params:
        decays = rates(self.w_decay, state.step, state.round, params)
        if self.decay_mode == "scaled":
            decays = jax.tree.map(jnp.multiply, steps, decays)
        return jax.tree.map(lambda u, wd, w: u - trees.cast(wd, u) * w, updates, decays, params)

    def _check_params(self, params: Params | None) -> None:
        no_decay = isinstance(self.w_decay, float) and self.w_decay == 0
        if params is None and (self.regularizers or not no_decay):
            raise ValueError("Optimizer.update needs params for its regularizers and weight decay: update(grads, state, params).")


def as_optimizer(where: str, value: Any) -> Optimizer:
    """An Optimizer as it is, from its options in a dict, or plain SGD from a learning rate."""
    if isinstance(value, Optimizer):
        return value
    if isinstance(value, Mapping) and "lrate" in value:
        return Optimizer.from_config(value)
    try:
        return Optimizer(lrate=value)
    except TypeError as error:
        raise TypeError(f"{where}: expected an Optimizer or a learning rate. {error}") from None


def list_optim_modules() -> dict[str, type]:
    """The OptiModules by name, third-party ones included.

    >>> "adam" in list_optim_modules()
    True
    """
    return part.registered("module")


def list_optim_regularizers() -> dict[str, type]:
    """The Regularizers by name, third-party ones included.

    >>> sorted(list_optim_regularizers())
    ['fedprox', 'lasso', 'ridge']
    """
    return part.registered("regularizer")


def list_rate_schedulers() -> dict[str, type]:
    """The schedules of learning rates by name, third-party ones included.

    >>> "cosine-annealing" in list_rate_schedulers()
    True
    """
    return part.registered("schedule")
