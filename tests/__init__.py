"""Tests, in the same rooms as the package."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The checkout."""
DATA = Path(__file__).parent / "data"
"""Small files that tests read."""
