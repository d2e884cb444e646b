"""Memory does not grow with the population where data lie in mapped files."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxfed


def loss(params, batch, key):
    return jnp.square(batch["x"] @ params - batch["y"])


folder, clients, rows, features = Path(sys.argv[1]), int(sys.argv[2]), 10, 100
# Files of zeros without blocks on the disk, 4 kB a client.
arrays = {
    "x": np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (clients * rows, features)),
    "y": np.lib.format.open_memmap(folder / "y.npy", "w+", np.float32, (clients * rows,)),
}
data = jaxfed.FederatedData(arrays, np.arange(clients + 1) * rows, np.arange(clients))
simulation = jaxfed.Simulation(jaxfed.fedavg(loss, lrate=0.1, batch_size=5), data, 20, devices=1, paged=True)
state, _ = simulation.run(simulation.init(jnp.ones(features), key=jax.random.key(0)), rounds=30)
status = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1024)
"""


def peak_megabytes(folder, clients):
    folder.mkdir()
    command = [sys.executable, "-c", SCRIPT, str(folder), str(clients)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hundred_times_the_clients_take_no_more_memory(tmp_path):
    few, many = peak_megabytes(tmp_path / "few", 1_000), peak_megabytes(tmp_path / "many", 100_000)
    # 390 MB of rows; what is kept of each client, its numbers, is 5 MB.
    assert many < few + 60, (few, many)
