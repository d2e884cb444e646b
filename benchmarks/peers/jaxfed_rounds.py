"""jaxfed itself: the schedule is a selector, the models are its own layers, each timed round is a compiled call.

After the timed rounds, whole calls of ``--chunk`` rounds are timed too: what a run costs that does not ask after every round.
"""

import argparse
import inspect
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import MU, SERVER_ADAM, Clock, parser, peak_rss, print_line
from workloads import Workload, load, widened

import jaxfed
from jaxfed import part
from jaxfed.base import Selector
from jaxfed.messages import Cohort
from jaxfed.models import layers, recurrent

LAYOUT = ("NHWC", "HWIO", "NHWC")


class Schedule(Selector, register=False):
    """The clients of each round from a table ``[R, C]``; it begins anew when the table ends."""

    name = "schedule"
    table: Any = part.field(lambda where, value: jnp.asarray(value, jnp.int32))

    def cohort_size(self, population: int) -> int:
        """``C``."""
        return self.table.shape[1]

    def select(self, state: Any, key: jax.Array, round: jax.Array, population: int) -> Cohort:
        """The round's row."""
        ids = self.table[round % self.table.shape[0]]
        return Cohort(ids, jnp.ones(ids.shape, bool), jnp.ones(ids.shape))


def logistic(params: dict, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """W1: logits ``[B, 10]``."""
    del mask
    return x @ params["w"] + params["b"]


def cnn(params: dict, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """W2: logits ``[B, 62]``."""
    product = layers.conv_general_dilated(x, params["c1"], (1, 1), "VALID", dimension_numbers=LAYOUT, mask=mask)
    x = jax.nn.relu(product + params["c1b"])
    x = layers.conv_relu_max_pool(x, params["c2"], params["c2b"], (2, 2), mask=mask).reshape(len(x), -1)
    x = jax.nn.relu(x @ params["d1"] + params["d1b"])
    return x @ params["d2"] + params["d2b"]


def letters(params: dict, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """W3: logits ``[B, 80, 90]``, from weights as :func:`own_layout` has them."""
    del mask
    h = params["emb"][x].swapaxes(0, 1)
    for layer in ("l0", "l1"):
        inputs, weights, bias, more = (list(params[f"{layer}{name}"]) for name in ("wi", "wh", "bi", "bh"))
        zeros = jnp.zeros((len(x), weights[0].shape[0]), h.dtype)
        _, h = recurrent.lstm(h, recurrent.Kernels(inputs, weights, list(map(jnp.add, bias, more))), (zeros, zeros))
    return (h @ params["d"] + params["db"]).swapaxes(0, 1)


def own_layout(params: dict) -> dict:
    """The same weights, an LSTM's gate by gate: ``[4, d, h]`` where PyTorch has ``[4 h, d]``, ``[4, h]`` for ``[4 h]``."""

    def by_gate(name: str, x: Any) -> Any:
        if name not in _RECURRENT:
            return x
        gates = x.reshape(4, -1, *x.shape[1:])
        return gates.swapaxes(1, 2) if x.ndim == 2 else gates

    return {name: by_gate(name, x) for name, x in params.items()}


_RECURRENT = {layer + kind for layer in ("l0", "l1") for kind in ("wi", "wh", "bi", "bh")}
MODELS = {"W1": logistic, "W2": cnn, "W3": letters}


def make_loss(workload: str) -> Any:
    """A loss as jaxfed takes it: ``(params, batch, key) -> values [B]``."""
    model = MODELS[workload]

    def loss(params: dict, batch: dict, key: jax.Array | None) -> jax.Array:
        chances = jax.nn.log_softmax(model(params, batch["x"], batch.get("mask")))
        values = -jnp.take_along_axis(chances, batch["y"][..., None], axis=-1)[..., 0]
        return values.reshape(len(values), -1).mean(axis=1)

    return loss


def make_algorithm(work: Workload, name: str, shuffle: bool) -> jaxfed.Algorithm:
    """The recipe with the constants that all peers use."""
    options: dict[str, Any] = {"lrate": work.lrate, "batch_size": work.batch_size}
    if name == "fedprox":
        algorithm = jaxfed.fedprox(make_loss(work.name), mu=MU, **options)
    elif name == "fedadam":
        # Adam as PyTorch and optax have it, which the peers' servers use; jaxfed.fedadam is the paper's.
        constants = {key: SERVER_ADAM[key] for key in ("beta_1", "beta_2", "eps")}
        server = jaxfed.Optimizer(SERVER_ADAM["lrate"], modules=[jaxfed.Adam(**constants)])
        algorithm = jaxfed.fedavg(make_loss(work.name), server_lrate=server, **options)
    elif name == "scaffold":
        algorithm = jaxfed.scaffold(make_loss(work.name), weights="uniform", **options)
    else:
        algorithm = jaxfed.fedavg(make_loss(work.name), **options)
    batches = algorithm.client.batches.replace(shuffle=shuffle)  # type: ignore[attr-defined]
    return algorithm.replace(client=algorithm.client.replace(batches=batches))


def make_simulation(work: Workload, algorithm: str = "fedavg", *, shuffle: bool = True, **options: Any) -> jaxfed.Simulation:
    """The workload as a Simulation; further options are those of ``jaxfed.Simulation``, where None means its default."""
    data = jaxfed.FederatedData.from_arrays({"x": work.x, "y": work.y}, np.repeat(np.arange(len(work.sizes)), work.sizes))
    return jaxfed.Simulation(
        make_algorithm(work, algorithm, shuffle), data, selector=Schedule(work.schedule), **accepted(options)
    )


def accepted(options: dict[str, Any]) -> dict[str, Any]:
    """The options of ``jaxfed.Simulation`` that are given.

    Raises:
        SystemExit: If this version of jaxfed does not take one of them.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if unknown := given.keys() - inspect.signature(jaxfed.Simulation).parameters.keys():
        raise SystemExit(f"jaxfed.Simulation of this version takes no {', '.join(sorted(unknown))}. Leave the option out.")
    return given


def train(simulation: jaxfed.Simulation, work: Workload, rounds: int, clock: Clock) -> jaxfed.RunState:
    """The state after some rounds, each timed."""
    state = start = simulation.init(work.params, key=jax.random.key(0))
    clock.begin()
    for state, _ in simulation.chunks(start, rounds=rounds, chunk=1):
        jax.block_until_ready(state)
        clock.tick()
    return state


def time_chunks(simulation: jaxfed.Simulation, state: jaxfed.RunState, calls: int) -> list[float]:
    """Seconds a round of whole compiled calls, one number for each call."""
    seconds, last = [], time.perf_counter()
    for new, reports in simulation.chunks(state, rounds=calls * simulation.chunk):
        jax.block_until_ready(new)
        now = time.perf_counter()
        seconds.append((now - last) / len(reports))
        last = now
    return seconds


def mean_loss(work: Workload, params: dict, rows: int = 250) -> float:
    """The mean loss over the fixed rows that all peers report."""
    x, y = work.evaluation()
    values = jax.jit(make_loss(work.name))
    parts = [values(params, {"x": x[i : i + rows], "y": y[i : i + rows]}, None) for i in range(0, len(x), rows)]
    return float(np.concatenate(parts).mean())


def _lanes(value: str) -> Any:
    return int(value) if value.isdigit() else value


def _options() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--lanes", type=_lanes, help="clients side by side: a number, or what jaxfed.Simulation takes")
    options.add_argument("--devices", type=int, help="over how many devices; on a CPU they are made")
    options.add_argument("--chunk", type=int, default=10, help="rounds in one compiled call, timed after the single ones")
    options.add_argument("--calls", type=int, default=0, help="how many such calls; 0 leaves them out")
    options.add_argument("--float64", type=int, default=0, choices=(0, 1))
    options.add_argument("--compilation-cache", help="a folder that keeps compiled programs from process to process")
    return options.parse_args()


def main() -> None:
    """Trains and prints the line."""
    options = _options()
    if options.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", options.compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if options.devices:
        jax.config.update("jax_num_cpu_devices", options.devices)
    work, clock = load(options.workload), Clock()
    if options.float64:
        jax.config.update("jax_enable_x64", True)
        work = widened(work)
    chosen = {"lanes": options.lanes, "devices": options.devices, "chunk": options.chunk}
    simulation = make_simulation(work, options.algorithm, shuffle=bool(options.shuffle), **chosen)
    # The container's copy lies where a CPU uses it; the loaded one is not needed any more.
    work = replace(work, params=own_layout(work.params), **simulation.data.arrays)
    state = train(simulation, work, options.rounds, clock)
    memory, loss = peak_rss(), mean_loss(work, state.params)
    chunked = [round(x, 6) for x in time_chunks(simulation, state, options.calls)]
    more = {
        "rss_mb": memory,
        "float64": bool(options.float64),
        "chunk": options.chunk,
        "chunked_round_s": float(np.median(chunked)) if chunked else None,
        "chunked_seconds": chunked,
        "lanes": simulation.lanes(state.params),
        "devices": options.devices or 1,
        "device": jax.devices()[0].device_kind,
    }
    print_line("jaxfed", options, work, clock, loss, ("jaxfed", "jax", "numpy"), **more)


if __name__ == "__main__":
    main()
