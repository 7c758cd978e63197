"""The pixel work of drawn samples by torch beside numpy's and OpenCV's, of the same draws."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from corun_ray.core.data import augment
from corun_ray.core.data.augment import CAMERA_FAULTS, CameraFaults
from corun_ray.core.data.depth import draw_procedural_depth
from corun_ray.core.data.device_samples import make_pairs, make_strong_views
from corun_ray.core.data.haze import HazeRange
from corun_ray.core.data.samples import (
    DEPTH_LEVELS,
    DrawnPair,
    Pair,
    StrongDraw,
    draw_real_views,
    draw_synthetic_pair,
    lay_haze,
    make_real_views,
    make_synthetic_pair,
)
from tests.core.data.test_device_jpeg import compute_psnr
from tests.core.data.test_samples_plain import fine_grain, photograph

CPU = torch.device("cpu")
PATCH_PX = 64
DARK = CameraFaults(noise_share=0, jpeg_share=0)
NOISY = CameraFaults(noise_share=1, jpeg_share=0)
COMPRESSED = CameraFaults(noise_share=0, jpeg_share=1)
UNEVEN = HazeRange(nearest=(0, 0.3), density_variation=(0.2, 0.9))


def draw(seed: int, size_px: tuple[int, int] = (200, 280), **options: Any) -> DrawnPair:
    rng = np.random.default_rng(seed)
    whole = photograph(200, 280)
    clear = np.ascontiguousarray(whole[: size_px[0], : size_px[1]])
    settings = {"patch_px": PATCH_PX, "haze_range": HazeRange(), "random_resize": True} | options
    return draw_synthetic_pair(clear, draw_procedural_depth(rng, *size_px), rng, **settings)


def make_by_numpy(drawn: DrawnPair) -> Pair:
    """Make the pair by the functions of the sample stream, of the same draws."""

    def to_inverse(levels: NDArray) -> NDArray[np.float32]:
        return levels.astype(np.float32) / np.float32(DEPTH_LEVELS)

    noise_rng, crop = np.random.default_rng(drawn.noise_seed), drawn.crop
    hazy, levels = lay_haze(noise_rng, drawn.region, drawn.inverse_depth, to_inverse, drawn.haze, drawn.camera)
    if drawn.jpeg_quality is not None:
        hazy = augment.apply_jpeg(hazy, drawn.jpeg_quality, top_px=crop.top_px, left_px=crop.left_px)
    patches = [crop.finish(region, drawn.patch_px, drawn.resize) for region in (hazy, drawn.region, levels)]
    return Pair(patches[0], patches[1], drawn.jpeg_quality, patches[2])


def make_by_torch(drawn: list[DrawnPair]) -> list[tuple[NDArray[np.uint8], ...]]:
    """Make the pairs at once: hazy, clear and transmission of each as whole levels."""
    made = []
    for one in zip(*make_pairs(drawn, CPU, with_transmission=True), strict=True):
        levels = [255 * patch.permute(1, 2, 0).squeeze(-1).double().numpy() for patch in one]
        assert all(np.abs(level - level.round()).max() < 1e-3 for level in levels)
        made.append(tuple([level.round().astype(np.uint8) for level in levels]))
    return made


def levels_apart(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> int:
    return int(np.abs(ours.astype(int) - theirs).max())


@pytest.mark.parametrize("resize", ["area", "cubic"])
@pytest.mark.parametrize("haze_range", [HazeRange(), UNEVEN])
@pytest.mark.parametrize("size_px", [(200, 280), (50, 70), (64, 64)])
def test_without_noise_and_jpeg_no_pixel_is_more_than_a_level_apart(size_px, haze_range, resize):
    options = {"haze_range": haze_range, "resize": resize, "rotation": True, "camera_faults": DARK}
    drawn = [draw(seed, size_px, **options) for seed in range(24)]
    assert {one.crop.flip for one in drawn} == {True, False} and {one.crop.quarter_turns for one in drawn} == {
        0,
        1,
        2,
        3,
    }
    assert any(one.camera.gamma > 1 for one in drawn)
    for ours, one in zip(make_by_torch(drawn), drawn, strict=True):
        theirs = make_by_numpy(one)
        for patch, other in zip(ours, (theirs.hazy, theirs.clear, theirs.transmission), strict=True):
            assert other is not None and levels_apart(patch, other) <= 1
            assert np.mean(patch != other) < 0.01


def test_jpeg_is_as_near_to_the_encoder_s_as_its_rounding_allows():
    drawn = [draw(seed, camera_faults=COMPRESSED) for seed in range(24)]
    psnr = []
    for ours, one in zip(make_by_torch(drawn), drawn, strict=True):
        theirs = make_by_numpy(one)
        psnr.append(compute_psnr(ours[0], theirs.hazy))
        assert compute_psnr(ours[0], theirs.hazy) > 46, one.jpeg_quality
    assert np.mean(psnr) > 50


def test_noise_has_the_same_distribution_in_every_channel():
    drawn = [draw(seed, camera_faults=NOISY) for seed in range(300)]
    ours, theirs = make_by_torch(drawn), [make_by_numpy(one) for one in drawn]
    hazy = np.array([[one[0] for one in ours], [one.hazy for one in theirs]])
    assert np.mean(hazy[0] != hazy[1]) > 0.5, "the noise of each pixel is another"

    # Levels and contrast of each patch, and all levels by channel.
    for statistic in (np.mean, np.std):
        values = statistic(hazy.astype(np.float32), axis=(2, 3))
        assert np.abs(values[0] - values[1]).mean() < 0.5
        np.testing.assert_allclose(values[0].mean(0), values[1].mean(0), atol=0.2)
    counts = np.array([[np.bincount(side[..., c].ravel() // 8, minlength=32) for c in range(3)] for side in hazy])
    assert (np.abs(counts[0] - counts[1]).sum(axis=1) / 2 / counts[0].sum(axis=1)).max() < 0.005

    # The noise itself: how neighbours differ, by channel, and how channels go together.
    grain = np.array([[fine_grain(patch) for patch in side] for side in hazy])
    np.testing.assert_allclose(grain[0].mean(axis=0), grain[1].mean(axis=0), rtol=0.01)
    assert np.abs(grain[0] - grain[1]).mean() < 0.05 * grain.mean()
    together = [measure_correlation(hazy[side], [one.clear for one in theirs]) for side in (0, 1)]
    assert together[0] == pytest.approx(together[1], abs=0.02)


def measure_correlation(hazy: NDArray[np.uint8], clear: list[NDArray[np.uint8]]) -> float:
    """The mean correlation of red and green in what is finer than the image."""
    found = []
    for patch in hazy:
        finest = patch.astype(np.float32)[:-1:2] - patch.astype(np.float32)[1::2]
        found.append(np.corrcoef(finest[..., 0].ravel(), finest[..., 1].ravel())[0, 1])
    assert len(found) == len(clear)
    return float(np.mean(found))


def test_whole_samples_have_the_distribution_of_the_stream_s():
    """All faults together, of other random numbers from the noise on: as two runs of the stream."""
    depth_map, clear = draw_procedural_depth(np.random.default_rng(2), 200, 280), photograph(200, 280)
    options: dict[str, Any] = {"patch_px": PATCH_PX, "haze_range": HazeRange(), "random_resize": True}
    drawn = [draw_synthetic_pair(clear, depth_map, np.random.default_rng(seed), **options) for seed in range(400)]
    stream = [make_synthetic_pair(clear, depth_map, np.random.default_rng(seed), **options) for seed in range(400)]
    hazy = np.array([[one[0] for one in make_by_torch(drawn)], [one.hazy for one in stream]])

    # Crop, haze and camera are the same; how often and how strongly it is compressed is alike.
    assert sum(one.camera.noise is not None for one in drawn) / 400 == pytest.approx(0.5, abs=0.08)
    for pairs in (drawn, stream):
        qualities = [one.jpeg_quality for one in pairs if one.jpeg_quality is not None]
        assert len(qualities) / 400 == pytest.approx(0.5, abs=0.08)
        assert np.mean(qualities) == pytest.approx(62.5, abs=4)
    without_noise = [index for index, one in enumerate(drawn) if one.camera.noise is None]
    assert all(drawn[index].jpeg_quality == stream[index].jpeg_quality for index in without_noise)

    means, deviations = hazy.mean(axis=(2, 3)), hazy.std(axis=(2, 3))
    np.testing.assert_allclose(means[0], means[1], atol=4)
    np.testing.assert_allclose(deviations[0].mean(axis=0), deviations[1].mean(axis=0), atol=0.3)
    grain = np.array([[fine_grain(patch) for patch in side] for side in hazy])
    np.testing.assert_allclose(grain[0].mean(axis=0), grain[1].mean(axis=0), rtol=0.04)


def test_a_sample_is_the_same_whatever_it_is_made_with():
    drawn = [draw(seed, camera_faults=CameraFaults(noise_share=1, jpeg_share=1)) for seed in range(8)]
    together = make_by_torch(drawn)
    turned = make_by_torch(drawn[::-1])[::-1]
    for index, one in enumerate(drawn):
        (alone,) = make_by_torch([one])
        for patch, other, third in zip(together[index], turned[index], alone, strict=True):
            assert np.array_equal(patch, other) and np.array_equal(patch, third)


def test_regions_too_many_for_the_memory_are_made_in_groups(monkeypatch):
    drawn = [draw(seed) for seed in range(8)]
    together = make_by_torch(drawn)
    monkeypatch.setattr("corun_ray.core.data.device_samples._MAX_PIXELS", 2 * 100**2)
    for patches, others in zip(make_by_torch(drawn), together, strict=True):
        assert all(np.array_equal(patch, other) for patch, other in zip(patches, others, strict=True))


STRENGTHS: dict[Callable[..., Any], tuple[float, ...]] = {
    augment.adjust_contrast: (0.05, 0.613, 0.95),
    augment.adjust_brightness: (0.05, 0.613, 0.95),
    augment.posterize: (4, 5, 6, 7),
    augment.adjust_sharpness: (0.05, 0.613, 0.8),
    augment.blur: (1, 3, 5),
}


@pytest.mark.parametrize("operation", STRENGTHS, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("side_px", [64, 16])
def test_an_operation_on_a_view_is_at_most_a_level_apart(operation, side_px):
    grainy = (0.8 * photograph(200, 280) + np.random.default_rng(0).integers(0, 50, (200, 280, 3))).astype(np.uint8)
    views = [np.ascontiguousarray(grainy[at : at + side_px, at : at + side_px]) for at in (0, 40, 90, 120)]
    strengths = STRENGTHS[operation] + STRENGTHS[operation][:1] * (4 - len(STRENGTHS[operation]))
    weak = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 255
    strong = make_strong_views(weak, [StrongDraw(((operation, strength),)) for strength in strengths])
    for view, strength, made in zip(views, strengths, strong, strict=True):
        ours = (255 * made.permute(1, 2, 0)).round().numpy().astype(np.uint8)
        theirs = operation(view, strength)
        assert levels_apart(ours, theirs) <= 1 and np.mean(ours != theirs) < 0.002
        assert not np.array_equal(ours, view)


def test_strong_views_take_both_operations_of_the_same_draws():
    image = photograph(200, 280)
    settings: dict[str, Any] = {"patch_px": PATCH_PX, "jpeg_quality": None}
    drawn = [draw_real_views(image, np.random.default_rng(seed), **settings) for seed in range(40)]
    views = [make_real_views(image, np.random.default_rng(seed), **settings) for seed in range(40)]
    weak = torch.from_numpy(np.stack([one.weak for one in drawn])).permute(0, 3, 1, 2).float() / 255
    strong = make_strong_views(weak, [one.strong for one in drawn])
    before = weak.clone()
    for one, other, made in zip(drawn, views, strong, strict=True):
        assert np.array_equal(one.weak, other.weak)
        # Posterizing makes many levels of the one that the first operation may be apart.
        ours = (255 * made.permute(1, 2, 0)).round().numpy().astype(np.uint8)
        assert np.mean(np.abs(ours.astype(int) - other.strong) > 1) < 0.002
    assert torch.equal(weak, before), "the teacher's view stays"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_same_pairs_and_views_but_for_the_noise():
    drawn = [draw(seed, camera_faults=CameraFaults(noise_share=0, jpeg_share=0.5)) for seed in range(16)]
    made = [make_pairs(drawn, torch.device(name), with_transmission=True) for name in ("cpu", "cuda")]
    for ours, theirs in zip(*made, strict=True):
        apart = (255 * (ours - theirs.cpu())).abs()
        assert apart.mean() < 0.05
    views = [
        draw_real_views(photograph(200, 280), np.random.default_rng(seed), patch_px=64, jpeg_quality=None)
        for seed in range(8)
    ]
    weak = torch.from_numpy(np.stack([one.weak for one in views])).permute(0, 3, 1, 2).float() / 255
    strong = [make_strong_views(weak.to(name), [one.strong for one in views]).cpu() for name in ("cpu", "cuda")]
    assert (255 * (strong[0] - strong[1])).abs().mean() < 0.05

    noisy = [draw(seed, camera_faults=CAMERA_FAULTS["published"]) for seed in range(64)]
    means = [make_pairs(noisy, torch.device(name))[0].mean(dim=(2, 3)).cpu() for name in ("cpu", "cuda")]
    assert (255 * (means[0] - means[1])).abs().max() < 4
