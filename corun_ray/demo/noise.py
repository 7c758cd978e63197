"""Fractal noise over the ground plane: seamless tiles made once, sampled at world coordinates."""

from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
"""Float32 throughout the package, unless a docstring says otherwise."""
NoiseKind = Literal["fractal", "ridged", "grain"]

_TILE_PX = 1024
_COARSEST_LATTICE = 4
_MARGIN_PX = 3


@dataclass(frozen=True)
class Field:
    """One independent noise field; `field(x, z)` is about zero-mean with unit deviation.

    `size_m` is the width of the tile: the coarsest features measure a quarter of it, the finest
    1/1000 ("ridged": 1/256). "fractal" is cloud-like, "ridged" has sharp crests, "grain" is nearly as
    strong in its finest features as in its coarsest.
    """

    tile: Array
    size_m: float
    angle: float
    offset: tuple[float, float]

    def __call__(self, x: Array, z: Array) -> Array:
        """Sample the field at world coordinates in metres.

        `x` and `z` are 2-D arrays of one shape.
        """
        scale = _TILE_PX / self.size_m
        cos, sin = np.float32(np.cos(self.angle) * scale), np.float32(np.sin(self.angle) * scale)

        # Turn, scale and shift into the tile.
        u = x * cos - z * sin + np.float32(self.offset[0])
        v = x * sin + z * cos + np.float32(self.offset[1])
        # The tile carries a margin of itself: OpenCV's own wrap-around is wrong far from the image.
        u -= np.floor(u * np.float32(1 / _TILE_PX)) * np.float32(_TILE_PX)
        v -= np.floor(v * np.float32(1 / _TILE_PX)) * np.float32(_TILE_PX)
        return cv2.remap(self.tile, u + np.float32(_MARGIN_PX), v + np.float32(_MARGIN_PX), cv2.INTER_CUBIC)


class Noise:
    """The tiles all scenes of a dataset share; `field` cuts an independent field out of them."""

    def __init__(self, rng: np.random.Generator) -> None:
        """Make the tiles."""
        self._tiles = {
            "fractal": _make_tile(rng, octaves=9, gain=0.5),
            "ridged": _make_tile(rng, octaves=7, gain=0.5, ridged=True),
            "grain": _make_tile(rng, octaves=9, gain=0.85),
        }

    def draw_field(self, rng: np.random.Generator, size_m: float, kind: NoiseKind = "fractal") -> Field:
        """Draw a field at a tile's random place and angle.

        The tile spans `size_m` metres.
        """
        u, v = rng.uniform(0, _TILE_PX, 2)
        return Field(self._tiles[kind], size_m, rng.uniform(0, 2 * np.pi), (float(u), float(v)))


def _make_tile(rng: np.random.Generator, octaves: int, gain: float, ridged: bool = False) -> Array:
    """Make a tile: a sum of octaves of value noise.

    Each octave is finer by 2 and weaker by `gain` than the one before.
    """
    total = np.zeros((_TILE_PX, _TILE_PX), np.float32)
    for octave in range(octaves):
        lattice_px = _COARSEST_LATTICE << octave

        # Each octave has a lattice twice as fine as the one before.
        value = _enlarge_periodically(rng.standard_normal((lattice_px, lattice_px), dtype=np.float32))
        total += (0.8 - 1.6 * np.abs(value) if ridged else value) * np.float32(gain**octave)

    # Zero mean and unit deviation, with a margin of the tile itself.
    return np.pad((total - total.mean()) / total.std(), _MARGIN_PX, mode="wrap")


def _enlarge_periodically(lattice: Array) -> Array:
    """Enlarge a periodic lattice to a seamless tile."""
    pad = 2
    factor = _TILE_PX // lattice.shape[0]
    padded = np.pad(lattice, pad, mode="wrap")
    large = cv2.resize(padded, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    return large[pad * factor : pad * factor + _TILE_PX, pad * factor : pad * factor + _TILE_PX]
