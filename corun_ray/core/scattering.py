"""The atmospheric scattering model: haze laid over a clear image, from its depth.

`hazy = scene · T + A · (1 − T)` with the transmission `T = exp(−2β(1 − d))`, where `d` is the inverse depth
and `A` the airlight. Source: haze synthesis of Fang et al., NeurIPS 2024, arXiv 2406.07966.
"""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from corun_ray.core.images import BadImage

_SKETCH_PX = 96  # long side at which a procedural depth is drawn

DepthKind = Literal["inverse", "metres"]


@dataclass(frozen=True)
class HazeRange:
    """What haze is drawn from, uniformly: `beta` of any positive range, `airlight` within [0, 1].

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
    """Draws a haze; a tinted airlight is clipped to [0, 1]."""
    beta = rng.uniform(*haze_range.beta)
    tint = rng.uniform(-haze_range.airlight_tint, haze_range.airlight_tint, size=3)
    red, green, blue = np.clip(rng.uniform(*haze_range.airlight) + tint, 0.0, 1.0)
    return Haze(float(beta), (float(red), float(green), float(blue)))


def inverse_depth(depth: NDArray[np.float32], kind: DepthKind) -> NDArray[np.float32]:
    """A depth map `H W` as `d` in [0, 1], near = 1, scaled by its own minimum and maximum.

    `inverse` maps (large = near, any unit) are only scaled. `metres` maps (large = far, 0 or less = no
    reading) become `(farthest − metres) / (farthest − nearest)`, not a reciprocal: the transmission then
    falls exponentially with the distance, as the Beer-Lambert law has it. No reading counts as farthest.

    Give the whole map, before any crop. Raises `BadImage` if all (read) values are equal.
    """
    if kind == "metres":
        depth = np.where(depth > 0, depth.max() - depth, np.float32(0))
    low, high = depth.min(), depth.max()
    if low == high:
        raise BadImage("depth map has the same value at every reading")
    return (depth - low) / (high - low)


def transmission(inverse_depth: NDArray[np.float32], beta: float) -> NDArray[np.float32]:
    """`T = exp(−2β(1 − d))`, `H W` in (0, 1], from the inverse depth `d`, `H W` in [0, 1]."""
    return np.exp(2 * beta * (inverse_depth - 1))


def add_haze(scene: NDArray[np.float32], transmission: NDArray[np.float32], haze: Haze) -> NDArray[np.float32]:
    """`scene · T + A · (1 − T)`, `H W 3` in [0, 1]; scene `H W 3` in [0, 1], transmission `H W` in (0, 1]."""
    hazy = np.empty_like(scene)
    # Channel by channel is five times faster than broadcasting over a last axis of three.
    for channel, airlight in enumerate(haze.airlight):
        hazy[..., channel] = (scene[..., channel] - airlight) * transmission + airlight
    return hazy


def procedural_depth(rng: np.random.Generator, height_px: int, width_px: int) -> NDArray[np.float32]:
    """A plausible outdoor inverse depth for an image that has none: `H W` in [0, 1], smooth, near = 1.

    A ground plane from the lower edge to a horizon, sky above it, and upright objects standing on the ground,
    each as far away as its foot. Their edges are soft, because the image has none in the same places.
    """
    scale = _SKETCH_PX / max(height_px, width_px)
    sketch = _outdoor_sketch(rng, max(round(height_px * scale), 8), max(round(width_px * scale), 8))
    depth = cv2.resize(sketch, (width_px, height_px), interpolation=cv2.INTER_LINEAR)
    return inverse_depth(np.asarray(depth, np.float32), "inverse")


def _outdoor_sketch(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    row, column = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j].astype(np.float32)
    horizon = rng.uniform(0.15, 0.6)
    # The inverse depth of a plane seen in perspective is linear in the image row.
    depth = np.clip((row - horizon) / (1 - horizon), 0, 1)
    for foot in np.sort(rng.uniform(horizon + 0.02, 1.0, size=rng.integers(1, 7))):  # far to near
        nearness = (foot - horizon) / (1 - horizon)
        tall = nearness * rng.uniform(0.2, 1.0)
        half_wide = nearness * rng.uniform(0.05, 0.35) + 0.02
        softness = rng.uniform(0.04, 0.12)
        side = half_wide - np.abs(column - rng.uniform(0, 1))
        cover = _soft_step(side, softness) * _soft_step(row - (foot - tall), softness) * (row <= foot)
        depth += cover * (nearness - depth)
    relief = cv2.resize(rng.uniform(0, 0.1, size=(4, 6)), (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.GaussianBlur((depth + relief).astype(np.float32), (0, 0), 1.0)


def _soft_step(distance: NDArray[np.float32], softness: float) -> NDArray[np.float32]:
    return 0.5 + 0.5 * np.tanh(distance / softness)
