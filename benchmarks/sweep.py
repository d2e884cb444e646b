"""The interleaved sweep: every peer once a sweep, in turn, one timed process at a time.

Run:  python benchmarks/sweep.py --sweeps 5 [--workloads W1,W2] [--peers jaxfed,pfl] [--name NAME]

Each run appends its line to ``results/NAME.jsonl``. What is in the file already is not run again, failed runs included, so a
sweep that was killed goes on where it stopped. The order is turned by one from sweep to sweep, so that nobody always follows the
same neighbour.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from result_lines import append_line, read_lines
from setup import HERE, interpreter, is_ready

RESULTS = HERE / "results"
ROUNDS = {"W1": 30, "W2": 8, "W3": 8}
# Seconds after which a run counts as failed.
LIMIT = 900


@dataclass(frozen=True)
class Peer:
    """How a row of the table is made.

    Attributes:
        environment: Whose Python runs it.
        module: The script in ``peers``.
        options: More of its options.
        algorithms: Those that it has.
    """

    environment: str
    module: str
    options: tuple[str, ...] = ()
    algorithms: tuple[str, ...] = ("fedavg", "fedprox", "fedadam")


_ALL = ("fedavg", "fedprox", "fedadam", "scaffold")
# One CPU device for each core, as `jaxfed run` makes them.
_BOTH_CORES = ("--devices", str(os.cpu_count()))
PEERS = {
    "jaxfed": Peer("jaxfed", "jaxfed_rounds", (*_BOTH_CORES, "--calls", "3"), algorithms=_ALL),
    "jaxfed-cached": Peer(
        "jaxfed", "jaxfed_rounds", (*_BOTH_CORES, "--compilation-cache", str(HERE / ".cache" / "xla")), ("fedavg",)
    ),
    "jaxfed-1-device": Peer("jaxfed", "jaxfed_rounds", (), ("fedavg",)),
    "plain-scan": Peer("plain_jax", "plain_jax"),
    "plain-central": Peer("plain_jax", "plain_jax", ("--variant", "central"), ("fedavg",)),
    "fedjax": Peer("fedjax", "fedjax"),
    "pfl": Peer("pfl", "pfl", algorithms=_ALL),
    "flower": Peer("flower", "flower"),
    "declearn": Peer("declearn", "declearn", algorithms=_ALL),
    "drjax": Peer("drjax", "drjax", algorithms=("fedavg",)),
}
# Its first run fills the cache and is not kept.
CACHED = "jaxfed-cached"


@dataclass(frozen=True)
class Run:
    """One timed process."""

    sweep: int
    label: str
    workload: str
    algorithm: str

    @property
    def key(self) -> tuple:
        """What it is known by in the results."""
        return (self.sweep, self.label, self.workload, self.algorithm)


def planned(sweeps: int, labels: list[str], workloads: list[str], algorithms: list[str]) -> Iterator[Run]:
    """All runs in their order."""
    for sweep in range(sweeps):
        turned = labels[sweep % len(labels) :] + labels[: sweep % len(labels)]
        for workload in workloads:
            # The other algorithms are measured on W1 alone, where what they add shows most.
            for algorithm in algorithms if workload == "W1" else [a for a in algorithms if a == "fedavg"]:
                for label in turned:
                    if algorithm in PEERS[label].algorithms:
                        yield Run(sweep, label, workload, algorithm)


def done(path: Path) -> set[tuple]:
    """The runs that a file of results holds; a last line that was cut short by a kill is dropped from the file."""
    return {Run(*(line[key] for key in ("sweep", "label", "workload", "algorithm"))).key for line in read_lines(path)}


def execute(run: Run, rounds: int) -> dict[str, Any]:
    """The line of a run, or one with ``error``."""
    peer = PEERS[run.label]
    options = ["--workload", run.workload, "--algorithm", run.algorithm, "--rounds", str(rounds)]
    command = [str(interpreter(peer.environment)), "-m", f"peers.{peer.module}", *options, *peer.options]
    about = {"sweep": run.sweep, "label": run.label, "workload": run.workload, "algorithm": run.algorithm}
    about |= {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "load_before": round(os.getloadavg()[0], 2)}
    code, output, errors = _run_alone(command)
    lines = [line for line in output.splitlines() if line.startswith('{"peer"')]
    if code or not lines:
        return about | {"error": errors[-2000:] or f"no line, exit status {code}"}
    return about | json.loads(lines[-1])


def _run_alone(command: list[str]) -> tuple[int, str, str]:
    """A process and all that it starts, which end with it; also after ``LIMIT`` seconds."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # As for users: where this is set, our own sources, which no pip has compiled, are compiled anew in every process.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    with subprocess.Popen(command, cwd=HERE, env=environment, start_new_session=True, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            output, errors = "", f"took more than {LIMIT} s"
        finally:
            _end_group(process.pid)
    return process.returncode, output, errors


def _end_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def main() -> None:
    """Runs what is not in the file yet."""
    # So that the process that is being timed ends with the sweep.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    options = _options()
    needed = {"jaxfed", *(PEERS[label].environment for label in options.peers)}
    if missing := sorted(name for name in needed if not is_ready(name)):
        sys.exit(f"Not set up: {', '.join(missing)}. Run  python benchmarks/setup.py {' '.join(missing)}")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{options.name}.jsonl"
    finished = done(path)
    runs = [
        run for run in planned(options.sweeps, options.peers, options.workloads, options.algorithms) if run.key not in finished
    ]
    # Drawn before anything is timed.
    draw = "import workloads; [workloads.load(name) for name in workloads.SETTINGS]"
    subprocess.run([interpreter("jaxfed"), "-c", draw], cwd=HERE, check=True)
    for number, run in enumerate(runs, 1):
        if run.label == CACHED and run.sweep == 0:
            execute(run, 1)
        line = execute(run, options.rounds or ROUNDS[run.workload])
        append_line(path, line)
        said = (
            line["error"].strip().splitlines()[-1] if "error" in line else f"{line['round_s']:.4f} s a round, loss {line['loss']}"
        )
        print(f"[{number}/{len(runs)}] sweep {run.sweep}  {run.workload} {run.algorithm}  {run.label}: {said}", flush=True)
    print(f"Table and figure:  python benchmarks/report.py {path.relative_to(HERE)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=5)
    parser.add_argument("--name", default="sweep", help="the results are results/NAME.jsonl")
    parser.add_argument("--rounds", type=int, default=0, help="by default 30 of W1, 8 of W2 and W3")
    for name, known in (("workloads", tuple(ROUNDS)), ("algorithms", _ALL), ("peers", tuple(PEERS))):
        parser.add_argument(f"--{name}", default=",".join(known), help="%(default)s")
    options = parser.parse_args()
    for name, known in (("workloads", ROUNDS), ("algorithms", _ALL), ("peers", PEERS)):
        chosen = getattr(options, name).split(",")
        if unknown := set(chosen) - set(known):
            parser.error(f"--{name}: expected names among {', '.join(known)}; got {', '.join(sorted(unknown))}")
        setattr(options, name, chosen)
    return options


if __name__ == "__main__":
    main()
