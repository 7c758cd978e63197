"""Photographs that several test files pack."""

import numpy as np
import pytest

from tests.conftest import write_image


@pytest.fixture
def large(tmp_path):
    """Six images that do not compress, half a MiB each, in folders, and their depth."""
    rng = np.random.default_rng(0)
    for number in range(6):
        folder = f"day {number % 2}/{number}.png"
        write_image(tmp_path / "clear" / folder, rng.integers(0, 256, (420, 420, 3)).astype(np.uint8))
        write_image(tmp_path / "depth" / folder, rng.integers(0, 2**16, (420, 420)).astype(np.uint16))
    return tmp_path
