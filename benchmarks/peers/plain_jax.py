"""Plain JAX without a framework: the floor that a library is measured against. Its variants:

=======  =====================================================================================
scan     one client after the other, each a loop over its own steps: nothing is padded
vmap     all clients side by side, padded to the largest of the data set
step     a Python loop over clients and steps, one compiled call for each step
central  as many steps of the same size on one model, no clients (its loss is not comparable)
=======  =====================================================================================
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from peers import models_jax
from timing import MU, SERVER_ADAM, Clock, parser, print_line
from workloads import Workload, load, widened

Params = dict[str, jax.Array]
Pool = tuple[jax.Array, jax.Array]
Step = Callable[[Pool, Params, Params, jax.Array, jax.Array], Params]


class Plan(NamedTuple):
    """A round's work: rows of the pool and mask ``[C, K, B]``, local steps ``[C]`` and examples ``[C]``."""

    rows: np.ndarray
    mask: np.ndarray
    steps: np.ndarray
    weights: np.ndarray


class ServerAdam(NamedTuple):
    """The server's moments and its number of steps."""

    m: Params
    v: Params
    t: jax.Array


def make_step(work: Workload, algorithm: str, layers: str) -> Step:
    """``(pool, start, params, rows, mask) -> params``: one local step of SGD; ``start`` anchors FedProx."""
    losses = models_jax.example_losses(work.name, layers)

    def step(pool: Pool, start: Params, params: Params, rows: jax.Array, mask: jax.Array) -> Params:
        def loss(params: Params) -> jax.Array:
            values = losses(params, pool[0][rows], pool[1][rows])
            mean = (values * mask).sum() / jnp.maximum(mask.sum(), 1)
            if algorithm == "fedprox":
                mean += MU / 2 * sum(jnp.sum((params[key] - start[key]) ** 2) for key in params)
            return mean

        return jax.tree.map(lambda w, g: w - work.lrate * g, params, jax.grad(loss)(params))

    return step


def scan_round(step: Step, pool: Pool, params: Params, plan: Plan) -> Params:
    """One client after the other."""

    def client(total: Params, one: Plan) -> tuple[Params, None]:
        def body(k: jax.Array, trained: Params) -> Params:
            return step(pool, params, trained, one.rows[k], one.mask[k])

        trained = jax.lax.fori_loop(0, one.steps, body, params)
        return jax.tree.map(lambda t, w: t + one.weights * w, total, trained), None

    total, _ = jax.lax.scan(client, jax.tree.map(jnp.zeros_like, params), plan)
    return jax.tree.map(lambda t: t / plan.weights.sum(), total)


def vmap_round(step: Step, pool: Pool, params: Params, plan: Plan) -> Params:
    """All clients side by side; a padded step leaves the weights as they are."""

    def client(rows: jax.Array, mask: jax.Array) -> Params:
        def body(trained: Params, batch: tuple) -> tuple[Params, None]:
            moved = step(pool, params, trained, *batch)
            return jax.tree.map(lambda new, old: jnp.where(batch[1].any(), new, old), moved, trained), None

        return jax.lax.scan(body, params, (rows, mask))[0]

    trained = jax.vmap(client)(plan.rows, plan.mask)
    return jax.tree.map(lambda w: jnp.tensordot(plan.weights / plan.weights.sum(), w, 1), trained)


def central_round(step: Step, pool: Pool, params: Params, plan: Plan) -> Params:
    """The same steps on one model."""

    def client(trained: Params, one: Plan) -> tuple[Params, None]:
        def body(k: jax.Array, trained: Params) -> Params:
            return step(pool, params, trained, one.rows[k], one.mask[k])

        return jax.lax.fori_loop(0, one.steps, body, trained), None

    return jax.lax.scan(client, params, plan)[0]


def step_round(step: Step, pool: Pool, params: Params, plan: Plan) -> Params:
    """One compiled call for each step; ``step`` comes compiled."""
    total = None
    for rows, mask, steps, weight in zip(*plan):
        trained = params
        for k in range(steps):
            trained = step(pool, params, trained, rows[k], mask[k])
        share = jax.tree.map(functools.partial(jnp.multiply, weight / plan.weights.sum()), trained)
        total = share if total is None else jax.tree.map(jnp.add, total, share)
    return total


def serve(algorithm: str, params: Params, mean: Params, state: ServerAdam) -> tuple[Params, ServerAdam]:
    """The server's step from the clients' mean."""
    if algorithm != "fedadam":
        return mean, state
    beta_1, beta_2, t = SERVER_ADAM["beta_1"], SERVER_ADAM["beta_2"], state.t + 1
    moved = jax.tree.map(jnp.subtract, mean, params)
    m = jax.tree.map(lambda m, d: beta_1 * m + (1 - beta_1) * d, state.m, moved)
    v = jax.tree.map(lambda v, d: beta_2 * v + (1 - beta_2) * d * d, state.v, moved)

    def update(w: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        return w + SERVER_ADAM["lrate"] * (m / (1 - beta_1**t)) / (jnp.sqrt(v / (1 - beta_2**t)) + SERVER_ADAM["eps"])

    return jax.tree.map(update, params, m, v), ServerAdam(m, v, t)


def plans(work: Workload, rounds: int, shuffle: bool) -> Iterator[Plan]:
    """The rows of each round's local steps, on the host."""
    rng, most = np.random.default_rng(1), int(work.steps.max())
    for cohort in work.schedule[:rounds]:
        rows = np.zeros((len(cohort), most * work.batch_size), np.int32)
        mask = np.zeros(rows.shape, np.float32)
        for place, number in enumerate(cohort):
            size = work.sizes[number]
            rows[place, :size] = work.offsets[number] + (rng.permutation(size) if shuffle else np.arange(size))
            mask[place, :size] = 1
        batches = (a.reshape(len(cohort), most, work.batch_size) for a in (rows, mask))
        yield Plan(*batches, work.steps[cohort].astype(np.int32), work.sizes[cohort].astype(np.float32))


def make_round(work: Workload, algorithm: str, variant: str, layers: str) -> Callable:
    """``(pool, params, server, plan) -> (params, server)``."""
    step = make_step(work, algorithm, layers)
    if variant == "step":
        step = jax.jit(step)
    train = {"scan": scan_round, "vmap": vmap_round, "central": central_round, "step": step_round}[variant]

    def federated_round(pool: Pool, params: Params, server: ServerAdam, plan: Plan) -> tuple[Params, ServerAdam]:
        return serve(algorithm, params, train(step, pool, params, plan), server)

    return federated_round if variant == "step" else jax.jit(federated_round)


def train(
    work: Workload,
    rounds: int,
    clock: Clock,
    *,
    algorithm: str = "fedavg",
    variant: str = "scan",
    layers: str = "lax",
    shuffle: bool,
) -> Params:
    """The weights after some rounds."""
    params = jax.tree.map(jnp.asarray, work.params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    server = ServerAdam(zeros, zeros, jnp.zeros((), jnp.int32))
    # The pool is an argument: as a constant it would be compiled into the program.
    federated_round = functools.partial(make_round(work, algorithm, variant, layers), (jnp.asarray(work.x), jnp.asarray(work.y)))
    clock.begin()
    for plan in plans(work, rounds, shuffle):
        params, server = jax.block_until_ready(federated_round(params, server, plan))
        clock.tick()
    return params


def main() -> None:
    """Trains and prints the line."""
    options = parser(__doc__, ("fedavg", "fedprox", "fedadam"))
    options.add_argument("--variant", default="scan", choices=("scan", "vmap", "step", "central"))
    options.add_argument("--layers", choices=models_jax.LAYERS, help="by default what is fastest for the workload")
    options.add_argument("--float64", type=int, default=0, choices=(0, 1))
    options = options.parse_args()
    options.layers = options.layers or models_jax.FASTEST[options.workload]
    work, clock = load(options.workload), Clock()
    if options.float64:
        jax.config.update("jax_enable_x64", True)
        work = widened(work)
    how = {"algorithm": options.algorithm, "variant": options.variant, "layers": options.layers}
    params = train(work, options.rounds, clock, **how, shuffle=bool(options.shuffle))
    loss = models_jax.mean_loss(work.name, params, *work.evaluation())
    more = {
        "variant": options.variant,
        "layers": options.layers,
        "float64": bool(options.float64),
        "device": jax.devices()[0].device_kind,
    }
    print_line("plain_jax", options, work, clock, loss, ("jax", "numpy"), **more)


if __name__ == "__main__":
    main()
