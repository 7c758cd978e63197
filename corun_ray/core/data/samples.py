"""Training samples made on the fly: synthetic and paired patches, two views of real hazy images.

Source: Fang et al., NeurIPS 2024, arXiv 2406.07966. Images are RGB uint8, `H W 3`.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from corun_ray.core.data import augment
from corun_ray.core.data import haze as scattering
from corun_ray.core.data.depth import DepthMap
from corun_ray.core.data.images import BadImage
from corun_ray.core.timing import phase

ImageU8 = NDArray[np.uint8]

_BAND_PX = 32  # rows worked on at a time: what they take stays in the processor's cache
_REAL_OVERSIZE = 1.75  # less, and the reduced decoding of a JPEG would blur the resized image visibly


@dataclass(frozen=True)
class Pair:
    """A hazy (or otherwise degraded) patch and its clear truth, both `p p 3` and aligned."""

    hazy: ImageU8
    clear: ImageU8
    jpeg_quality: int | None
    """Of the JPEG round trip that the hazy patch took here, if any."""


@dataclass(frozen=True)
class RealViews:
    """The teacher's weak and the student's strong view of one real hazy image, both `p p 3` and aligned."""

    weak: ImageU8
    strong: ImageU8


def synthetic_sample(
    clear: augment.Cuttable,
    depth_map: DepthMap,
    rng: np.random.Generator,
    *,
    patch_px: int,
    haze_range: scattering.HazeRange,
    random_resize: bool,
    rotation: bool = False,
) -> Pair:
    """Lays random haze over a random crop of a clear image `H W 3`.

    `depth_map` is the whole image's; one of another resolution is resized. Only the region that the crop keeps is
    worked on, at its own resolution, because noise and JPEG are the camera's: resizing to the patch softens them.

    Raises `BadImage` if the depth map has another aspect ratio than the image.
    """
    height_px, width_px = clear.shape[:2]
    with phase("depth"):
        depth_map = depth_map.fitted(height_px, width_px)
        crop = augment.sample_crop(
            rng, height_px, width_px, patch_px=patch_px, random_resize=random_resize, rotation=rotation
        )
    truth, region = crop.cut(clear), crop.cut(depth_map.pixels)
    with phase("synthesis"):
        haze, camera = scattering.sample_haze(rng, haze_range), augment.sample_camera(rng)
        hazy = np.empty(truth.shape, np.uint8)
        for top in range(0, crop.side_px, _BAND_PX):
            band = slice(top, top + _BAND_PX)
            shot = augment.degrade(rng, truth[band], camera)
            transmission = scattering.transmission(depth_map.inverse(region[band]), haze.beta)
            hazy[band] = cv2.convertScaleAbs(scattering.add_haze(shot, transmission, haze), alpha=255)  # rounds
    with phase("jpeg"):
        jpeg_quality = augment.sample_jpeg_quality(rng)
        if jpeg_quality is not None:
            hazy = augment.jpeg_round_trip(hazy, jpeg_quality, top_px=crop.top_px, left_px=crop.left_px)
    with phase("resize"):
        return Pair(crop.finish(hazy, patch_px), crop.finish(truth, patch_px), jpeg_quality)


def paired_sample(
    hazy: augment.Cuttable,
    clear: augment.Cuttable,
    rng: np.random.Generator,
    *,
    patch_px: int,
    random_resize: bool,
    rotation: bool = False,
) -> Pair:
    """The same random crop, flip and turn of a degraded image and its clean truth, `H W 3` both; nothing is added.

    Raises `BadImage` if the two differ in size.
    """
    height_px, width_px = clear.shape[:2]
    if hazy.shape != clear.shape:
        raise BadImage(
            f"degraded image of {hazy.shape[1]} x {hazy.shape[0]} px does not fit its clean one "
            f"of {width_px} x {height_px} px"
        )
    crop = augment.sample_crop(
        rng, height_px, width_px, patch_px=patch_px, random_resize=random_resize, rotation=rotation
    )
    degraded, truth = crop.cut(hazy), crop.cut(clear)
    with phase("resize"):
        return Pair(crop.finish(degraded, patch_px), crop.finish(truth, patch_px), None)


def real_side_px(patch_px: int) -> int:
    """How large, on both sides at least, a real hazy image must be decoded to become a patch."""
    return math.ceil(_REAL_OVERSIZE * patch_px)


def real_views(hazy: ImageU8, rng: np.random.Generator, *, patch_px: int, jpeg_quality: int | None) -> RealViews:
    """Resizes a real hazy image `H W 3`, both sides to `patch_px`, and derives the strong from the weak view.

    It is neither cropped nor flipped, so that its label is aligned whenever it comes round. `jpeg_quality` is
    that of the synthetic half of the same sample.
    """
    with phase("resize"):
        weak = augment.resize(hazy, patch_px, patch_px)
    with phase("jpeg"):
        if jpeg_quality is not None:
            weak = augment.jpeg_round_trip(weak, jpeg_quality)
    with phase("strong view"):
        return RealViews(weak, augment.strong_view(rng, weak))
