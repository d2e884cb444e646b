"""Float64."""

import pytest


@pytest.fixture(autouse=True)
def _exact(x64):
    """Replaces float32."""
