"""What happens to an image on its way to the network: crops, camera degradations, the strong view.

Source: the data pipeline of Fang et al., NeurIPS 2024, arXiv 2406.07966. Images are RGB, `H W 3`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

ImageU8 = NDArray[np.uint8]

# --- Geometry ---


class Sliceable(Protocol):
    """An image `H W …` of which a region can be had: an array, or a file that is decoded no further than for that."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, region: tuple[slice, slice], /) -> NDArray: ...


@dataclass(frozen=True)
class Crop:
    """A square region of a source image that becomes one patch: cut, resized, then perhaps mirrored and turned.

    Resizing an image by `patch_px / side_px` and cropping `patch_px` out of it keeps exactly this region;
    taking the region first spares the work on all other pixels.
    """

    top_px: int
    left_px: int
    side_px: int
    flip: bool
    quarter_turns: int = 0
    """Turns by 90 degrees, counter-clockwise, after the flip."""

    def cut(self, pixels: Sliceable) -> NDArray:
        """The region at the source's own resolution, `side side …`; of an array `H W …` a view."""
        rows = slice(self.top_px, self.top_px + self.side_px)
        return pixels[rows, self.left_px : self.left_px + self.side_px]

    def finish(self, region: NDArray, patch_px: int) -> NDArray:
        """A cut region brought to `patch_px patch_px …`, mirrored left to right and turned if the crop says so."""
        patch = resize(region, patch_px, patch_px)
        if self.flip:
            patch = cv2.flip(patch, 1)
        return np.ascontiguousarray(np.rot90(patch, self.quarter_turns))


def sample_crop(
    rng: np.random.Generator,
    height_px: int,
    width_px: int,
    *,
    patch_px: int,
    random_resize: bool,
    rotation: bool = False,
) -> Crop:
    """Draws a crop of `patch_px`, a coin for the flip and, with `rotation`, one of the four quarter turns.

    With `random_resize` the image is first scaled so that its short side falls uniformly in [patch_px, its
    own size]. An image smaller than the patch is enlarged to just fit.
    """
    short_px = min(height_px, width_px)
    side_px = min(patch_px, short_px)
    if random_resize and short_px > patch_px:
        side_px = round(patch_px * short_px / rng.uniform(patch_px, short_px))
    return Crop(
        top_px=int(rng.integers(height_px - side_px + 1)),
        left_px=int(rng.integers(width_px - side_px + 1)),
        side_px=side_px,
        flip=bool(rng.random() < 0.5),
        # Drawn last, and only if wanted: jobs without rotation keep their random numbers.
        quarter_turns=int(rng.integers(4)) if rotation else 0,
    )


def resize(pixels: NDArray, height_px: int, width_px: int) -> NDArray:
    """Resizes `H W …`: a side that shrinks is averaged over area, so nothing aliases; one that grows is
    interpolated."""
    smaller = min(pixels.shape[0], height_px), min(pixels.shape[1], width_px)
    if smaller != pixels.shape[:2]:
        pixels = cv2.resize(pixels, smaller[::-1], interpolation=cv2.INTER_AREA)
    if smaller != (height_px, width_px):  # INTER_LINEAR loses a tenth of a level on average in uint8
        pixels = cv2.resize(pixels, (width_px, height_px), interpolation=cv2.INTER_LINEAR_EXACT)
    return np.ascontiguousarray(pixels)


# --- Camera degradations ---

_JPEG_GRID_PX = 16  # a block of 8 px, twice with chroma at half resolution


@dataclass(frozen=True)
class Camera:
    """One that takes worse shots."""

    gamma: float
    """1 or, if it darkens, more."""
    noise: NDArray[np.float32] | None
    """What `sample_noise` gives; None: it adds no noise."""


def sample_camera(rng: np.random.Generator) -> Camera:
    """One that darkens with p = ½ and adds noise with p = ½."""
    gamma = rng.uniform(1.5, 3.0) if rng.random() < 0.5 else 1.0
    return Camera(float(gamma), sample_noise(rng) if rng.random() < 0.5 else None)


def degrade(rng: np.random.Generator, clear: ImageU8, camera: Camera) -> NDArray[np.float32]:
    """The camera's shot of a clear image `H W 3`, float in [0, 1]."""
    shot = darken(clear, camera.gamma)
    if camera.noise is not None:
        independent = draw_unit_noise(rng, (*clear.shape[:2], len(camera.noise)))
        if len(camera.noise) == 1:
            shot += cv2.merge([independent * level for level in camera.noise[0]])
        else:
            shot += independent @ camera.noise
        np.clip(shot, 0, 1, out=shot)
    return shot


def darken(rgb: ImageU8, gamma: float) -> NDArray[np.float32]:
    """`x ** gamma` of an image x in [0, 1], as float32; gamma 1 only converts."""
    levels = np.linspace(0, 1, 256) ** gamma
    return np.asarray(cv2.LUT(rgb, levels.astype(np.float32)), np.float32)


def draw_unit_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Independent draws from a normal distribution of mean 0 and deviation 1, up to 4.3 from it.

    Each is one of 65,536 equally likely quantiles: `rng.standard_normal` takes four times as long, and what it has
    beyond is lost in images of 8 bits.
    """
    return np.take(_normal_quantiles(), rng.integers(2**16, size=shape, dtype=np.uint16))


@lru_cache(maxsize=1)
def _normal_quantiles() -> NDArray[np.float32]:
    quantile = NormalDist().inv_cdf
    return np.array([quantile((number + 0.5) / 2**16) for number in range(2**16)], np.float32)


def sample_noise(rng: np.random.Generator) -> NDArray[np.float32]:
    """Draws a sensor noise: the matrix, `1 3` or `3 3`, that mixes unit normal noise into red, green, blue.

    Its level is an integer in 2…25 of 255. 40 % colour (independent channels), 40 % grey (equal channels),
    20 % correlated: level 25, covariance `level² · Uᵀ D U`, U a random rotation, D uniform in [0, 1].
    """
    kind = rng.random()
    level = rng.integers(2, 26) / 255
    if kind < 0.4:
        mixing = level * np.eye(3)
    elif kind < 0.8:
        mixing = level * np.ones((1, 3))
    else:
        rotation = np.linalg.qr(rng.standard_normal((3, 3))).Q
        mixing = 25 / 255 * np.sqrt(rng.uniform(size=(3, 1))) * rotation
    return mixing.astype(np.float32)


def sample_jpeg_quality(rng: np.random.Generator) -> int | None:
    """A quality in 30…95 with p = ½, else None."""
    return int(rng.integers(30, 96)) if rng.random() < 0.5 else None


def apply_jpeg(rgb: ImageU8, quality: int, *, top_px: int = 0, left_px: int = 0) -> ImageU8:
    """Encodes and decodes as JPEG.

    `top_px` and `left_px` say where in its image a cut region began: its blocks then lie as they would had
    the whole image been compressed.
    """
    top_px, left_px = top_px % _JPEG_GRID_PX, left_px % _JPEG_GRID_PX
    padded = cv2.copyMakeBorder(rgb, top_px, 0, left_px, 0, cv2.BORDER_REPLICATE)
    jpeg = cv2.imencode(".jpg", cv2.cvtColor(padded, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    decoded = np.asarray(cv2.imdecode(jpeg, cv2.IMREAD_COLOR_RGB), np.uint8)
    return decoded[top_px:, left_px:]


# --- Strong view ---


def make_strong_view(rng: np.random.Generator, rgb: ImageU8) -> ImageU8:
    """The student's view: two operations, drawn with replacement, one after the other."""
    for operation, strength in sample_strong_operations(rng):
        rgb = operation(rgb, strength)
    return rgb


StrongOperation = Callable[[ImageU8, float], ImageU8]


def sample_strong_operations(rng: np.random.Generator) -> list[tuple[StrongOperation, float]]:
    """Draws two of the six operations, with replacement, and a strength for each."""
    drawn = [_STRONG_OPERATIONS[index] for index in rng.integers(len(_STRONG_OPERATIONS), size=2)]
    return [(operation, strength(rng)) for operation, strength in drawn]


def adjust_contrast(rgb: ImageU8, factor: float) -> ImageU8:
    """Blends the image (factor 1) with its mean grey (factor 0)."""
    mean_grey = float(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY).mean())
    return _map_levels(rgb, mean_grey + factor * (np.arange(256) - mean_grey))


def adjust_brightness(rgb: ImageU8, factor: float) -> ImageU8:
    """Blends the image (factor 1) with black (factor 0)."""
    return _map_levels(rgb, factor * np.arange(256))


def posterize(rgb: ImageU8, bits: float) -> ImageU8:
    """Keeps the `bits` highest of each value's 8 bits."""
    return rgb & np.uint8(256 - 2 ** (8 - int(bits)))


def adjust_sharpness(rgb: ImageU8, factor: float) -> ImageU8:
    """Blends the image (factor 1) with a 3 × 3 smoothed one (factor 0) that keeps the outermost pixels."""
    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    smooth = rgb.copy()
    smooth[1:-1, 1:-1] = cv2.filter2D(rgb, -1, kernel / kernel.sum())[1:-1, 1:-1]
    return np.asarray(cv2.addWeighted(rgb, factor, smooth, 1 - factor, 0), np.uint8)


def blur(rgb: ImageU8, radius_px: float) -> ImageU8:
    """Blurs by a Gaussian whose standard deviation is `radius_px`."""
    return np.asarray(cv2.GaussianBlur(rgb, (0, 0), radius_px), np.uint8)


def _map_levels(rgb: ImageU8, levels: NDArray[np.floating]) -> ImageU8:
    return np.asarray(cv2.LUT(rgb, np.clip(np.rint(levels), 0, 255).astype(np.uint8)), np.uint8)


_STRONG_OPERATIONS: tuple[tuple[StrongOperation, Callable[[np.random.Generator], float]], ...] = (
    (adjust_contrast, lambda rng: rng.uniform(0.05, 0.95)),
    (adjust_brightness, lambda rng: rng.uniform(0.05, 0.95)),
    (adjust_contrast, lambda rng: rng.uniform(0.25, 0.95)),
    (posterize, lambda rng: float(rng.integers(4, 9))),
    (adjust_sharpness, lambda rng: rng.uniform(0.05, 0.95)),
    (blur, lambda rng: float(rng.choice([1, 3, 5], p=[1 / 2, 1 / 3, 1 / 6]))),
)
