"""The three workloads, drawn with NumPy's seed 0: every peer trains the same clients in the same order from the same weights.

==  ==================================================  ==============================  =====
W1  logistic regression, 60 features, 10 classes        100 of 1000 clients, batch 20   0.01
W2  the EMNIST CNN, 28 x 28, 62 classes                 20 of 300 clients, batch 20     0.1
W3  a character LSTM, 2 x 256 units, 80 of 90 letters   10 of 100 clients, batch 10     1.0
==  ==================================================  ==============================  =====

The last column is the clients' learning rate. Sizes of clients are log-normal; one epoch a round, the last batch partial.

Run:  python benchmarks/workloads.py     writes benchmarks/.cache/W1.npz, W2.npz and W3.npz (128 MB)
"""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

CACHE = Path(__file__).resolve().parent / ".cache"
ROUNDS = 200
SETTINGS = {
    "W1": {"batch_size": 20, "lrate": 0.01},
    "W2": {"batch_size": 20, "lrate": 0.1},
    "W3": {"batch_size": 10, "lrate": 1.0},
}
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Workload:
    """Federated data, start weights and who takes part.

    Attributes:
        name: ``"W1"``, ``"W2"`` or ``"W3"``.
        x: Inputs ``[examples, ...]``, sorted by client.
        y: Labels ``[examples]``, or ``[examples, 80]`` of sequences.
        offsets: ``[N + 1]`` where each client's rows begin.
        schedule: ``[R, C]`` the clients of each round.
        params: The start weights by name.
        batch_size: ``B``.
        lrate: The clients' learning rate.
        checksum: Of all arrays; results are comparable where it is the same.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    offsets: np.ndarray
    schedule: np.ndarray
    params: Arrays
    batch_size: int
    lrate: float
    checksum: str = ""

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each client, ``[N]``."""
        return np.diff(self.offsets)

    @property
    def steps(self) -> np.ndarray:
        """Local steps of each client in a round, ``[N]``."""
        return -(-self.sizes // self.batch_size)

    def client(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """One client's inputs and labels."""
        rows = slice(self.offsets[number], self.offsets[number + 1])
        return self.x[rows], self.y[rows]

    def evaluation(self, rows: int = 2000) -> tuple[np.ndarray, np.ndarray]:
        """The fixed rows whose mean loss every peer reports."""
        chosen = np.random.default_rng(7).permutation(len(self.x))[:rows]
        return self.x[chosen], self.y[chosen]

    def examples(self, round: int) -> int:
        """The rows that the clients of a round hold; padding earns nothing."""
        return int(self.sizes[self.schedule[round]].sum())


def load(name: str) -> Workload:
    """A workload from the cache, which is drawn first if it is not there."""
    path = CACHE / f"{name}.npz"
    if not path.exists():
        draw_all()
    with np.load(path) as file:
        stored = {key: file[key] for key in file.files}
    params = {key.removeprefix("params_"): stored[key] for key in stored if key.startswith("params_")}
    arrays = {key: stored[key] for key in ("x", "y", "offsets", "schedule")}
    return Workload(name, **arrays, params=params, **SETTINGS[name], checksum=str(stored["checksum"]))


def widened(work: Workload) -> Workload:
    """The same in float64: where rounding is not what makes two losses differ."""
    x = work.x.astype(np.float64) if work.x.dtype == np.float32 else work.x
    return replace(work, x=x, params={key: value.astype(np.float64) for key, value in work.params.items()})


def draw_all() -> None:
    """Draws all three from one stream and stores them."""
    CACHE.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for name, draw in (("W1", draw_logistic), ("W2", draw_images), ("W3", draw_letters)):
        work = draw(rng)
        stored = {"x": work.x, "y": work.y, "offsets": work.offsets, "schedule": work.schedule}
        stored |= {f"params_{key}": value for key, value in work.params.items()}
        # Another process may look for the file while it is written.
        unfinished = CACHE / f"{name}.{os.getpid()}.npz"
        np.savez(unfinished, **stored, checksum=np.array(checksum(stored)))
        unfinished.replace(CACHE / f"{name}.npz")


def draw_logistic(rng: np.random.Generator, clients: int = 1000, cohort: int = 100) -> Workload:
    """W1: labels from a map that all share plus each client's own deviation."""
    sizes = _sizes(rng, clients, median=83, least=20, most=400)
    x = rng.standard_normal((sizes.sum(), 60), dtype=np.float32)
    y = np.empty(sizes.sum(), np.int32)
    shared = rng.standard_normal((60, 10)).astype(np.float32)
    for start, size in zip(_starts(sizes), sizes):
        own = shared + 0.5 * rng.standard_normal((60, 10)).astype(np.float32)
        bias = rng.standard_normal(10).astype(np.float32)
        y[start : start + size] = np.argmax(x[start : start + size] @ own + bias, axis=1)
    params = {"w": np.zeros((60, 10), np.float32), "b": np.zeros(10, np.float32)}
    return _workload("W1", sizes, x, y, _schedule(rng, clients, cohort), params)


def draw_images(rng: np.random.Generator, clients: int = 300, cohort: int = 20) -> Workload:
    """W2: noisy prototypes of 62 classes, whose frequencies differ by client."""
    sizes = _sizes(rng, clients, median=83, least=20, most=400)
    prototypes = (rng.random((62, 28, 28)) < 0.2).astype(np.float32)
    x = np.empty((sizes.sum(), 28, 28, 1), np.float32)
    y = np.empty(sizes.sum(), np.int32)
    for start, size in zip(_starts(sizes), sizes):
        frequencies = rng.dirichlet(np.full(62, 1.0))
        labels = rng.choice(62, size, p=frequencies)
        noise = rng.random((size, 28, 28), dtype=np.float32)
        x[start : start + size, :, :, 0] = np.clip(0.6 * prototypes[labels] + 0.6 * noise, 0, 1)
        y[start : start + size] = labels
    params = _cnn_weights(rng)
    return _workload("W2", sizes, x, y, _schedule(rng, clients, cohort), params)


def draw_letters(rng: np.random.Generator, clients: int = 100, cohort: int = 10) -> Workload:
    """W3: walks of a sparse Markov chain over 90 letters; the label of a letter is the next one."""
    letters, length = 90, 80
    sizes = _sizes(rng, clients, median=42, least=10, most=150)
    chances = np.cumsum(rng.dirichlet(np.full(letters, 0.05), letters), axis=1)
    walks = np.empty((sizes.sum(), length + 1), np.int32)
    walks[:, 0] = rng.integers(0, letters, len(walks))
    for t in range(length):
        draws = rng.random(len(walks))[:, None]
        walks[:, t + 1] = np.minimum((chances[walks[:, t]] < draws).sum(axis=1), letters - 1)
    params = _lstm_weights(rng, letters)
    x, y = walks[:, :-1].copy(), walks[:, 1:].copy()
    return _workload("W3", sizes, x, y, _schedule(rng, clients, cohort), params)


def checksum(arrays: Arrays) -> str:
    """Of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key])
        digest.update(f"{key} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def _workload(name: str, sizes: np.ndarray, x: np.ndarray, y: np.ndarray, schedule: np.ndarray, params: Arrays) -> Workload:
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    settings: dict[str, Any] = SETTINGS[name]
    return Workload(name, x, y, offsets, schedule, params, **settings)


def _cnn_weights(rng: np.random.Generator) -> Arrays:
    """Glorot-uniform kernels, zero biases."""

    def glorot(shape: tuple[int, ...], fan_in: int, fan_out: int) -> np.ndarray:
        bound = np.sqrt(6.0 / (fan_in + fan_out))
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    kernels = {"c1": (3, 3, 1, 32), "c2": (3, 3, 32, 64), "d1": (9216, 128), "d2": (128, 62)}
    weights = {}
    for key, shape in kernels.items():
        window = int(np.prod(shape[:-2]))
        weights[key] = glorot(shape, window * shape[-2], window * shape[-1])
        weights[f"{key}b"] = np.zeros(shape[-1], np.float32)
    return weights


def _lstm_weights(rng: np.random.Generator, letters: int, embedding: int = 8, hidden: int = 256) -> Arrays:
    """In PyTorch's layout: gates in the order input, forget, cell, output, and two biases."""
    bound = 1 / np.sqrt(hidden)

    def uniform(*shape: int) -> np.ndarray:
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    weights = {"emb": rng.standard_normal((letters, embedding)).astype(np.float32)}
    for layer, width in enumerate((embedding, hidden)):
        weights[f"l{layer}wi"] = uniform(4 * hidden, width)
        weights[f"l{layer}wh"] = uniform(4 * hidden, hidden)
        weights[f"l{layer}bi"], weights[f"l{layer}bh"] = uniform(4 * hidden), uniform(4 * hidden)
    weights["d"], weights["db"] = uniform(hidden, letters), uniform(letters)
    return weights


def _sizes(rng: np.random.Generator, clients: int, median: float, least: int, most: int) -> np.ndarray:
    return np.clip(np.round(rng.lognormal(np.log(median), 0.65, clients)), least, most).astype(np.int64)


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes) - sizes


def _schedule(rng: np.random.Generator, clients: int, cohort: int) -> np.ndarray:
    return np.stack([rng.choice(clients, cohort, replace=False) for _ in range(ROUNDS)]).astype(np.int64)


if __name__ == "__main__":
    draw_all()
    for name in SETTINGS:
        work = load(name)
        print(f"{name}: {len(work.sizes)} clients, {len(work.x)} examples, checksum {work.checksum}")
