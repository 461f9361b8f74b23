"""What the tests of a second backbone's functions share: one shape, so that each function is one program."""

from pathlib import Path

import jax
import numpy as np
import pytest

GOLDEN = np.load(Path(__file__).parents[1] / "golden/affinity_tiny.npz")
FULL, PARTS = np.array([[3, 4], [3, 4]]), np.array([[3, 2], [2, 4]])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield
