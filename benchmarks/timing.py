"""What every peer script shares: options, a clock, memory, and the one JSON line that it prints. Needs NumPy alone."""

import argparse
import json
import os
import platform
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from workloads import Workload

ALGORITHMS = ("fedavg", "fedprox", "fedadam", "scaffold")
MU = 0.01  # FedProx's pull
SERVER_ADAM = {"lrate": 0.01, "beta_1": 0.9, "beta_2": 0.999, "eps": 1e-8}
# Rounds that are left out of the medians: compilation, caches, the first visits of worker processes.
WARM_UP = 3


def parser(description: str | None, algorithms: tuple[str, ...] = ALGORITHMS) -> argparse.ArgumentParser:
    """The options that all scripts take; ``--shuffle 0`` makes every peer do the same arithmetic."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="W1", choices=("W1", "W2", "W3"))
    parser.add_argument("--algorithm", default="fedavg", choices=algorithms)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--shuffle", type=int, default=1, choices=(0, 1), help="0: batches in the order of the data")
    return parser


class Clock:
    """Seconds of each round. ``tick`` when the round's new model is really there."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.first: float | None = None
        self._last = 0.0

    def begin(self) -> None:
        """The server has the first model."""
        self._last = time.perf_counter()

    def tick(self) -> None:
        """The server has the next one."""
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self.first = age_of_process() if self.first is None else self.first
        self._last = now

    @property
    def warm(self) -> int:
        """How many of the rounds count as warm-up."""
        return min(WARM_UP, max(0, len(self.seconds) - 1))


class TreeMemory(threading.Thread):
    """Peak memory of this process and all that it started, sampled: for peers that work in many processes.

    ``rss`` counts shared pages once a process, ``pss`` shares them out; both in MB.
    """

    def __init__(self, every: float = 0.5) -> None:
        super().__init__(daemon=True)
        self.every, self.rss, self.pss, self.processes = every, 0.0, 0.0, 0

    def run(self) -> None:
        """Samples until the process ends."""
        while True:
            tree = _tree(os.getpid())
            self.processes = max(self.processes, len(tree))
            self.rss = max(self.rss, sum(_kilobytes(pid, "status", "VmRSS") for pid in tree) / 1024)
            self.pss = max(self.pss, sum(_kilobytes(pid, "smaps_rollup", "Pss") for pid in tree) / 1024)
            time.sleep(self.every)


def print_line(
    peer: str, options: argparse.Namespace, work: Workload, clock: Clock, loss: float, packages: tuple[str, ...], **more: Any
) -> None:
    """The result of a run as one line of JSON.

    Args:
        peer: Whose run it was.
        options: As parsed.
        work: What was trained.
        clock: Ticked once a round.
        loss: The final mean loss over ``work.evaluation()``.
        packages: Whose versions are recorded.
        **more: Further entries; those of a :class:`TreeMemory` replace the process's own peak.
    """
    timed = np.array(clock.seconds[clock.warm :])
    examples = np.array([work.examples(r) for r in range(clock.warm, len(clock.seconds))])
    line = {
        "peer": peer,
        "workload": work.name,
        "algorithm": options.algorithm,
        "shuffle": bool(options.shuffle),
        "rounds": len(clock.seconds),
        "round_s": _rounded(np.median(timed)),
        "fastest_s": _rounded(timed.min()),
        "slowest_s": _rounded(timed.max()),
        "first_round_s": _rounded(clock.first),
        "examples_per_s": round(float(np.median(examples / timed)), 1),
        "rss_mb": peak_rss(),
        "loss": round(float(loss), 7),
        **more,
        "seconds": [_rounded(x) for x in clock.seconds],
        "data": work.checksum,
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
    }
    print(json.dumps(line), flush=True)


def age_of_process() -> float:
    """Seconds since this process was started, interpreter start-up included."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def peak_rss() -> float:
    """The process's own peak in MB."""
    # Not getrusage: its maximum begins with that of the process that started this one.
    return round(_kilobytes(os.getpid(), "status", "VmHWM") / 1024, 1)


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system."""
    cpu = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu[0] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory),
        "system": platform.platform(),
    }


def _rounded(seconds: Any) -> float:
    return round(float(seconds), 6)


def _kilobytes(pid: int, file: str, key: str) -> int:
    """One entry of a process's file; 0 if the process has gone."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(key + ":")), 0)


def _tree(root: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (parent := _kilobytes(int(folder.name), "status", "PPid")):
            children.setdefault(parent, []).append(int(folder.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found
