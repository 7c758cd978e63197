"""The atmospheric scattering model: haze laid over a clear image, from its depth.

`hazy = scene · T + A · (1 − T)` with the transmission `T = exp(−2β(1 − d + n))`, where `d` is the inverse depth, `A`
the airlight and `n` the distance of the nearest point. Source: haze synthesis of Fang et al., NeurIPS 2024, arXiv
2406.07966, where `n` is 0: the nearest point of every image is free of haze. There `β` is one number; here it may also
vary over the image, as in drifting fog.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class HazeRange:
    """Ranges of the uniform draws of a haze: any positive `beta`, `airlight` within [0, 1].

    `airlight_tint` is the largest deviation of one channel's airlight from the drawn grey. `nearest` is 0 and above, in
    units of the distance between the nearest and the farthest point. `density_variation` is the largest deviation of
    `beta` over an image, as a share of it, within [0, 1]; at 1, some places may be free of haze.
    """

    beta: tuple[float, float] = (0.2, 2.8)
    airlight: tuple[float, float] = (0.25, 1.0)
    airlight_tint: float = 0.025
    nearest: tuple[float, float] = (0.0, 0.0)
    density_variation: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Haze:
    """One haze: its density `beta`, the airlight of red, green and blue in [0, 1], and the nearest point's distance."""

    beta: float
    airlight: tuple[float, float, float]
    nearest: float = 0.0
    deviation: NDArray[np.float32] | None = None
    """Deviations of `beta` as shares of it, in [-1, 1], on a coarse lattice over the image. None: uniform haze."""


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
    deviation = _sample_deviation(rng, haze_range.density_variation) if any(haze_range.density_variation) else None
    return Haze(float(beta), (float(red), float(green), float(blue)), float(nearest), deviation)


def _sample_deviation(rng: np.random.Generator, variation: tuple[float, float]) -> NDArray[np.float32]:
    """Draw the deviations of an uneven haze: blobs of a half to a sixth of the image, of any height and width."""
    rows, columns = rng.integers(3, 8, size=2)
    lattice = rng.uniform(-1, 1, size=(rows, columns))
    return (rng.uniform(*variation) * lattice).astype(np.float32)


def compute_density(haze: Haze, height_px: int, width_px: int) -> NDArray[np.float32]:
    """Compute `β` at every pixel, `H W`, 0 and above."""
    if haze.deviation is None:
        return np.broadcast_to(np.float32(haze.beta), (height_px, width_px))

    # Cubic interpolation is smooth. It overshoots a little, which is cut off.
    smooth = cv2.resize(haze.deviation, (width_px, height_px), interpolation=cv2.INTER_CUBIC)
    return np.float32(haze.beta) * (1 + np.clip(smooth, haze.deviation.min(), haze.deviation.max()))


def compute_transmission(
    inverse_depth: NDArray[np.float32], beta: float | NDArray[np.float32], nearest: float = 0.0
) -> NDArray[np.float32]:
    """Compute the transmission `T = exp(−2β(1 − d + n))`.

    Returns `H W` in (0, 1]. `inverse_depth` is `d`, `H W` in [0, 1]. `beta` is a number or `H W`. `nearest` is `n`, 0
    or more.
    """
    return np.exp(np.float32(2) * np.asarray(beta, np.float32) * (inverse_depth - np.float32(1 + nearest)))


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
