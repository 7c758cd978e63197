"""The atmospheric scattering model: haze laid over a clear image, from its depth.

`hazy = scene · T + A · (1 − T)` with the transmission `T = exp(−2β(1 − d))`, where `d` is the inverse depth
and `A` the airlight. Source: haze synthesis of Fang et al., NeurIPS 2024, arXiv 2406.07966.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class HazeRange:
    """Ranges of the uniform draws of a haze: any positive `beta`, `airlight` within [0, 1].

    `airlight_tint` is the largest deviation of one channel's airlight from the drawn grey.
    """

    beta: tuple[float, float] = (0.2, 2.8)
    airlight: tuple[float, float] = (0.25, 1.0)
    airlight_tint: float = 0.025


@dataclass(frozen=True)
class Haze:
    """One haze: its density `beta`, and the airlight of red, green and blue in [0, 1]."""

    beta: float
    airlight: tuple[float, float, float]


def sample_haze(rng: np.random.Generator, haze_range: HazeRange) -> Haze:
    """Draw a haze.

    A tinted airlight is clipped to [0, 1].
    """
    beta = rng.uniform(*haze_range.beta)

    # The tint is drawn before the grey: the order decides the random numbers.
    tint = rng.uniform(-haze_range.airlight_tint, haze_range.airlight_tint, size=3)
    grey = rng.uniform(*haze_range.airlight)

    red, green, blue = np.clip(grey + tint, 0.0, 1.0)
    return Haze(float(beta), (float(red), float(green), float(blue)))


def compute_transmission(inverse_depth: NDArray[np.float32], beta: float) -> NDArray[np.float32]:
    """Compute the transmission `T = exp(−2β(1 − d))`.

    Returns `H W` in (0, 1]. `inverse_depth` is `d`, `H W` in [0, 1].
    """
    return np.exp(2 * beta * (inverse_depth - 1))


def add_haze(scene: NDArray[np.float32], transmission: NDArray[np.float32], haze: Haze) -> NDArray[np.float32]:
    """Lay haze over a scene.

    Computes `scene · T + A · (1 − T)`, `H W 3` in [0, 1]. `scene` is `H W 3` in [0, 1], `transmission` is `H W` in (0,
    1].
    """
    # Computed as `(scene − A) · T + A`.
    # OpenCV works on all channels of a pixel at once, twice as fast as numpy channel by channel.
    airlight = np.array((*haze.airlight, 0.0))
    hazy = cv2.subtract(scene, airlight)
    cv2.multiply(hazy, cv2.merge((transmission, transmission, transmission)), dst=hazy)
    return np.asarray(cv2.add(hazy, airlight, dst=hazy), np.float32)
