"""The atmospheric scattering model: haze laid over a clear image, from its depth.

`hazy = scene · T + A · (1 − T)` with the transmission `T = exp(−2β(1 − d + n))`, where `d` is the inverse depth, `A`
the airlight and `n` the distance of the nearest point. Source: haze synthesis of Fang et al., NeurIPS 2024, arXiv
2406.07966, where `n` is 0: the nearest point of every image is free of haze.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class HazeRange:
    """Ranges of the uniform draws of a haze: any positive `beta`, `airlight` within [0, 1].

    `airlight_tint` is the largest deviation of one channel's airlight from the drawn grey. `nearest` is 0 and above, in
    units of the distance between the nearest and the farthest point.
    """

    beta: tuple[float, float] = (0.2, 2.8)
    airlight: tuple[float, float] = (0.25, 1.0)
    airlight_tint: float = 0.025
    nearest: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Haze:
    """One haze: its density `beta`, the airlight of red, green and blue in [0, 1], and the nearest point's distance."""

    beta: float
    airlight: tuple[float, float, float]
    nearest: float = 0.0


def sample_haze(rng: np.random.Generator, haze_range: HazeRange) -> Haze:
    """Draw a haze.

    A tinted airlight is clipped to [0, 1].
    """
    beta = rng.uniform(*haze_range.beta)

    # The tint is drawn before the grey: the order decides the random numbers.
    tint = rng.uniform(-haze_range.airlight_tint, haze_range.airlight_tint, size=3)
    grey = rng.uniform(*haze_range.airlight)

    red, green, blue = np.clip(grey + tint, 0.0, 1.0)

    # Drawn last, and only from a range: without one, the random numbers stay those of the published haze.
    least, greatest = haze_range.nearest
    nearest = rng.uniform(least, greatest) if greatest > least else least
    return Haze(float(beta), (float(red), float(green), float(blue)), float(nearest))


def compute_transmission(inverse_depth: NDArray[np.float32], beta: float, nearest: float = 0.0) -> NDArray[np.float32]:
    """Compute the transmission `T = exp(−2β(1 − d + n))`.

    Returns `H W` in (0, 1]. `inverse_depth` is `d`, `H W` in [0, 1]. `nearest` is `n`, 0 and above.
    """
    return np.exp(np.float32(2 * beta) * (inverse_depth - np.float32(1 + nearest)))


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
