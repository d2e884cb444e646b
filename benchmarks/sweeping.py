"""What a sweep saves:  ``benchmarks/.venvs/jaxfed/bin/python benchmarks/sweeping.py [--repeats 5] [--rounds 20]``.

16 settings of W1 (FedAvg, 100 of 1000 clients drawn anew each round) as one ``jaxfed.sweep``, and as 16 simulations one after
another in one process, which share their compiled program:

======  =============================================
grid    4 learning rates, 4 seeds
lrates  16 learning rates of one seed: one cohort, one order of rows
seeds   16 seeds of one learning rate
======  =============================================

A repeat is a process for each kind, which does both twice, in turn, beginning with the other one in every other repeat: cold,
when programs are compiled, and warm. Lines go to ``results/NAME.jsonl`` (what is there is not measured again), the table to
``results/NAME.md``. A ratio is the sweep's seconds over those of the runs in the same process; its median and range are given.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from result_lines import append_line, read_lines

HERE = Path(__file__).resolve().parent
KINDS = {"grid": (4, 4), "lrates": (16, 1), "seeds": (1, 16)}
COHORT, LRATE = 100, 0.01
Line = dict[str, Any]


def axes(kind: str) -> tuple[list[float], list[int]]:
    """Learning rates and seeds.

    >>> axes("seeds")[0], axes("lrates")[1], len(axes("grid")[0])
    ([0.01], [0], 4)
    """
    rates, seeds = KINDS[kind]
    return [round(LRATE * (1 + i / 4), 6) for i in range(rates)], list(range(seeds))


def ways(work: Any, kind: str, rounds: int) -> dict[str, Callable[[], dict[tuple, Any]]]:
    """The two ways to the final weights by (learning rate, seed)."""
    import jax
    import numpy as np
    from peers.jaxfed_rounds import make_loss

    import jaxfed

    data = jaxfed.FederatedData({"x": work.x, "y": work.y}, work.offsets, np.arange(len(work.sizes)))
    loss, (rates, seeds) = make_loss("W1"), axes(kind)
    settings, cohort = list(itertools.product(rates, seeds)), min(COHORT, len(work.sizes))

    def simulation(rate: float) -> Any:
        return jaxfed.Simulation(jaxfed.fedavg(loss, lrate=rate, batch_size=work.batch_size), data, cohort)

    def one_by_one() -> dict[tuple, Any]:
        found = {}
        for rate, seed in settings:
            own = simulation(rate)
            state, _ = own.run(own.init(work.params, key=jax.random.key(seed)), rounds=rounds)
            found[rate, seed] = jax.device_get(state.params)
        return found

    def side_by_side() -> dict[tuple, Any]:
        over = {"client.lrate": rates, "seed": seeds}
        found = jaxfed.sweep(simulation(rates[0]), over, rounds=rounds, params=work.params)
        return dict(zip(settings, (outcome.params for outcome in found.outcomes)))

    return {"sweep": side_by_side, "runs": one_by_one}


def measure(kind: str, rounds: int, repeat: int) -> Line:
    """Both ways, cold and warm, and how far their weights are apart."""
    import jax
    import numpy as np
    from timing import machine, peak_rss
    from workloads import load

    both = ways(load("W1"), kind, rounds)
    order = list(both)[:: -1 if repeat % 2 else 1]
    seconds, found = {}, {}
    for state in ("cold", "warm"):
        for name in order:
            began = time.perf_counter()
            found[name] = both[name]()
            seconds[f"{name}_{state}_s"] = round(time.perf_counter() - began, 4)
    apart = max(
        float(np.abs(a - b).max())
        for setting in found["runs"]
        for a, b in zip(*(jax.tree.leaves(found[name][setting]) for name in order))
    )
    about = {"apart": apart, "rss_mb": peak_rss(), "machine": machine(), "versions": {"jax": jax.__version__}}
    return {"kind": kind, "rounds": rounds, "repeat": repeat, **seconds, **about}


def table(lines: list[Line]) -> str:
    """Medians over repeats as Markdown, with the range of the ratios."""
    head = ("16 settings", "sweep, s", "runs, s", "sweep / runs", "with compilation: sweep, s", "runs, s", "sweep / runs")
    rows = [head, ("---", *("---:",) * 6)]
    for kind in KINDS:
        own = [line for line in lines if line["kind"] == kind]
        if own:
            rows.append((kind, *_cells(own, "warm"), *_cells(own, "cold")))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _cells(own: list[Line], state: str) -> tuple[str, str, str]:
    sweep, runs = ([line[f"{way}_{state}_s"] for line in own] for way in ("sweep", "runs"))
    ratios = [a / b for a, b in zip(sweep, runs)]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"{statistics.median(sweep):.2f}", f"{statistics.median(runs):.2f}", spread


def page(lines: list[Line], name: str) -> str:
    """The whole page."""
    machine = lines[0]["machine"]
    about = f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; jax {lines[0]['versions']['jax']}."
    return f"# {name}\n\n{about} W1, {lines[0]['rounds']} rounds of each setting; medians over repeats, range.\n\n{table(lines)}"


def main() -> None:
    """Measures what is not in the file yet."""
    options = _options()
    if options.kind:
        print(json.dumps(measure(options.kind, options.rounds, options.repeat)))
        return
    path = HERE / "results" / f"{options.name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    found = read_lines(path)
    for repeat, kind in itertools.product(range(options.repeats), KINDS):
        if any((line["kind"], line["repeat"]) == (kind, repeat) for line in found):
            continue
        command = [sys.executable, __file__, "--rounds", str(options.rounds), "--kind", kind, "--repeat", str(repeat)]
        process = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        if process.returncode:
            sys.exit(process.stderr)
        found.append(json.loads(process.stdout.splitlines()[-1]))
        append_line(path, found[-1])
        print({key: value for key, value in found[-1].items() if key not in ("machine", "versions")}, flush=True)
    if found:
        path.with_suffix(".md").write_text(page(found, options.name))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--name", default="sweeping")
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--repeat", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
