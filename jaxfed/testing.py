"""Laws that every part keeps, as functions that a plug-in's tests call: ``check_module(MyModule())``.

A broken law raises AssertionError with a sentence that names it.
"""

import json
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from jaxfed import part, trees
from jaxfed.base import Aggregator, OptiModule
from jaxfed.messages import Params, RoundStart
from jaxfed.optimizer.rates import Schedule
from jaxfed.part import Part

_STEPS = 3
_CLIENTS = 3


def check_module(module: OptiModule, *, params: Params | None = None, aux: Any = None, rtol: float = 1e-5) -> None:
    """Checks that an OptiModule or a Regularizer keeps the laws of a part.

    * A config, through JSON, builds an equal one.
    * Updates keep the tree, the shapes and the dtypes, the state its structure; in float32, bfloat16 and float16.
    * Compiled, scanned and ``vmap``ped over clients it gives what a plain loop gives.
    * A second step, and another value of a number hyper-parameter, compile nothing anew.
    * Zero gradients and a tree of one scalar give finite updates.
    * It works inside ``optax.chain``.
    * What a client keeps has the same structure before and after a round.

    Args:
        module: The part, with hyper-parameters of your choice; best not the defaults.
        params: Weights to try it on; None takes a small tree.
        aux: What the server sends it, if it exchanges an auxiliary variable, or a function ``params -> aux``; None takes ones
            like ``params``.
        rtol: The relative tolerance between two ways of running.

    Raises:
        AssertionError: At the first broken law.

    Example:
        >>> from jaxfed import Momentum
        >>> check_module(Momentum(0.8, nesterov=True))
    """
    params = _example_params() if params is None else params
    check_config(module)
    check_pytree(module)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        _keeps_types(module, jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params), aux)
    _runs_alike(module, params, aux, rtol)
    _traces_once(module, params, aux)
    _survives_zeros(module, params, aux)
    _keeps_kept(module, params, aux)
    if not module.aux_name:
        _chains(module, params)


def check_schedule(schedule: Schedule, *, rtol: float = 1e-5) -> None:
    """Checks that a schedule of learning rates keeps the laws of a part.

    A config builds an equal one; rates are finite scalars of at least 0; traced steps and rounds give the rates of plain numbers.

    Example:
        >>> from jaxfed.optimizer.schedules import ExponentialDecay
        >>> check_schedule(ExponentialDecay(0.1, rate=0.9))
    """
    check_config(schedule)
    check_pytree(schedule)
    times = [(step, round) for round in range(4) for step in (0, 1, 7)]
    plain = jnp.stack([jnp.asarray(schedule(step, round), float) for step, round in times])
    traced = jax.jit(jax.vmap(lambda time: jnp.asarray(schedule(*time), float)))(jnp.array(times))
    _law(plain.ndim == 1, "A schedule must give one number.")
    _law(bool(jnp.isfinite(plain).all() and (plain >= 0).all()), f"Rates must be finite and at least 0, got {plain}.")
    _alike(plain, traced, rtol, "A traced (step, round) must give the rate of a plain one.")


def check_aggregator(aggregator: Aggregator, *, params: Params | None = None, rtol: float = 1e-5) -> None:
    """Checks that an aggregator keeps the laws of a part.

    A config builds an equal one; the order of clients and compilation do not matter; dtypes are kept; zero updates give zero.

    Example:
        >>> from jaxfed import Mean
        >>> check_aggregator(Mean("uniform"))
    """
    check_config(aggregator)
    check_pytree(aggregator)
    params = _example_params() if params is None else params
    updates, weights = _per_client(params), jnp.array([1.0, 2.0, 5.0])
    once = aggregator.aggregate(updates, weights)
    chex.assert_trees_all_equal_shapes_and_dtypes(once, params)
    order = jnp.array([2, 0, 1])
    turned = aggregator.aggregate(jax.tree.map(lambda x: x[order], updates), weights[order])
    _alike(once, turned, rtol, "The order of clients must not matter.")
    _alike(once, jax.jit(aggregator.aggregate)(updates, weights), rtol, "Compiled and plain must agree.")
    none = aggregator.aggregate(trees.zeros_like(updates), weights)
    _alike(none, trees.zeros_like(params), rtol, "Zero updates must give zero.")


def check_config(value: Part) -> None:
    """Checks that a registered Part survives JSON without loss."""
    again = part.build(value.kind, json.loads(json.dumps(part.spec(value))))
    _law(again == value, f"A config must build an equal part, got {again} from {value}.")


def check_pytree(value: Part) -> None:
    """Checks that a Part survives flattening, with any leaves, and that its numbers are leaves."""
    leaves, tree = jax.tree.flatten(value)
    _law(jax.tree.unflatten(tree, leaves) == value, "Unflattening must give an equal part.")
    jax.tree.unflatten(tree, [object() for _ in leaves])
    numbers = [x for x in vars(value).values() if isinstance(x, float)]
    _law(all(any(n is leaf for leaf in leaves) for n in numbers), "Number hyper-parameters must be leaves, not static.")


def _example_params() -> Params:
    keys = jax.random.split(jax.random.key(0), 2)
    return {"bias": jax.random.normal(keys[0], (3,)), "dense": {"kernel": jax.random.normal(keys[1], (2, 3))}}


def _per_client(tree: Params) -> Params:
    """Three different trees, stacked."""
    factors = jnp.array([1.0, -0.5, 2.0])
    return jax.tree.map(lambda x: jnp.stack([(x + i) * f for i, f in enumerate(factors)]).astype(x.dtype), tree)


def _begin(module: OptiModule, params: Params, aux: Any, key: jax.Array) -> Any:
    if module.aux_name:
        aux = aux(params) if callable(aux) else trees.full_like(params, 1) if aux is None else aux
    start = RoundStart(params, aux=aux, key=key, full_gradient=lambda p: p)
    return module.start_round(module.init_kept(params, key), start)


def _loop(module: OptiModule, params: Params, state: Any, gradients: Params) -> tuple[Params, Any]:
    outputs = []
    for step in range(_STEPS):
        updates, state = module.update(jax.tree.map(lambda g, step=step: g[step], gradients), state, params)
        outputs.append(updates)
    return jax.tree.map(lambda *x: jnp.stack(x), *outputs), state


def _scan(module: OptiModule, params: Params, state: Any, gradients: Params) -> tuple[Params, Any]:
    def step(state: Any, gradient: Params) -> tuple[Any, Params]:
        updates, state = module.update(gradient, state, params)
        return state, updates

    state, outputs = jax.lax.scan(step, state, gradients)
    return outputs, state


def _keeps_types(module: OptiModule, params: Params, aux: Any) -> None:
    aux = trees.cast_like(aux, trees.full_like(params, 1)) if module.aux_name and not (aux is None or callable(aux)) else aux
    state = _begin(module, params, aux, jax.random.key(1))
    updates, after = module.update(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    _law(jax.tree.structure(after) == jax.tree.structure(state), "The state must keep its structure from step to step.")
    same = jax.tree.map(lambda a, b: jnp.shape(a) == jnp.shape(b) and jnp.result_type(a) == jnp.result_type(b), state, after)
    _law(all(jax.tree.leaves(same)), f"The state must keep shapes and dtypes: {jax.tree.leaves(same)}.")


def _runs_alike(module: OptiModule, params: Params, aux: Any, rtol: float) -> None:
    gradients = _per_client(params)
    state = _begin(module, params, aux, jax.random.key(1))
    plain = _loop(module, params, state, gradients)
    _alike(plain, jax.jit(_loop)(module, params, state, gradients), rtol, "Compiled and plain steps must agree.")
    _alike(plain, _scan(module, params, state, gradients), rtol, "Scanned and plain steps must agree.")
    keys, many = jax.random.split(jax.random.key(2), _CLIENTS), _per_client(gradients)

    def client(key: jax.Array, gradients: Params) -> Params:
        return _loop(module, params, _begin(module, params, aux, key), gradients)[0]

    apart = [client(keys[i], jax.tree.map(lambda x, i=i: x[i], many)) for i in range(_CLIENTS)]
    side_by_side = jax.vmap(client)(keys, many)
    _alike(jax.tree.map(lambda *x: jnp.stack(x), *apart), side_by_side, rtol, "Clients under vmap must agree with a loop.")


def _traces_once(module: OptiModule, params: Params, aux: Any) -> None:
    traces = 0

    def update(module: OptiModule, state: Any) -> Any:
        nonlocal traces
        traces += 1
        return module.update(params, state, params)[1]

    step = jax.jit(update)
    state = step(module, _begin(module, params, aux, jax.random.key(1)))
    step(jax.tree.map(lambda x: x * 0.5 if isinstance(x, float) else x, module), state)
    _law(traces == 1, f"Another value of a number hyper-parameter must not compile anew; traced {traces} times.")


def _survives_zeros(module: OptiModule, params: Params, aux: Any) -> None:
    for tree in (trees.zeros_like(params), jnp.zeros(())):
        own = aux if callable(aux) or jax.tree.structure(tree) == jax.tree.structure(params) else None
        updates, _ = module.update(tree, _begin(module, tree, own, jax.random.key(1)), tree)
        _law(bool(trees.all_finite(updates)), "A zero gradient must give a finite update.")


def _keeps_kept(module: OptiModule, params: Params, aux: Any) -> None:
    before = module.init_kept(params, jax.random.key(1))
    state = module.update(params, _begin(module, params, aux, jax.random.key(1)), params)[1]
    kept, _ = module.end_round(state, params, params)
    _law(jax.tree.structure(kept) == jax.tree.structure(before), "What a client keeps must keep its structure.")
    chex.assert_trees_all_equal_shapes_and_dtypes(kept, before)


def _chains(module: OptiModule, params: Params) -> None:
    try:
        module.init(params)
    except ValueError:
        return  # a part that draws noise refuses to without a seed
    chain = optax.chain(module, optax.scale(1.0))  # pyright: ignore[reportArgumentType]
    updates, _ = chain.update(params, chain.init(params), params)
    alone, _ = module.update(params, module.init(params), params)
    _alike(updates, alone, 1e-6, "Inside optax.chain the updates must be the same.")


def _alike(left: Any, right: Any, rtol: float, law: str) -> None:
    is_key: Callable[[Any], bool] = lambda x: jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)  # noqa: E731
    left, right = ([x for x in jax.tree.leaves(tree) if not is_key(x)] for tree in (left, right))
    try:
        chex.assert_trees_all_close(left, right, rtol=rtol, atol=rtol)
    except AssertionError as error:
        raise AssertionError(f"{law} {error}") from None


def _law(holds: bool, law: str) -> None:
    if not holds:
        raise AssertionError(law)
