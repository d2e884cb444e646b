"""Several processes, one to a machine: how they find each other, and who writes files."""

import contextlib
import dataclasses
import os
import re
import sys
import threading
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

_HEARTBEAT_SECONDS = 30
_ADDRESS = re.compile(r".+:\d{1,5}")
_parted = threading.Event()
_parted.set()
LOST = 3
"""The exit status when another process of the run has ended."""


@dataclasses.dataclass(frozen=True)
class Machines:
    """Where the processes of one run meet; give all three, or --cluster alone, or nothing for one process."""

    coordinator: str | None = None
    """HOST:PORT of process 0, which all can reach."""
    processes: int | None = None
    """How many there are."""
    process_id: int | None = None
    """Which one this is, from 0. Process 0 writes the run's folder; all must see it, for a resume."""
    cluster: bool = False
    """Take all three from the launcher's environment: Slurm's srun, Open MPI's mpirun, a cloud's TPU hosts."""

    @property
    def alone(self) -> bool:
        """Whether one process is the whole run."""
        return not self.cluster and self.coordinator is None

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Joins the others for as long as it lasts. One process alone has nothing to do.

        Raises:
            ValueError: If some arguments are missing or contradict each other.
            RuntimeError: If the others do not come.
        """
        self._check()
        if self.alone:
            yield
            return
        jax.distributed.initialize(
            self.coordinator, self.processes, self.process_id, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
        )
        _parted.clear()
        try:
            yield
        except Exception as error:
            if not _is_lost(error):
                raise
            if os.environ.get("JAXFED_DEBUG"):
                print(error, file=sys.stderr)
            text = "Another process of this run has ended, or cannot be reached. Start all processes again with  jaxfed resume"
            print(f"jaxfed: process {jax.process_index()}: {text}.", file=sys.stderr, flush=True)
            leave(LOST)
        jax.distributed.shutdown()
        _parted.set()

    def _check(self) -> None:
        given = {"--coordinator": self.coordinator, "--processes": self.processes, "--process-id": self.process_id}
        missing = [name for name, value in given.items() if value is None]
        if self.cluster and len(missing) < 3:
            raise ValueError("--cluster takes everything from the launcher's environment. Leave out " + ", ".join(given) + ".")
        if not self.cluster and 0 < len(missing) < 3:
            raise ValueError(f"Several processes need {', '.join(given)}; {', '.join(missing)} is missing.")
        if self.coordinator is not None and not _ADDRESS.fullmatch(self.coordinator):
            raise ValueError(f"--coordinator: expected HOST:PORT, got {self.coordinator!r}.")
        if self.processes is not None and not 0 <= (self.process_id or 0) < self.processes:
            raise ValueError(f"--process-id: expected 0 to {self.processes - 1}, got {self.process_id}.")


def writes() -> bool:
    """Whether this process writes the run's files."""
    return jax.process_index() == 0


def meet(where: str) -> None:
    """Waits until all processes are at this point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def anyone(says: bool) -> bool:
    """Whether any of the processes says so; all of them ask at the same moment of the run."""
    return says if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(says)).any())


def shard() -> dict[str, int]:
    """Whose rows this process reads, as loaders take it."""
    return {"num_shards": jax.process_count(), "index": jax.process_index()}


def everyones(rows: np.ndarray) -> np.ndarray:
    """The rows ``[n, ...]`` of all processes, one's after the other's; ``n`` may differ. All ask at the same moment."""
    if jax.process_count() == 1:
        return rows
    counts = multihost_utils.process_allgather(np.asarray(len(rows)))
    # As bytes: on its way an array of JAX's would lose half of a wide number.
    padded = np.zeros((int(counts.max()), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    width = padded.size * padded.itemsize
    everything = multihost_utils.process_allgather(np.ascontiguousarray(padded).reshape(-1).view(np.uint8).reshape(width))
    gathered = np.ascontiguousarray(everything).view(rows.dtype).reshape(len(counts), *padded.shape)
    return np.concatenate([own[:count] for own, count in zip(gathered, counts)])


def leave(status: int) -> int:
    """The status, for a process that is alone or has parted from the others; any other one ends here, so that these notice.

    The way out through Python would wait for the others, who wait for this one.
    """
    if not _parted.is_set():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _is_lost(error: Exception) -> bool:
    # Some of a collective's errors come as ValueError.
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
