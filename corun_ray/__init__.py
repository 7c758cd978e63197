"""corun_ray: a training service for real-world image dehazing (CORUN and Colabator) on Ray clusters."""

from pathlib import Path

from corun_ray.core.home import settle_in

PACKAGE = Path(__file__).parent
"""The folder of this package's code."""

# Every process of ours passes here, on any machine, before the libraries that look for a home.
settle_in()
