"""Depth maps: conversion to inverse depth, and procedural depth for images that have no map."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from corun_ray.core.choices import DepthKind
from corun_ray.core.data.augment import resize
from corun_ray.core.data.images import BadImage

# A map of another size may have a rounded aspect ratio, but must not show another frame.
_MAX_ASPECT_ERROR = 0.02
# The long side at which procedural depth is drawn.
_SKETCH_PX = 96
_MIN_SKETCH_PX = 8


@dataclass(frozen=True)
class DepthMap:
    """A whole depth map, with the range that scales it to inverse depth `d` in [0, 1], near = 1.

    `inverse` maps (large = near, any unit) are only scaled. `metres` maps (large = far, 0 or less = no reading)
    become `(farthest − metres) / (farthest − nearest)`, not a reciprocal: the transmission then falls exponentially
    with the distance, as the Beer-Lambert law has it. A pixel without a reading counts as farthest.
    """

    pixels: NDArray
    """`H W`, real numbers in the map's own unit."""
    kind: DepthKind
    low: np.float32
    """Least value of the whole map; of `metres`, the nearest reading."""
    high: np.float32
    """Largest value of the whole map; of `metres`, the farthest reading."""

    @classmethod
    def from_pixels(cls, pixels: NDArray, kind: DepthKind) -> "DepthMap":
        """Make a map of `H W` real numbers.

        Raises `BadImage` where a value is not finite, or where all values (of `metres`: all readings) are equal.
        """
        # numpy is slow with float16.
        if pixels.dtype == np.float16:
            pixels = pixels.astype(np.float32)

        # Values beyond float32 overflow to infinity and are refused as such.
        with np.errstate(over="ignore"):
            low, high = np.float32(pixels.min()), np.float32(pixels.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise BadImage("depth map has values that are not finite")
        if low == high:
            raise BadImage(f"depth map is constant ({low:g} everywhere)")

        # Pixels without a reading must not count as the nearest.
        if kind == "metres" and low <= 0:
            low = np.float32(pixels.min(where=pixels > 0, initial=pixels.max()))
            if high <= low:
                raise BadImage("depth map has the same value at every reading")

        return cls(pixels, kind, low, high)

    def to_inverse(self, region: NDArray) -> NDArray[np.float32]:
        """Convert pixels to inverse depth in [0, 1].

        `region` is any part `h w` of the map's pixels.
        """
        depth = region.astype(np.float32)
        if self.kind == "metres":
            depth = np.where(depth > 0, self.high - depth, np.float32(0))
            return depth / (self.high - self.low)
        return (depth - self.low) / (self.high - self.low)

    def fit_to_image(self, height_px: int, width_px: int) -> "DepthMap":
        """Return the map at its image's size.

        Raises `BadImage` if the map has another aspect ratio than the image.
        """
        height, width = self.pixels.shape
        if (height, width) == (height_px, width_px):
            return self
        if abs(width * height_px / (height * width_px) - 1) > _MAX_ASPECT_ERROR:
            raise BadImage(f"depth map of {width} x {height} px does not fit its image of {width_px} x {height_px} px")

        # Invert before resizing: pixels without a reading must not be averaged with readings.
        resized = resize(self.to_inverse(self.pixels), height_px, width_px)
        return DepthMap(resized, "inverse", np.float32(0), np.float32(1))


def draw_procedural_depth(rng: np.random.Generator, height_px: int, width_px: int) -> DepthMap:
    """Draw a plausible outdoor depth, smooth and inverse.

    The depth is for an image without a depth map. The scene is a ground plane from the lower edge to a horizon, sky
    above it, and upright objects standing on the ground, each as far away as its foot. The objects' edges are soft,
    because the image has no edges in the same places.
    """
    scale = _SKETCH_PX / max(height_px, width_px)
    sketch_height = max(round(height_px * scale), _MIN_SKETCH_PX)
    sketch_width = max(round(width_px * scale), _MIN_SKETCH_PX)
    sketch = _sketch_outdoors(rng, sketch_height, sketch_width)
    return DepthMap.from_pixels(cv2.resize(sketch, (width_px, height_px), interpolation=cv2.INTER_LINEAR), "inverse")


def _sketch_outdoors(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """Draw an outdoor scene's inverse depth, `height width`.

    Lengths are shares of the image's sides.
    """
    row, column = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j].astype(np.float32)

    # The ground: the inverse depth of a plane seen in perspective is linear in the image row.
    horizon = rng.uniform(0.15, 0.6)
    depth = np.clip((row - horizon) / (1 - horizon), 0, 1)

    # Upright objects from far to near, each with the depth of the ground at its foot.
    for foot in np.sort(rng.uniform(horizon + 0.02, 1.0, size=rng.integers(1, 7))):
        nearness = (foot - horizon) / (1 - horizon)
        tall = nearness * rng.uniform(0.2, 1.0)
        half_wide = nearness * rng.uniform(0.05, 0.35) + 0.02
        softness = rng.uniform(0.04, 0.12)

        side = half_wide - np.abs(column - rng.uniform(0, 1))
        cover = _soft_step(side, softness) * _soft_step(row - (foot - tall), softness) * (row <= foot)
        depth += cover * (nearness - depth)

    # A relief keeps the sky and the objects from being flat.
    relief = cv2.resize(rng.uniform(0, 0.1, size=(4, 6)), (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.GaussianBlur((depth + relief).astype(np.float32), (0, 0), 1.0)


def _soft_step(distance: NDArray[np.float32], softness: float) -> NDArray[np.float32]:
    """Rise from 0 to 1 where `distance` turns positive."""
    return 0.5 + 0.5 * np.tanh(distance / softness)
