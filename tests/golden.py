"""The golden records: outputs of declearn 2.9.1 in float64, for the same six gradients and weights.

Records are read when tests are collected, so that each is a test of its own; without the file there are none, and tests that
ask for them are skipped.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FILE = Path(__file__).resolve().parents[1] / ".." / "shared" / "golden" / "declearn_golden.json"
RECORDS: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
needs_golden = pytest.mark.skipif(not RECORDS, reason="needs the golden records beside the project's folder")

TOLERANCES = {"float64": 1e-12, "float32": 2e-6}


def params(section: str) -> list:
    """The records of a section, for ``pytest.mark.parametrize``."""
    records = RECORDS.get(section, [])
    return [pytest.param(r, id=f"{i}-{r.get('name', r.get('round', 'chain'))}") for i, r in enumerate(records)]


def tree(value: dict[str, Any], dtype: str = "float64") -> dict[str, np.ndarray]:
    """One recorded tree as arrays."""
    return {name: np.asarray(leaf, dtype) for name, leaf in value.items()}


def sequence(name: str, dtype: str = "float64") -> list[dict[str, np.ndarray]]:
    """The common ``"grads"`` or ``"weights"``, one tree per step."""
    return [tree(value, dtype) for value in RECORDS[name]]


def assert_close(got: Any, expected: dict[str, Any], dtype: str) -> None:
    """Equality of trees to the precision of a dtype, which must have been kept.

    An entry that is left over when larger ones cancel is as precise as those: a tenth of the leaf's greatest counts.
    """
    for name, leaf in tree(expected).items():
        assert got[name].dtype == dtype
        tolerance = TOLERANCES[dtype]
        np.testing.assert_allclose(got[name], leaf, rtol=tolerance, atol=tolerance * np.abs(leaf).max() / 10)
