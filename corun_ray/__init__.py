"""corun_ray: a training service for real-world image dehazing (CORUN and Colabator) on Ray clusters."""

from pathlib import Path

PACKAGE = Path(__file__).parent
"""The folder of this package's code."""
