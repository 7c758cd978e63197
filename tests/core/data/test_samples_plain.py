"""Our order of making samples against the straightforward one: the same distribution, by statistics.

Both draw crop, haze and darkening alike from a seed, so that their samples can also be compared one by one.
"""

from functools import lru_cache

import cv2
import numpy as np
import pytest

from corun_ray.core.data.augment import resize
from corun_ray.core.data.depth import draw_procedural_depth
from corun_ray.core.data.haze import HazeRange
from corun_ray.core.data.images import decode_image
from corun_ray.core.data.samples import Pair, compute_real_side_px, make_real_views, make_synthetic_pair
from tests.core.data.plain_samples import plain_pair, plain_views

PATCH_PX, SEEDS = 64, range(400)


def photograph(height_px: int, width_px: int) -> np.ndarray:
    """Detail at every scale, falling with it as in photographs."""
    rng = np.random.default_rng(1)
    octaves = [
        cv2.resize(rng.normal(size=(height_px // n, width_px // n, 3)), (width_px, height_px)) * n
        for n in (1, 2, 4, 8, 16, 32, 64, 128)
    ]
    return np.clip(128 + 0.5 * sum(octaves), 0, 255).astype(np.uint8)


@lru_cache
def samples(random_resize: bool) -> tuple[list[Pair], list[Pair]]:
    """Ours and the straightforward ones, of the same seeds."""
    clear, depth_map = photograph(200, 280), draw_procedural_depth(np.random.default_rng(2), 200, 280)
    options = {"patch_px": PATCH_PX, "haze_range": HazeRange(), "random_resize": random_resize}
    ours = [make_synthetic_pair(clear, depth_map, np.random.default_rng(seed), **options) for seed in SEEDS]
    depth = depth_map.to_inverse(depth_map.pixels)
    return ours, [plain_pair(clear, depth, np.random.default_rng(seed), **options) for seed in SEEDS]


def fine_grain(patch: np.ndarray) -> np.ndarray:
    """How much neighbouring pixels differ beyond their trend, by channel: where noise and JPEG show."""
    return cv2.Laplacian(patch, cv2.CV_32F).std(axis=(0, 1))


@pytest.mark.parametrize("random_resize", [False, True])
def test_clear_patches_are_those_of_the_straightforward_order(random_resize):
    ours, plain = samples(random_resize)
    apart = [np.abs(a.clear.astype(int) - b.clear).mean() for a, b in zip(ours, plain, strict=True)]
    # Resizing the whole image lands within a pixel of resizing the crop.
    assert max(apart) == 0 if not random_resize else np.mean(apart) < 6


@pytest.mark.parametrize("random_resize", [False, True])
def test_hazy_patches_have_the_same_levels_and_contrast(random_resize):
    ours, plain = samples(random_resize)
    for statistic, tolerance in ((np.mean, 1.0), (np.std, 0.5)):
        values = np.array([[statistic(pair.hazy, axis=(0, 1)) for pair in pairs] for pairs in (ours, plain)])
        assert np.abs(values[0] - values[1]).mean() < 2 * tolerance, "of the same seeds"
        np.testing.assert_allclose(values[0].mean(axis=0), values[1].mean(axis=0), atol=tolerance)
        np.testing.assert_allclose(
            np.quantile(values[0], (0.1, 0.5, 0.9)), np.quantile(values[1], (0.1, 0.5, 0.9)), atol=3
        )


@pytest.mark.parametrize("random_resize", [False, True])
def test_hazy_patches_have_the_same_noise(random_resize):
    """Among those that are compressed alike, or not at all: what is drawn after the noise differs."""
    pairs = [both for both in zip(*samples(random_resize), strict=True) if both[0].jpeg_quality == both[1].jpeg_quality]
    assert len(pairs) > 200
    grain = np.array([[fine_grain(pair.hazy) for pair in both] for both in pairs]).swapaxes(0, 1)
    np.testing.assert_allclose(grain[0].mean(axis=0), grain[1].mean(axis=0), rtol=0.03)
    assert np.abs(grain[0] - grain[1]).mean() < 0.05 * grain.mean(), "of the same seeds"
    # The share of patches by which the distribution of their grain is elsewhere.
    bins = np.histogram_bin_edges(grain, 16)
    counts = [np.histogram(values, bins)[0] / values.size for values in grain]
    assert np.abs(counts[0] - counts[1]).sum() / 2 < 0.04


@pytest.mark.parametrize("random_resize", [False, True])
def test_the_levels_of_all_pixels_are_distributed_alike(random_resize):
    histograms = []
    for pairs in samples(random_resize):
        pixels = np.concatenate([pair.hazy.reshape(-1, 3) for pair in pairs])
        counts = [np.bincount(channel // 8, minlength=32) / len(pixels) for channel in pixels.T]
        histograms.append(np.array(counts))
    assert np.abs(histograms[0] - histograms[1]).sum(axis=1).max() / 2 < 0.015


def test_jpeg_is_drawn_as_often_and_as_strong():
    for pairs in samples(False):
        qualities = [pair.jpeg_quality for pair in pairs if pair.jpeg_quality is not None]
        assert len(qualities) / len(pairs) == pytest.approx(0.5, abs=0.08)
        assert np.mean(qualities) == pytest.approx(62.5, abs=5)


@pytest.mark.parametrize("size_px", [(250, 330), (460, 600), (920, 1200)])
def test_real_images_decoded_small_look_as_those_decoded_whole(size_px):
    data = cv2.imencode(".jpg", photograph(*size_px), [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
    whole, small = decode_image(data), decode_image(data, compute_real_side_px(PATCH_PX))
    assert min(small.shape[:2]) >= 1.75 * PATCH_PX and small.size < whole.size / 3.9
    weak = [resize(image, PATCH_PX, PATCH_PX) for image in (small, whole)]
    assert np.abs(weak[0].astype(int) - weak[1]).mean() < 2
    assert np.abs(weak[0].mean(axis=(0, 1)) - weak[1].mean(axis=(0, 1))).max() < 0.3
    np.testing.assert_allclose(weak[0].std(axis=(0, 1)), weak[1].std(axis=(0, 1)), rtol=0.01)
    np.testing.assert_allclose(fine_grain(weak[0]), fine_grain(weak[1]), rtol=0.08)


def test_views_of_an_image_decoded_whole_are_those_of_the_straightforward_order():
    image = photograph(200, 280)  # too small to be decoded at half of its size
    for seed, jpeg_quality in ((0, None), (1, 60)):
        ours, plain = (
            make(image, np.random.default_rng(seed), patch_px=PATCH_PX, jpeg_quality=jpeg_quality)
            for make in (make_real_views, plain_views)
        )
        np.testing.assert_array_equal(ours.weak, plain.weak)
        np.testing.assert_array_equal(ours.strong, plain.strong)
