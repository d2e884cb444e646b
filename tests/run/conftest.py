"""A small run: 40 rows of 3 classes on 5 clients, trained by SCAFFOLD with clients that keep their momentum."""

import numpy as np
import pytest


@pytest.fixture
def table(tmp_path):
    """The tables of a config whose run takes a moment."""
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 3
    x = rng.normal(size=(40, 4)).astype(np.float32) + np.eye(4, dtype=np.float32)[labels]
    np.savez(tmp_path / "rows.npz", x=x, y=labels, client=np.arange(40) % 5)
    momentum = {"lrate": 0.1, "modules": [["momentum", {"beta": 0.5}]], "keep_state": True}
    return {
        "run": {"rounds": 6, "seed": 3, "eval_every": 2, "out": str(tmp_path / "run")},
        "data": {"name": "npz", "path": str(tmp_path / "rows.npz"), "test_fraction": 0.25},
        "model": {"name": "logistic-regression"},
        "algorithm": {"name": "scaffold", "lrate": momentum, "batch_size": 4, "weights": "uniform", "option": "I"},
        "simulation": {"cohort_size": 3, "chunk": 4},
    }
