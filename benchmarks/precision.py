"""What half precision changes:  ``benchmarks/.venvs/jaxfed/bin/python benchmarks/precision.py --data FOLDER``.

FedAvg on FEMNIST by writers (155 of LEAF, 62 classes, LEAF's own split of rows), 10 clients a round, one epoch in batches of 10
at a learning rate of 0.1, in three precisions:

=================  =================================================================================
float32            everything
bfloat16 products  ``gradient="half-precision"``: factors in bfloat16; sums, weights and steps in float32
bfloat16 weights   the global weights, and so the local steps, in bfloat16
=================  =================================================================================

A model, a precision and a seed are a process. Runs of one seed have the same cohorts and batches. Lines go to
``results/NAME.jsonl`` (what is there is not measured again), the table to ``results/NAME.md``.

The data are ``femnist_leaf/femnist_leaf155.npz`` with ``x`` ``[rows, 28, 28]`` bytes (255 is paper), ``y``, ``client`` and
``is_test``, in the folder that ``--data`` or the environment variable JAXFED_DATA names.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from result_lines import append_line, read_lines

HERE = Path(__file__).resolve().parent
FILE = Path("femnist_leaf", "femnist_leaf155.npz")
ROUNDS = {"softmax": 100, "lenet": 100, "emnist-cnn": 30}
PRECISIONS = ("float32", "bfloat16 products", "bfloat16 weights")
COHORT, BATCH, LRATE, CHUNK = 10, 10, 0.1, 5
Line = dict[str, Any]


def load(folder: Path) -> tuple[Any, Any]:
    """Training and test rows by writer, ink 1 and paper 0."""
    import numpy as np

    import jaxfed

    with np.load(folder / FILE) as archive:
        x, y, client, is_test = (archive[key] for key in ("x", "y", "client", "is_test"))
    arrays = {"x": 255 - x, "y": y.astype(np.int32), "is_test": is_test}
    return jaxfed.FederatedData.from_arrays(arrays, client).split_by("is_test")


def make_model(name: str, sample: Any) -> Any:
    """A reference model, or the LeNet of NIID-Bench: convolutions of 6 and 16 channels, dense layers of 120 and 84 units."""
    from flax import linen as nn

    from jaxfed.models import layers
    from jaxfed.models.adapters import from_linen
    from jaxfed.models.reference import build_model

    if name == "softmax":
        return build_model("logistic-regression", sample, classes=62)
    if name == "emnist-cnn":
        return build_model(name, sample, classes=62, dropout=(0, 0))

    class LeNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x[..., None] / 255
            for channels in (6, 16):
                convolution = nn.Conv(channels, (5, 5), padding="VALID", conv_general_dilated=layers.conv_general_dilated)
                x = layers.max_pool(nn.relu(convolution(x)), (2, 2), (2, 2))
            x = x.reshape(len(x), -1)
            for width in (120, 84):
                x = nn.relu(nn.Dense(width)(x))
            return nn.Dense(62)(x)

    return from_linen(LeNet(), sample)


def make_simulation(name: str, precision: str, train: Any) -> Any:
    """FedAvg of one model in one precision."""
    import jaxfed

    gradient = "half-precision" if precision == "bfloat16 products" else "mean"
    model = make_model(name, {key: train.arrays[key][:1] for key in ("x", "y")})
    algorithm = jaxfed.fedavg(model, lrate=LRATE, batch_size=BATCH, gradient=gradient)
    return jaxfed.Simulation(algorithm, train, COHORT, chunk=CHUNK)


def first_state(simulation: Any, precision: str, seed: int) -> Any:
    """The state before the first round; of one seed the same weights, up to rounding."""
    import jax
    import jax.numpy as jnp

    key = jax.random.key(seed)
    if precision != "bfloat16 weights":
        return simulation.init(key=key)
    start = simulation.init(key=key)
    return simulation.init(jax.tree.map(lambda w: w.astype(jnp.bfloat16), start.params), key=key, stats=start.stats)


def measure(point: Line, folder: Path) -> Line:
    """Trains one run; seconds a round are the median over compiled calls without the first, which compiles."""
    import jax
    from timing import machine, peak_rss

    train, test = load(folder)
    simulation = make_simulation(point["model"], point["precision"], train)
    state = first_state(simulation, point["precision"], point["seed"])
    seconds, last = [], time.perf_counter()
    for state, reports in simulation.chunks(state, rounds=ROUNDS[point["model"]]):  # noqa: B020
        jax.block_until_ready(state)
        seconds.append((time.perf_counter() - last) / len(reports))
        last = time.perf_counter()
    memory = peak_rss()
    found = simulation.evaluate(state, test).metrics
    return {
        **point,
        "rounds": ROUNDS[point["model"]],
        "round_s": round(statistics.median(seconds[1:]), 6),
        "fastest_s": round(min(seconds[1:]), 6),
        "rss_mb": memory,
        "accuracy": round(float(found["accuracy"]), 5),
        "loss": round(float(found["loss"]), 5),
        "machine": machine(),
        "versions": {"jax": jax.__version__},
    }


def table(lines: list[Line]) -> str:
    """Means over seeds as Markdown; times and memory as medians, beside those of float32."""
    head = ("model", "precision", "accuracy", "points from float32", "s/round", "times float32", "memory MB", "seeds")
    rows = [head, ("---", "---", *("---:",) * 6)]
    for model in ROUNDS:
        base = {line["seed"]: line for line in lines if (line["model"], line["precision"]) == (model, "float32")}
        for precision in PRECISIONS:
            own = [line for line in lines if (line["model"], line["precision"]) == (model, precision) and line["seed"] in base]
            if own:
                rows.append((model, precision, *_cells(own, base)))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _cells(own: list[Line], base: dict[int, Line]) -> tuple[str, ...]:
    points = [100 * (line["accuracy"] - base[line["seed"]]["accuracy"]) for line in own]
    ratios = [line["round_s"] / base[line["seed"]]["round_s"] for line in own]
    return (
        f"{100 * statistics.mean(line['accuracy'] for line in own):.2f}",
        f"{statistics.mean(points):+.2f} ({min(points):+.2f} to {max(points):+.2f})",
        f"{statistics.median(line['round_s'] for line in own):.4f}",
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{statistics.median(line['rss_mb'] for line in own):.0f}",
        str(len(own)),
    )


def page(lines: list[Line], name: str) -> str:
    """The whole page."""
    machine = lines[0]["machine"]
    about = f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; jax {lines[0]['versions']['jax']}."
    rounds = ", ".join(f"{model} {count}" for model, count in ROUNDS.items())
    how = f"FedAvg on FEMNIST by writers, rounds: {rounds}. Means and medians over seeds, with their range."
    return f"# {name}\n\n{about} {how}\n\n{table(lines)}"


def main() -> None:
    """Measures what is not in the file yet."""
    options = _options()
    if options.point:
        print(json.dumps(measure(json.loads(options.point), options.data)))
        return
    path = HERE / "results" / f"{options.name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    found = read_lines(path)
    for point in points(options.models.split(","), range(options.seeds)):
        if any(point.items() <= line.items() for line in found):
            continue
        command = [sys.executable, __file__, "--data", str(options.data), "--point", json.dumps(point)]
        process = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        if process.returncode:
            sys.exit(process.stderr)
        found.append(json.loads(process.stdout.splitlines()[-1]))
        append_line(path, found[-1])
        print({key: found[-1][key] for key in (*point, "accuracy", "round_s", "rss_mb")}, flush=True)
    if found:
        path.with_suffix(".md").write_text(page(found, options.name))


def points(models: list[str], seeds: Any) -> list[Line]:
    """All runs; the precisions of a seed follow each other, so that whatever else the machine does slows them alike."""
    return [{"model": m, "seed": s, "precision": p} for m in models for s in seeds for p in PRECISIONS]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("JAXFED_DATA"), help="the folder that holds femnist_leaf")
    parser.add_argument("--models", default=",".join(ROUNDS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--name", default="precision")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.data is None or not (options.data / FILE).exists():
        parser.error(f"expected {FILE} in the folder of --data or JAXFED_DATA, looked in {options.data}")
    options.data = options.data.resolve()
    return options


if __name__ == "__main__":
    main()
