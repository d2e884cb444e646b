"""How a round's cost grows:  ``benchmarks/.venvs/jaxfed/bin/python benchmarks/scaling.py [--what cohort,population,devices]``.

==========  ========================================================================================================
cohort      1 to 1000 clients a round, of 1000 with about 100 rows each
population  1e3, 1e5 and 1e6 clients with 4 rows each, 100 a round drawn uniformly; FedAvg and SCAFFOLD, data and kept
            rows on the device or, paged, on the host. All populations of one kind take turns in one process, so that
            whatever else the machine does slows them alike; a second process each measures memory
devices     1 and 2, the cohort of 100 dealt over them; on a CPU they are made
==========  ========================================================================================================

Every other point is a process of its own. Lines go to ``results/NAME.jsonl`` (what is there is not measured again), the figure to
``results/NAME.png``.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from result_lines import append_line, read_lines

HERE = Path(__file__).resolve().parent
DIMENSIONS = ("what", "algorithm", "population", "cohort", "devices", "paged")
POPULATIONS = (1_000, 100_000, 1_000_000)
WIDE = {"rows": 100, "features": 60, "batch_size": 20}
NARROW = {"rows": 4, "features": 10, "batch_size": 2}
Point = dict[str, Any]


def points(what: list[str]) -> list[Point]:
    """All that is measured."""
    plain = {"algorithm": "fedavg", "population": 1000, "cohort": 100, "devices": None, "paged": False, **WIDE}
    found = {
        "cohort": [{**plain, "cohort": size} for size in (1, 10, 30, 100, 300, 1000)],
        "population": [
            {**plain, **NARROW, "algorithm": algorithm, "population": size, "paged": paged}
            for algorithm in ("fedavg", "scaffold")
            for paged in (False, True)
            for size in POPULATIONS
        ],
        "devices": [{**plain, "devices": count} for count in (1, 2)],
    }
    return [{"what": name, **point} for name in what for point in found[name]]


def take_turns(point: Point, rounds: int) -> dict[str, list[float]]:
    """The median seconds of a round for each of the populations, a call of each in turn: ten rounds in a call, and one."""
    import jax

    runs = []
    for population in POPULATIONS:
        simulation, params = _simulation(point | {"population": population})
        runs.append((simulation, simulation.init(params, key=jax.random.key(0))))
    found = {}
    for name, chunk in (("in_turn_s", 10), ("one_in_turn_s", 1)):
        calls = [simulation.chunks(state, rounds=chunk * (5 * rounds + 1), chunk=chunk) for simulation, state in runs]
        # The first call compiles, and sends the data to the device.
        for call in calls:
            next(call)
        times = [[_seconds_of(call) / chunk for call in calls] for _ in range(5 * rounds)]
        found[name] = [round(statistics.median(column), 6) for column in zip(*times)]
    return found


def _seconds_of(call: Any) -> float:
    import jax

    began = time.perf_counter()
    state, _ = next(call)
    jax.block_until_ready(state)
    return time.perf_counter() - began


def measure(point: Point, rounds: int) -> Point:
    """Builds the federation and times rounds, one call each and ten in a call."""
    import jax

    if point["devices"]:
        jax.config.update("jax_num_cpu_devices", point["devices"])
    from timing import machine, peak_rss

    simulation, params = _simulation(point)
    began = time.perf_counter()
    state = simulation.init(params, key=jax.random.key(0))
    seconds = {}
    for chunk in (1, 10):
        # The first call of each length is not counted: it compiles, and sends the data to the device.
        times, last = [], time.perf_counter()
        for state, reports in simulation.chunks(state, rounds=chunk * (rounds + 1), chunk=chunk):  # noqa: B020
            jax.block_until_ready(state)
            times.append((time.perf_counter() - last) / len(reports))
            last = time.perf_counter()
        seconds[chunk] = statistics.median(times[1:])
    return {
        **point,
        "round_s": round(seconds[1], 6),
        "chunked_round_s": round(seconds[10], 6),
        "clients_per_s": round(point["cohort"] / seconds[1], 1),
        "rss_mb": peak_rss(),
        "total_s": round(time.perf_counter() - began, 2),
        "data_mb": round(sum(x.nbytes for x in simulation.data.arrays.values()) / 2**20, 1),
        "kept_mb": round(sum(x.nbytes for x in jax.tree.leaves(state.kept)) / 2**20, 1),
        "machine": machine(),
        "versions": {"jax": jax.__version__},
    }


def _simulation(point: Point) -> tuple[Any, Any]:
    """Logistic regression on ragged clients: ``rows / 2`` to ``3 rows / 2`` rows each, alike where populations are compared."""
    import numpy as np
    from peers.jaxfed_rounds import accepted, make_loss

    import jaxfed

    rng, half = np.random.default_rng(0), point["rows"] // 2
    ragged = point["what"] != "population"
    sizes = rng.integers(half, 3 * half + 1, point["population"]) if ragged else np.full(point["population"], point["rows"])
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    x = rng.standard_normal((offsets[-1], point["features"]), dtype=np.float32)
    y = rng.integers(0, 10, offsets[-1]).astype(np.int32)
    data = jaxfed.FederatedData({"x": x, "y": y}, offsets, np.arange(point["population"]))
    recipe = {"fedavg": jaxfed.fedavg, "scaffold": jaxfed.scaffold}[point["algorithm"]]
    algorithm = recipe(make_loss("W1"), lrate=0.01, batch_size=point["batch_size"])
    params = {"w": np.zeros((point["features"], 10), np.float32), "b": np.zeros(10, np.float32)}
    options = accepted({"devices": point["devices"], "paged": point["paged"]})
    return jaxfed.Simulation(algorithm, data, point["cohort"], **options), params


def run_point(point: Point, rounds: int) -> Point:
    """Measures in a new process; a line with ``error`` where that fails."""
    line = _in_process(point, rounds)
    if point["what"] != "population" or "error" in line:
        return line
    kind = json.dumps({key: value for key, value in point.items() if key != "population"}, sort_keys=True)
    found = _in_turn(kind, rounds)
    if "error" in found:
        return found
    return line | {name: seconds[POPULATIONS.index(point["population"])] for name, seconds in found.items()}


@functools.cache
def _in_turn(kind: str, rounds: int) -> Any:
    return _in_process(json.loads(kind), rounds, "--turns")


def _in_process(point: Point, rounds: int, *options: str) -> Any:
    command = [sys.executable, __file__, "--rounds", str(rounds), "--point", json.dumps(point), *options]
    process = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    if process.returncode:
        return point | {"error": process.stderr.strip().splitlines()[-1]}
    return json.loads(process.stdout.splitlines()[-1])


def draw(lines: list[Point], path: Path) -> None:
    """Clients a second by cohort and devices; seconds and memory by population."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = (
        ("cohort", "cohort", "clients_per_s", "Clients a second, by cohort"),
        ("devices", "devices", "clients_per_s", "Clients a second, by devices"),
        ("population", "population", "in_turn_s", "Seconds a round, by population"),
        ("population", "population", "rss_mb", "Peak memory (MB), by population"),
    )
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        picture = Figure(figsize=(9, 6.4), dpi=150, layout="constrained")
        for axes, (what, across, up, title) in zip(picture.subplots(2, 2).flat, panels):
            _panel(axes, [line for line in lines if line["what"] == what], across, up)
            axes.set_title(title, loc="left")
        machine = lines[0]["machine"]
        note = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB. Lines: medians; dots: repetitions."
        picture.supxlabel(note, x=0.01, ha="left", fontsize=8, color="#555555")
        picture.savefig(path)


def _panel(axes: Any, lines: list[Point], across: str, up: str) -> None:
    kinds = [
        ("fedavg", False, "#0072b2"),
        ("scaffold", False, "#d55e00"),
        ("fedavg", True, "#56b4e9"),
        ("scaffold", True, "#e69f00"),
    ]
    for algorithm, paged, color in kinds:
        own = [line for line in lines if (line["algorithm"], line["paged"]) == (algorithm, paged)]
        if not own:
            continue
        places = sorted({line[across] for line in own})
        medians = [statistics.median(line[up] for line in own if line[across] == place) for place in places]
        axes.plot(places, medians, color=color, label=algorithm + ", paged" * paged)
        axes.plot([line[across] for line in own], [line[up] for line in own], ".", color=color)
    if across != "devices":
        axes.set_xscale("log")
    axes.set_xlabel(across)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25, linewidth=0.6)
    if lines:
        axes.legend(frameon=False)


def main() -> None:
    """Measures what is not in the file yet, and draws."""
    options = _options()
    if options.point:
        work = take_turns if options.turns else measure
        print(json.dumps(work(json.loads(options.point), options.rounds)))
        return
    path = HERE / "results" / f"{options.name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    found = read_lines(path)
    for repeat in range(options.repeats):
        _in_turn.cache_clear()
        for point in points(options.what.split(",")):
            known = {tuple(line[key] for key in (*DIMENSIONS, "repeat")) for line in found}
            if (*(point[key] for key in DIMENSIONS), repeat) in known:
                continue
            line = {"repeat": repeat, **run_point(point, options.rounds)}
            print(
                json.dumps({key: line[key] for key in (*DIMENSIONS, "round_s", "in_turn_s", "rss_mb", "error") if key in line}),
                flush=True,
            )
            if "error" not in line:
                found.append(line)
                append_line(path, line)
    if found:
        draw(found, path.with_suffix(".png"))
        print(path.with_suffix(".png"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="cohort,population,devices")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each length in a process")
    parser.add_argument("--name", default="scaling")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    parser.add_argument("--turns", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
