"""fedjax 0.0.17: a Python loop over clients and batches, one compiled call for each local step (its default on one device).

It fills the last batch of each client with rows of another pass, so its losses differ slightly. It has no SCAFFOLD.
"""

from typing import Any

import jax
import jax.numpy as jnp

if shim := not hasattr(jax, "tree_map"):
    # fedjax 0.0.17 calls what jax 0.6 removed; with an older jax it is slower.
    jax.tree_map = jax.tree_util.tree_map
import fedjax
from fedjax.algorithms import fed_avg, fed_prox
from peers import models_jax
from timing import MU, SERVER_ADAM, Clock, parser, print_line
from workloads import Workload, load


def make_algorithm(work: Workload, name: str, layers: str, shuffle: bool) -> Any:
    """fedjax's own algorithm on the workload's model."""
    losses = models_jax.example_losses(work.name, layers)
    model = fedjax.Model(
        init=lambda key: work.params,
        apply_for_train=lambda params, batch, key: losses(params, batch["x"], batch["y"]),
        apply_for_eval=lambda params, batch: losses(params, batch["x"], batch["y"]),
        train_loss=lambda batch, values: values,
        eval_metrics={},
    )
    batches = fedjax.ShuffleRepeatBatchHParams(batch_size=work.batch_size, num_epochs=1, skip_shuffle=not shuffle)
    client = fedjax.optimizers.sgd(work.lrate)
    adam = (SERVER_ADAM[key] for key in ("lrate", "beta_1", "beta_2", "eps"))
    server = fedjax.optimizers.adam(*adam) if name == "fedadam" else fedjax.optimizers.sgd(1.0)
    if name == "fedprox":
        return fed_prox.fed_prox(fedjax.model_per_example_loss(model), client, server, batches, MU)
    return fed_avg.federated_averaging(fedjax.model_grad(model), client, server, batches)


def main() -> None:
    """Trains and prints the line."""
    options = parser(__doc__, ("fedavg", "fedprox", "fedadam"))
    options.add_argument("--layers", default="tuned", choices=models_jax.LAYERS)
    options = options.parse_args()
    work = load(options.workload)
    data = fedjax.InMemoryFederatedData({b"%06d" % i: dict(zip("xy", work.client(i))) for i in range(len(work.sizes))})
    algorithm = make_algorithm(work, options.algorithm, options.layers, bool(options.shuffle))
    state = algorithm.init(jax.tree.map(jnp.asarray, work.params))
    key, clock = jax.random.PRNGKey(0), Clock()
    clock.begin()
    for cohort in work.schedule[: options.rounds]:
        key, *keys = jax.random.split(key, len(cohort) + 1)
        chosen = data.get_clients([b"%06d" % i for i in cohort])
        state, _ = algorithm.apply(state, [(name, rows, k) for (name, rows), k in zip(chosen, keys)])
        jax.block_until_ready(state.params)
        clock.tick()
    loss = models_jax.mean_loss(work.name, state.params, *work.evaluation())
    print_line("fedjax", options, work, clock, loss, ("fedjax", "jax", "numpy"), layers=options.layers, shim=shim)


if __name__ == "__main__":
    main()
