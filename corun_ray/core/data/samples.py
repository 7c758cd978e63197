"""Training samples made on the fly: synthetic and paired patches, two views of real hazy images.

Source: Fang et al., NeurIPS 2024, arXiv 2406.07966. Images are RGB uint8, `H W 3`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from corun_ray.core.choices import ResizeKind
from corun_ray.core.data import augment
from corun_ray.core.data.augment import CAMERA_FAULTS, Camera, CameraFaults, Crop, Sliceable, StrongOperation
from corun_ray.core.data.depth import DepthMap
from corun_ray.core.data.haze import Haze, HazeRange, add_haze, compute_density, compute_transmission, sample_haze
from corun_ray.core.data.images import BadImage, ImageU8, decode_image
from corun_ray.core.timing import phase

SAMPLES_VERSION = 2
"""Raised where the same random numbers give other samples. Version 1 compressed real patches, not photographs."""

# Haze is laid over bands of so many rows: their temporaries stay in the processor's cache.
_BAND_ROWS = 32
# Real images are decoded larger than the patch: with less, a JPEG's reduced decoding would blur the patch visibly.
_REAL_OVERSIZE = 1.75
DEPTH_LEVELS = 2**15 - 1
"""Steps of a drawn pair's inverse depth from the farthest to the nearest point: 0.02 levels of an image at most."""
MAX_BORDER = 0.2
"""Share of a truth's side that its border may have, both ends together. RESIDE's has 0.03 to 0.04."""


@dataclass(frozen=True)
class Pair:
    """A hazy (or otherwise degraded) patch and its clear truth, both `p p 3` and aligned."""

    hazy: ImageU8
    clear: ImageU8
    jpeg_quality: int | None
    """Quality of the JPEG round trip of the hazy patch; None: it took none here."""
    transmission: NDArray[np.uint8] | None = None
    """True transmission of the haze, `p p`, 255 is clear air; None where it is unknown or was not asked for."""


@dataclass(frozen=True)
class RealViews:
    """The teacher's weak and the student's strong view of one real hazy image, both `p p 3` and aligned."""

    weak: ImageU8
    strong: ImageU8


# --- Samples of which only the random part is made ---


@dataclass(frozen=True)
class DrawnPair:
    """A synthetic pair before its pixel work: a cut region and all that was drawn for it.

    `device_samples` makes the pair of it.
    """

    region: ImageU8
    """The clear region at the image's own resolution, `side side 3`."""
    inverse_depth: NDArray[np.int16]
    """Its inverse depth, `side side`, in units of 1 / `DEPTH_LEVELS`."""
    crop: Crop
    haze: Haze
    camera: Camera
    noise_seed: int | None
    """Seed of the noise of every pixel; None for a camera without noise."""
    jpeg_quality: int | None
    """Quality of the JPEG round trip of the hazy region; None: it takes none."""
    patch_px: int
    resize: ResizeKind


@dataclass(frozen=True)
class StrongDraw:
    """The operations of a strong view, in their order, each with its strength."""

    operations: tuple[tuple[StrongOperation, float], ...]


@dataclass(frozen=True)
class DrawnViews:
    """The weak view of one real hazy image, `p p 3`, and what makes the strong one of it."""

    weak: ImageU8
    strong: StrongDraw


# --- Synthetic and paired patches ---


def make_synthetic_pair(
    clear: Sliceable,
    depth_map: DepthMap,
    rng: np.random.Generator,
    *,
    patch_px: int,
    haze_range: HazeRange,
    random_resize: bool,
    rotation: bool = False,
    camera_faults: CameraFaults = CAMERA_FAULTS["published"],
    with_transmission: bool = False,
    resize: ResizeKind = "area",
) -> Pair:
    """Lay random haze over a random crop.

    `clear` is a whole clear image `H W 3`. `depth_map` is the whole image's; a map of another resolution is resized.
    Only the region that the crop keeps is processed, at its own resolution: noise and JPEG are the camera's, so
    resizing to the patch softens them. With `with_transmission`, the pair has the true transmission too.

    Raises `BadImage` if the depth map has another aspect ratio than the image.
    """
    # Choose the crop, then cut it from the image and its depth.
    crop, depth_map = _draw_crop(clear, depth_map, rng, patch_px, random_resize=random_resize, rotation=rotation)
    truth, depth = crop.cut(clear), crop.cut(depth_map.pixels)

    # Take a worse shot of the clear region and lay haze over it.
    with phase("synthesis"):
        haze = sample_haze(rng, haze_range)
        camera = augment.sample_camera(rng, camera_faults)
        hazy, levels = lay_haze(rng, truth, depth, depth_map.to_inverse, haze, camera)

    # Compress with the blocks where the whole image would have them.
    with phase("jpeg"):
        jpeg_quality = augment.sample_jpeg_quality(rng, camera_faults)
        if jpeg_quality is not None:
            hazy = augment.apply_jpeg(hazy, jpeg_quality, top_px=crop.top_px, left_px=crop.left_px)

    with phase("resize"):
        known = crop.finish(levels, patch_px, resize) if with_transmission else None
        return Pair(crop.finish(hazy, patch_px, resize), crop.finish(truth, patch_px, resize), jpeg_quality, known)


def lay_haze(
    rng: np.random.Generator,
    truth: ImageU8,
    depth: NDArray,
    to_inverse: Callable[[NDArray], NDArray[np.float32]],
    haze: Haze,
    camera: Camera,
) -> tuple[ImageU8, NDArray[np.uint8]]:
    """Take a camera's shot of a clear region and lay haze over it, band by band.

    `truth` is `s s 3`; `to_inverse` makes inverse depth of rows of `depth`, `s s`. `rng` draws the camera's noise.
    Returns the hazy region, `s s 3`, and its transmission, `s s`, 255 is clear air.
    """
    hazy = np.empty(truth.shape, np.uint8)
    levels = np.empty(truth.shape[:2], np.uint8)
    density = compute_density(haze, *truth.shape[:2])
    for top in range(0, truth.shape[0], _BAND_ROWS):
        band = slice(top, top + _BAND_ROWS)
        shot = augment.degrade(rng, truth[band], camera)
        transmission = compute_transmission(to_inverse(depth[band]), density[band], haze.nearest)
        # convertScaleAbs rounds to uint8.
        hazy[band] = cv2.convertScaleAbs(add_haze(shot, transmission, haze), alpha=255)
        levels[band] = cv2.convertScaleAbs(transmission, alpha=255)
    return hazy, levels


def _draw_crop(
    clear: Sliceable,
    depth_map: DepthMap,
    rng: np.random.Generator,
    patch_px: int,
    *,
    random_resize: bool,
    rotation: bool,
) -> tuple[Crop, DepthMap]:
    """Draw a crop of an image, and fit its depth map to the image.

    Raises `BadImage` if the depth map has another aspect ratio than the image.
    """
    height_px, width_px = clear.shape[:2]
    with phase("depth"):
        depth_map = depth_map.fit_to_image(height_px, width_px)
        crop = augment.sample_crop(
            rng, height_px, width_px, patch_px=patch_px, random_resize=random_resize, rotation=rotation
        )
    return crop, depth_map


def draw_synthetic_pair(
    clear: Sliceable,
    depth_map: DepthMap,
    rng: np.random.Generator,
    *,
    patch_px: int,
    haze_range: HazeRange,
    random_resize: bool,
    rotation: bool = False,
    camera_faults: CameraFaults = CAMERA_FAULTS["published"],
    resize: ResizeKind = "area",
) -> DrawnPair:
    """Draw what `make_synthetic_pair` draws and cut its region, but lay no haze.

    Takes the same arguments. Crop, haze and camera are those of the same `rng` there; the JPEG quality is too, unless
    the camera is noisy: there the noise of every pixel is drawn before it, here one seed.

    Raises `BadImage` if the depth map has another aspect ratio than the image.
    """
    crop, depth_map = _draw_crop(clear, depth_map, rng, patch_px, random_resize=random_resize, rotation=rotation)
    region, depth = crop.cut(clear), crop.cut(depth_map.pixels)

    with phase("depth"):
        inverse = np.rint(depth_map.to_inverse(depth) * np.float32(DEPTH_LEVELS)).astype(np.int16)

    haze = sample_haze(rng, haze_range)
    camera = augment.sample_camera(rng, camera_faults)
    noise_seed = None if camera.noise is None else int(rng.integers(2**63))
    jpeg_quality = augment.sample_jpeg_quality(rng, camera_faults)
    region = np.ascontiguousarray(region)
    return DrawnPair(region, inverse, crop, haze, camera, noise_seed, jpeg_quality, patch_px, resize)


def crop_pair(
    hazy: Sliceable,
    clear: Sliceable,
    rng: np.random.Generator,
    *,
    patch_px: int,
    random_resize: bool,
    rotation: bool = False,
    resize: ResizeKind = "area",
    crop_truth: bool = False,
) -> Pair:
    """Crop the same patch from a degraded and clear image.

    Both images are `H W 3` and get the same flip and turn. Nothing is added to the degraded image. `crop_truth` is for
    a clear image with a border, see `fit_truth`.

    Raises `BadImage` if the two differ in size.
    """
    height_px, width_px = hazy.shape[:2]
    clear = fit_truth(clear, hazy.shape, crop_truth=crop_truth)

    # Cut outside of any phase: cutting a file decodes, which is a phase of its own.
    crop = augment.sample_crop(
        rng, height_px, width_px, patch_px=patch_px, random_resize=random_resize, rotation=rotation
    )
    degraded, truth = crop.cut(hazy), crop.cut(clear)
    with phase("resize"):
        return Pair(crop.finish(degraded, patch_px, resize), crop.finish(truth, patch_px, resize), None)


# --- A truth with a border ---


@dataclass(frozen=True)
class Centre:
    """The centre of an image, from which regions are cut as from a whole one."""

    image: Sliceable
    top_px: int
    left_px: int
    shape: tuple[int, ...]

    def __getitem__(self, region: tuple[slice, slice]) -> NDArray:
        """Cut a region, given by rows and columns of the centre."""
        rows, columns = region
        return self.image[_shift(rows, self.top_px), _shift(columns, self.left_px)]


def _shift(span: slice, offset_px: int) -> slice:
    return slice(span.start + offset_px, span.stop + offset_px)


def fit_truth(truth: Sliceable, shape: tuple[int, ...], *, crop_truth: bool) -> Sliceable:
    """Return the part of a truth that a degraded image of this shape shows.

    Both are `H W 3`. With `crop_truth`, a truth with a border around that part loses the border, which is equally wide
    on opposite sides; an odd pixel goes to the bottom or right. A truth of the same shape stays as it is.

    Raises `BadImage` for any other shape, and for a border that is wider than `MAX_BORDER`: such a truth has another
    scale.
    """
    if truth.shape == shape:
        return truth
    height_px, width_px = truth.shape[:2]
    mismatch = f"degraded image of {shape[1]} x {shape[0]} px does not fit its clean one of {width_px} x {height_px} px"

    # The pixels that the truth has in excess.
    rows_px, columns_px = height_px - shape[0], width_px - shape[1]
    has_border = 0 <= rows_px <= MAX_BORDER * height_px and 0 <= columns_px <= MAX_BORDER * width_px
    if not has_border:
        raise BadImage(mismatch)
    if not crop_truth:
        raise BadImage(f"{mismatch} (crop_truth: true takes the centre of the clean one)")
    return Centre(truth, rows_px // 2, columns_px // 2, shape)


# --- Real images ---


def compute_real_side_px(patch_px: int, resize: ResizeKind = "area") -> int | None:
    """Return the least decoded side of a real image.

    Both sides must be decoded to at least so many pixels. None: the image must be decoded whole, since `cubic` takes
    single pixels of it.
    """
    return None if resize == "cubic" else math.ceil(_REAL_OVERSIZE * patch_px)


def make_real_views(
    hazy: ImageU8,
    rng: np.random.Generator,
    *,
    patch_px: int,
    jpeg_quality: int | None,
    resize: ResizeKind = "area",
) -> RealViews:
    """Make the weak and strong view of a real image.

    The weak view is the resized image; the strong view is derived from the weak one. `hazy` is `H W 3`; both sides
    become `patch_px`. The image is neither cropped nor flipped, so that its pseudo label stays aligned over epochs.

    With `jpeg_quality` the photograph takes a JPEG round trip first: `hazy` must then have its full size. On the patch,
    JPEG would leave a grid of 8 px that no photograph has.
    """
    weak = _make_weak_view(hazy, patch_px, jpeg_quality, resize)
    with phase("strong view"):
        return RealViews(weak, augment.make_strong_view(rng, weak))


def draw_real_views(
    hazy: ImageU8,
    rng: np.random.Generator,
    *,
    patch_px: int,
    jpeg_quality: int | None,
    resize: ResizeKind = "area",
) -> DrawnViews:
    """Make the weak view of a real image, and draw the strong one's operations.

    Takes the arguments of `make_real_views`; of the same `rng`, its strong view has the same operations.
    """
    weak = _make_weak_view(hazy, patch_px, jpeg_quality, resize)
    return DrawnViews(weak, StrongDraw(tuple(augment.sample_strong_operations(rng))))


def _make_weak_view(hazy: ImageU8, patch_px: int, jpeg_quality: int | None, resize: ResizeKind) -> ImageU8:
    """Take a photograph through JPEG, with a quality, and resize it."""
    with phase("jpeg"):
        if jpeg_quality is not None:
            hazy = decode_image(augment.encode_jpeg(hazy, jpeg_quality), compute_real_side_px(patch_px, resize))

    with phase("resize"):
        return augment.resize(hazy, patch_px, patch_px, resize)
