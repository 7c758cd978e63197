"""The straightforward order, to measure and to test the stream against: everything on the whole image, the crop last.

What is drawn at random is drawn as the stream does, in the same order, so that a seed means the same crop and haze.
"""

import cv2
import numpy as np

from corun_ray.core.data import augment
from corun_ray.core.data.haze import HazeRange, sample_haze
from corun_ray.core.data.samples import Pair, RealViews
from corun_ray.core.timing import phase


def plain_pair(
    clear: np.ndarray,
    inverse_depth: np.ndarray,
    rng: np.random.Generator,
    *,
    patch_px: int,
    haze_range: HazeRange,
    random_resize: bool,
) -> Pair:
    """A clear image `H W 3` uint8 and its inverse depth `H W` in [0, 1] as a pair of patches."""
    with phase("synthesis"):
        crop = augment.sample_crop(rng, *clear.shape[:2], patch_px=patch_px, random_resize=random_resize)
        haze = sample_haze(rng, haze_range)
        scene = clear / np.float32(255)
        if rng.random() < 0.5:
            scene = scene ** np.float32(rng.uniform(1.5, 3.0))
        if rng.random() < 0.5:
            mixing = augment.sample_noise(rng)
            scene = scene + rng.standard_normal((*clear.shape[:2], len(mixing)), dtype=np.float32) @ mixing
            scene = scene.clip(0, 1)
        transmission = np.exp(-2 * haze.beta * (1 - inverse_depth))[..., None]
        hazy = scene * transmission + np.float32(haze.airlight) * (1 - transmission)
        hazy = np.round(hazy * 255).astype(np.uint8)
    with phase("jpeg"):
        jpeg_quality = augment.sample_jpeg_quality(rng)
        if jpeg_quality is not None:
            hazy = augment.apply_jpeg(hazy, jpeg_quality)
    with phase("resize"):
        return Pair(*(_scaled_and_cropped(image, crop, patch_px) for image in (hazy, clear)), jpeg_quality)


def plain_views(hazy: np.ndarray, rng: np.random.Generator, *, patch_px: int, jpeg_quality: int | None) -> RealViews:
    """A real hazy image `H W 3` uint8, decoded whole, as its two views."""
    with phase("jpeg"):
        hazy = hazy if jpeg_quality is None else augment.apply_jpeg(hazy, jpeg_quality)
    with phase("resize"):
        weak = augment.resize(hazy, patch_px, patch_px)
    with phase("strong view"):
        return RealViews(weak, augment.make_strong_view(rng, weak))


def _scaled_and_cropped(image: np.ndarray, crop: augment.Crop, patch_px: int) -> np.ndarray:
    scale = patch_px / crop.side_px
    if scale != 1:
        image = augment.resize(image, *(max(round(side * scale), patch_px) for side in image.shape[:2]))
    top, left = (
        min(round(start * scale), side - patch_px)
        for start, side in zip((crop.top_px, crop.left_px), image.shape, strict=False)
    )
    patch = image[top : top + patch_px, left : left + patch_px]
    return cv2.flip(patch, 1) if crop.flip else patch.copy()
