"""Depth maps: scaled to inverse depth only where that is asked for, and made up for images that have none."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from corun_ray.core.choices import DepthKind
from corun_ray.core.data.augment import resize
from corun_ray.core.data.images import BadImage

_MAX_ASPECT_ERROR = 0.02  # a map of another size may be off by rounding, not show another frame
_SKETCH_PX = 96  # long side at which a procedural depth is drawn


@dataclass(frozen=True)
class DepthMap:
    """A whole depth map, and what its inverse depth `d` in [0, 1], near = 1, is scaled by.

    `inverse` maps (large = near, any unit) are only scaled. `metres` maps (large = far, 0 or less = no
    reading) become `(farthest − metres) / (farthest − nearest)`, not a reciprocal: the transmission then
    falls exponentially with the distance, as the Beer-Lambert law has it. No reading counts as farthest.
    """

    pixels: NDArray
    """`H W`, real numbers in the map's own unit."""
    kind: DepthKind
    low: np.float32
    high: np.float32
    """Least and largest value of the whole map; of `metres`, nearest and farthest reading."""

    @classmethod
    def of(cls, pixels: NDArray, kind: DepthKind) -> "DepthMap":
        """A map `H W` of any real numbers; raises `BadImage` if some are not finite or all (readings) are equal."""
        if pixels.dtype == np.float16:  # which numpy is slow with
            pixels = pixels.astype(np.float32)
        with np.errstate(over="ignore"):  # what float32 cannot hold turns infinite, and is refused as such
            low, high = np.float32(pixels.min()), np.float32(pixels.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise BadImage("depth map has values that are not finite")
        if low == high:
            raise BadImage(f"depth map is constant ({low:g} everywhere)")
        if kind == "metres" and low <= 0:
            low = np.float32(pixels.min(where=pixels > 0, initial=pixels.max()))
            if high <= low:
                raise BadImage("depth map has the same value at every reading")
        return cls(pixels, kind, low, high)

    def inverse(self, region: NDArray) -> NDArray[np.float32]:
        """The inverse depth of `h w` of the map's pixels, in [0, 1]."""
        depth = region.astype(np.float32)
        if self.kind == "metres":
            depth = np.where(depth > 0, self.high - depth, np.float32(0))
            return depth / (self.high - self.low)
        return (depth - self.low) / (self.high - self.low)

    def fitted(self, height_px: int, width_px: int) -> "DepthMap":
        """The map at its image's size; raises `BadImage` if it shows another frame than the image."""
        height, width = self.pixels.shape
        if (height, width) == (height_px, width_px):
            return self
        if abs(width * height_px / (height * width_px) - 1) > _MAX_ASPECT_ERROR:
            raise BadImage(f"depth map of {width} x {height} px does not fit its image of {width_px} x {height_px} px")
        # Inverted first: what has no reading must not be averaged with what has.
        return DepthMap(resize(self.inverse(self.pixels), height_px, width_px), "inverse", np.float32(0), np.float32(1))


def procedural_depth(rng: np.random.Generator, height_px: int, width_px: int) -> DepthMap:
    """A plausible outdoor depth for an image `height_px width_px` that has none: smooth, inverse.

    A ground plane from the lower edge to a horizon, sky above it, and upright objects standing on the ground,
    each as far away as its foot. Their edges are soft, because the image has none in the same places.
    """
    scale = _SKETCH_PX / max(height_px, width_px)
    sketch = _outdoor_sketch(rng, max(round(height_px * scale), 8), max(round(width_px * scale), 8))
    return DepthMap.of(cv2.resize(sketch, (width_px, height_px), interpolation=cv2.INTER_LINEAR), "inverse")


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
