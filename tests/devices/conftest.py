"""Small leaves travel in parts."""

import pytest

from jaxfed.engine import mesh


@pytest.fixture(autouse=True)
def _split_small_leaves(monkeypatch):
    """The weights of these models travel in parts wherever they divide, as large ones do."""
    monkeypatch.setattr(mesh, "_SMALLEST_SPLIT", 4)
