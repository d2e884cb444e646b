"""drjax 0.2.1: FedAvg by hand on its map and reduce.

The cohort runs side by side, padded to a power of two of steps above its largest client. Client data, sampling, batching and
algorithms are not its business.
"""

from collections.abc import Callable, Iterator

import drjax
import jax
import jax.numpy as jnp
import numpy as np
from peers import models_jax
from timing import Clock, parser, print_line
from workloads import Workload, load


def make_round(work: Workload, layers: str) -> Callable:
    """``(params, x, y, mask, weights) -> params`` with leading axes ``[C, steps, B]``."""
    losses = models_jax.example_losses(work.name, layers)

    def step(params: dict, batch: tuple) -> tuple[dict, None]:
        x, y, mask = batch
        real = mask.sum()
        gradient = jax.grad(lambda params: (losses(params, x, y) * mask).sum() / jnp.maximum(real, 1))(params)
        return jax.tree.map(lambda w, g: w - work.lrate * g * (real > 0), params, gradient), None

    def train(params: dict, x: jax.Array, y: jax.Array, mask: jax.Array) -> dict:
        return jax.lax.scan(step, params, (x, y, mask))[0]

    @jax.jit
    @drjax.program(placements={"clients": work.schedule.shape[1]})
    def federated_round(params: dict, x: jax.Array, y: jax.Array, mask: jax.Array, weights: jax.Array) -> dict:
        trained = drjax.map_fn(train, (drjax.broadcast(params), x, y, mask))
        # The weights must have the structure of what is averaged.
        return drjax.reduce_weighted_mean(trained, jax.tree.map(lambda _: weights, params))

    return federated_round


def padded_cohorts(work: Workload, rounds: int, shuffle: bool) -> Iterator[tuple[np.ndarray, ...]]:
    """``x, y, mask, weights`` of each round; the number of steps is a power of two, so that few programs are compiled."""
    rng = np.random.default_rng(1)
    for cohort in work.schedule[:rounds]:
        steps = 1 << int(work.steps[cohort].max() - 1).bit_length()
        rows = (len(cohort), steps * work.batch_size)
        x, y = (np.zeros(rows + a.shape[1:], a.dtype) for a in (work.x, work.y))
        mask = np.zeros(rows, np.float32)
        for place, number in enumerate(cohort):
            own_x, own_y = work.client(number)
            order = rng.permutation(len(own_x)) if shuffle else slice(None)
            x[place, : len(own_x)], y[place, : len(own_x)], mask[place, : len(own_x)] = own_x[order], own_y[order], 1
        batches = (a.reshape(len(cohort), steps, work.batch_size, *a.shape[2:]) for a in (x, y, mask))
        yield *batches, work.sizes[cohort].astype(np.float32)


def main() -> None:
    """Trains and prints the line."""
    options = parser(__doc__, ("fedavg",))
    options.add_argument("--layers", choices=models_jax.LAYERS, help="by default what is fastest for the workload")
    options = options.parse_args()
    options.layers = options.layers or models_jax.FASTEST[options.workload]
    work, clock = load(options.workload), Clock()
    federated_round, params = make_round(work, options.layers), jax.tree.map(jnp.asarray, work.params)
    clock.begin()
    for cohort in padded_cohorts(work, options.rounds, bool(options.shuffle)):
        params = jax.block_until_ready(federated_round(params, *cohort))
        clock.tick()
    loss = models_jax.mean_loss(work.name, params, *work.evaluation())
    print_line("drjax", options, work, clock, loss, ("drjax", "jax", "numpy"), layers=options.layers)


if __name__ == "__main__":
    main()
