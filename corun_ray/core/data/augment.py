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

from corun_ray.core.choices import CameraKind, ResizeKind
from corun_ray.core.data.images import ImageU8, decode_image

# JPEG blocks are 8 px; with chroma at half resolution the grid repeats every 16 px.
_JPEG_GRID_PX = 16
# Number of equally likely quantiles that unit noise is drawn from.
_NOISE_QUANTILES = 2**16

StrongOperation = Callable[[ImageU8, float], ImageU8]
"""Image and strength → image."""

# --- Geometry ---


class Sliceable(Protocol):
    """An image `H W …` that gives a region: an array, or a file that is decoded only as far as needed."""

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
        """Cut the region at the source's own resolution.

        Returns `side side …`. The region of an array `H W …` is a view.
        """
        rows = slice(self.top_px, self.top_px + self.side_px)
        return pixels[rows, self.left_px : self.left_px + self.side_px]

    def finish(self, region: NDArray, patch_px: int, method: ResizeKind = "area") -> NDArray:
        """Turn a cut region into a patch `patch_px patch_px …`.

        Resizes, then mirrors left to right, then turns.
        """
        patch = resize(region, patch_px, patch_px, method)
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
    """Draw a random crop.

    A crop has a place, a coin for the flip and, with `rotation`, one of the four quarter turns. With `random_resize`
    the image is first scaled so that its short side falls uniformly in [patch_px, its own size]. An image smaller than
    the patch is enlarged to just fit.
    """
    # Instead of scaling the image, scale the region's side by the inverse factor.
    short_px = min(height_px, width_px)
    side_px = min(patch_px, short_px)
    if random_resize and short_px > patch_px:
        side_px = round(patch_px * short_px / rng.uniform(patch_px, short_px))

    return Crop(
        top_px=int(rng.integers(height_px - side_px + 1)),
        left_px=int(rng.integers(width_px - side_px + 1)),
        side_px=side_px,
        flip=bool(rng.random() < 0.5),
        # Drawn last and only on request: jobs without rotation keep their random numbers.
        quarter_turns=int(rng.integers(4)) if rotation else 0,
    )


def resize(pixels: NDArray, height_px: int, width_px: int, method: ResizeKind = "area") -> NDArray:
    """Resize `H W …`.

    `area`: a side that shrinks is averaged over area, so nothing aliases; a side that grows is interpolated. `cubic`:
    bicubic without antialiasing, as published; fine detail then becomes stronger than it was.
    """
    if method == "cubic":
        same = pixels.shape[:2] == (height_px, width_px)
        cubic = pixels if same else cv2.resize(pixels, (width_px, height_px), interpolation=cv2.INTER_CUBIC)
        return np.ascontiguousarray(cubic)

    # Shrink first: averaging over area leaves less to interpolate.
    smaller = min(pixels.shape[0], height_px), min(pixels.shape[1], width_px)
    if smaller != pixels.shape[:2]:
        pixels = cv2.resize(pixels, smaller[::-1], interpolation=cv2.INTER_AREA)

    # Not INTER_LINEAR, which loses a tenth of a level on average in uint8.
    if smaller != (height_px, width_px):
        pixels = cv2.resize(pixels, (width_px, height_px), interpolation=cv2.INTER_LINEAR_EXACT)

    return np.ascontiguousarray(pixels)


# --- Camera degradations ---


@dataclass(frozen=True)
class CameraFaults:
    """How often a synthetic hazy image is darkened, noisy and compressed, and how much."""

    darkening_share: float = 0.5
    noise_share: float = 0.5
    noise_levels: tuple[int, int] = (2, 25)
    """Least and greatest standard deviation, in 255ths."""
    jpeg_share: float = 0.5
    jpeg_qualities: tuple[int, int] = (30, 95)


CAMERA_FAULTS: dict[CameraKind, CameraFaults] = {
    "published": CameraFaults(),
    "mild": CameraFaults(darkening_share=0, noise_levels=(1, 6), jpeg_qualities=(60, 95)),
    "none": CameraFaults(darkening_share=0, noise_share=0, jpeg_share=0),
}
"""The published faults are those of Fang et al., 2024. The others are ours."""


@dataclass(frozen=True)
class Camera:
    """A camera that may darken its shots and add noise to them."""

    gamma: float
    """Exponent of the darkening, at least 1; 1 darkens nothing."""
    noise: NDArray[np.float32] | None
    """A mixing matrix of `sample_noise`; None: no noise."""


def sample_camera(rng: np.random.Generator, faults: CameraFaults = CAMERA_FAULTS["published"]) -> Camera:
    """Draw a camera.

    The published one darkens with p = ½ and adds noise with p = ½.
    """
    gamma = rng.uniform(1.5, 3.0) if rng.random() < faults.darkening_share else 1.0
    noise = sample_noise(rng, faults.noise_levels) if rng.random() < faults.noise_share else None
    return Camera(float(gamma), noise)


def degrade(rng: np.random.Generator, clear: ImageU8, camera: Camera) -> NDArray[np.float32]:
    """Take the camera's shot of a clear image.

    `clear` is `H W 3`; returns float32 in [0, 1].
    """
    shot = darken(clear, camera.gamma)
    if camera.noise is None:
        return shot

    # A matrix `1 3` mixes one noise image into three channels, a matrix `3 3` three.
    independent = draw_unit_noise(rng, (*clear.shape[:2], len(camera.noise)))
    if len(camera.noise) == 1:
        shot += cv2.merge([independent * level for level in camera.noise[0]])
    else:
        shot += independent @ camera.noise
    np.clip(shot, 0, 1, out=shot)
    return shot


def darken(rgb: ImageU8, gamma: float) -> NDArray[np.float32]:
    """Compute `x ** gamma` as float32.

    The image x is in [0, 1]; gamma 1 only converts.
    """
    levels = np.linspace(0, 1, 256) ** gamma
    return np.asarray(cv2.LUT(rgb, levels.astype(np.float32)), np.float32)


def sample_noise(
    rng: np.random.Generator, levels: tuple[int, int] = CAMERA_FAULTS["published"].noise_levels
) -> NDArray[np.float32]:
    """Draw a sensor noise.

    Returns the matrix, `1 3` or `3 3`, that mixes unit normal noise into red, green, blue. Its level is an integer
    number of 255ths within `levels`. 40 % colour (independent channels), 40 % grey (equal channels), 20 % correlated:
    the greatest level, covariance `|level² · Uᵀ D U|`, absolute value by value. D is uniform in [0, 1]; U is an
    orthonormal basis of three vectors that are uniform in [0, 1].
    """
    least, greatest = levels
    kind = rng.random()
    level = rng.integers(least, greatest + 1) / 255

    if kind < 0.4:
        mixing = level * np.eye(3)
    elif kind < 0.8:
        mixing = level * np.ones((1, 3))
    else:
        basis = np.linalg.svd(rng.uniform(size=(3, 3))).U
        covariance = np.abs(basis.T @ np.diag(rng.uniform(size=3)) @ basis)

        # The absolute values may have no root. Singular values give that of the nearest matrix that has one.
        _, variances, axes = np.linalg.svd(covariance)
        mixing = greatest / 255 * np.sqrt(variances)[:, None] * axes

    return mixing.astype(np.float32)


def draw_unit_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Draw independent values of a standard normal distribution.

    No value lies further than 4.3 from 0. Each is one of 65,536 equally likely quantiles. `rng.standard_normal` takes
    four times as long, and its finer values are lost in images of 8 bits.
    """
    return np.take(_list_normal_quantiles(), rng.integers(_NOISE_QUANTILES, size=shape, dtype=np.uint16))


@lru_cache(maxsize=1)
def _list_normal_quantiles() -> NDArray[np.float32]:
    """Return normal quantiles at the middles of equally likely intervals."""
    quantile = NormalDist().inv_cdf
    return np.array([quantile((number + 0.5) / _NOISE_QUANTILES) for number in range(_NOISE_QUANTILES)], np.float32)


def sample_jpeg_quality(rng: np.random.Generator, faults: CameraFaults = CAMERA_FAULTS["published"]) -> int | None:
    """Draw a JPEG quality, as published in 30…95 with p = ½.

    Returns None for an image that is not compressed.
    """
    return draw_jpeg_quality(rng, faults) if rng.random() < faults.jpeg_share else None


def draw_jpeg_quality(rng: np.random.Generator, faults: CameraFaults) -> int:
    """Draw the JPEG quality of an image that is compressed."""
    least, greatest = faults.jpeg_qualities
    return int(rng.integers(least, greatest + 1))


def apply_jpeg(rgb: ImageU8, quality: int, *, top_px: int = 0, left_px: int = 0) -> ImageU8:
    """Encode and decode an image as JPEG.

    `top_px` and `left_px` say where the region began in its image: its blocks then lie as they would if the whole
    image had been compressed.
    """
    # Pad at the top and left, so that the region begins at the same place of the block grid as in its image.
    top_px, left_px = top_px % _JPEG_GRID_PX, left_px % _JPEG_GRID_PX
    padded = np.asarray(cv2.copyMakeBorder(rgb, top_px, 0, left_px, 0, cv2.BORDER_REPLICATE), np.uint8)
    return decode_image(encode_jpeg(padded, quality))[top_px:, left_px:]


def encode_jpeg(rgb: ImageU8, quality: int) -> bytes:
    """Encode an image as a JPEG file."""
    encoded = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return encoded.tobytes()


# --- Strong view ---


def make_strong_view(rng: np.random.Generator, rgb: ImageU8) -> ImageU8:
    """Make the student's view.

    Two operations, drawn with replacement, are applied one after the other.
    """
    for operation, strength in sample_strong_operations(rng):
        rgb = operation(rgb, strength)
    return rgb


def sample_strong_operations(rng: np.random.Generator) -> list[tuple[StrongOperation, float]]:
    """Draw two of the six operations, each with a strength.

    Operations are drawn with replacement.
    """
    # Both operations are drawn before the strengths: the order decides the random numbers.
    indices = rng.integers(len(_STRONG_OPERATIONS), size=2)

    drawn = []
    for index in indices:
        operation, sample_strength = _STRONG_OPERATIONS[index]
        drawn.append((operation, sample_strength(rng)))
    return drawn


def adjust_contrast(rgb: ImageU8, factor: float) -> ImageU8:
    """Blend with the image's mean grey.

    Factor 1 is the image, factor 0 the grey.
    """
    mean_grey = float(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY).mean())
    return _map_levels(rgb, mean_grey + factor * (np.arange(256) - mean_grey))


def adjust_brightness(rgb: ImageU8, factor: float) -> ImageU8:
    """Blend with black.

    Factor 1 is the image, factor 0 black.
    """
    return _map_levels(rgb, factor * np.arange(256))


def posterize(rgb: ImageU8, bits: float) -> ImageU8:
    """Keep the `bits` highest of each value's 8 bits."""
    return rgb & np.uint8(256 - 2 ** (8 - int(bits)))


def adjust_sharpness(rgb: ImageU8, factor: float) -> ImageU8:
    """Blend with a 3 × 3 smoothed image.

    Factor 1 is the image, factor 0 the smoothed one. The smoothed image keeps the outermost pixels.
    """
    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    smooth = rgb.copy()
    smooth[1:-1, 1:-1] = cv2.filter2D(rgb, -1, kernel / kernel.sum())[1:-1, 1:-1]
    return np.asarray(cv2.addWeighted(rgb, factor, smooth, 1 - factor, 0), np.uint8)


def blur(rgb: ImageU8, radius_px: float) -> ImageU8:
    """Blur by a Gaussian whose standard deviation is `radius_px`."""
    return np.asarray(cv2.GaussianBlur(rgb, (0, 0), radius_px), np.uint8)


def _map_levels(rgb: ImageU8, levels: NDArray[np.floating]) -> ImageU8:
    """Replace each value by its entry in `levels`.

    `levels` has 256 entries, which are rounded and clipped.
    """
    return np.asarray(cv2.LUT(rgb, np.clip(np.rint(levels), 0, 255).astype(np.uint8)), np.uint8)


# Operations with the draw of their strength; contrast stands twice, so it is drawn twice as often.
_STRONG_OPERATIONS: tuple[tuple[StrongOperation, Callable[[np.random.Generator], float]], ...] = (
    (adjust_contrast, lambda rng: rng.uniform(0.05, 0.95)),
    (adjust_brightness, lambda rng: rng.uniform(0.05, 0.95)),
    (adjust_contrast, lambda rng: rng.uniform(0.25, 0.95)),
    (posterize, lambda rng: float(rng.integers(4, 8))),
    (adjust_sharpness, lambda rng: rng.uniform(0.05, 0.95)),
    (blur, lambda rng: float(rng.choice([1, 3, 5], p=[0.404, 0.404, 0.192]))),
)
