import dataclasses
from collections import defaultdict
from statistics import NormalDist

import cv2
import numpy as np
import pytest
import scipy.linalg

from corun_ray.core.data import augment
from corun_ray.core.data.augment import Crop, apply_jpeg, resize, sample_crop, sample_noise


def textured(height_px: int, width_px: int, sigma_px: float = 1.5) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=(height_px, width_px, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), sigma_px)
    return np.clip(128 + 45 * smooth / smooth.std(), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("random_resize", [False, True])
@pytest.mark.parametrize(("height_px", "width_px"), [(20, 31), (31, 20), (16, 40), (12, 30), (7, 7)])
def test_crops_stay_inside_and_reach_every_pixel(height_px, width_px, random_resize):
    rng = np.random.default_rng(1)
    seen = np.zeros((height_px, width_px), bool)
    flips = 0
    for _ in range(1500):
        crop = sample_crop(rng, height_px, width_px, patch_px=16, random_resize=random_resize)
        assert crop.top_px + crop.side_px <= height_px and crop.left_px + crop.side_px <= width_px
        seen[crop.top_px : crop.top_px + crop.side_px, crop.left_px : crop.left_px + crop.side_px] = True
        flips += crop.flip
    assert seen.all()
    assert 0.45 < flips / 1500 < 0.55


def test_without_resize_the_crop_is_the_patch_and_every_offset_is_as_likely():
    rng = np.random.default_rng(2)
    crops = [sample_crop(rng, 18, 300, patch_px=16, random_resize=False) for _ in range(6000)]
    assert {crop.side_px for crop in crops} == {16}
    tops = np.bincount([crop.top_px for crop in crops])
    assert len(tops) == 3 and tops.min() > 1800


def test_random_resize_brings_the_short_side_uniformly_between_patch_and_own_size():
    rng = np.random.default_rng(3)
    sides = [sample_crop(rng, 1000, 1600, patch_px=100, random_resize=True).side_px for _ in range(8000)]
    scaled_short_px = 100 * 1000 / np.array(sides)
    assert min(sides) == 100 and max(sides) <= 1000
    np.testing.assert_allclose(np.quantile(scaled_short_px, [0.1, 0.5, 0.9]), [190, 550, 910], atol=20)


def test_a_smaller_image_is_enlarged_to_just_fit():
    crop = sample_crop(np.random.default_rng(4), 10, 25, patch_px=16, random_resize=True)
    assert crop.side_px == 10 and crop.finish(crop.cut(textured(10, 25)), 16).shape == (16, 16, 3)


@pytest.mark.parametrize(("side_px", "step_px"), [(128, 2), (96, 3)])
def test_cropping_first_equals_resizing_first(side_px, step_px):
    patch_px = 64
    image = textured(192, 288, sigma_px=6)
    whole = resize(image, 192 * patch_px // side_px, 288 * patch_px // side_px)
    crop = Crop(top_px=10 * step_px, left_px=20 * step_px, side_px=side_px, flip=False)
    top, left = crop.top_px * patch_px // side_px, crop.left_px * patch_px // side_px
    expected = whole[top : top + patch_px, left : left + patch_px].astype(int)
    assert np.abs(crop.finish(crop.cut(image), patch_px) - expected).max() <= 1


def test_rotation_draws_every_quarter_turn_as_often_and_leaves_the_other_numbers_alone():
    """Jobs without rotation keep their random numbers: those of the crop, and all that are drawn after it."""
    turns = []
    for seed in range(800):
        plain_rng, turned_rng, expected = (np.random.default_rng(seed) for _ in range(3))
        plain = sample_crop(plain_rng, 40, 60, patch_px=16, random_resize=True)
        turned = sample_crop(turned_rng, 40, 60, patch_px=16, random_resize=True, rotation=True)
        assert plain == dataclasses.replace(turned, quarter_turns=0)
        side_px = round(16 * 40 / expected.uniform(16, 40))
        assert (plain.side_px, plain.top_px) == (side_px, expected.integers(40 - side_px + 1))
        assert (plain.left_px, plain.flip) == (expected.integers(60 - side_px + 1), expected.random() < 0.5)
        assert plain_rng.random() == expected.random()
        turns.append(turned.quarter_turns)
    assert np.bincount(turns).min() > 150 and set(turns) == {0, 1, 2, 3}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_crop_turns_after_its_flip(turns, flip):
    region = textured(16, 20)[:, :16]
    expected = region[:, ::-1] if flip else region
    for _ in range(turns):
        expected = expected.transpose(1, 0, 2)[::-1]
    patch = Crop(0, 0, 16, flip, turns).finish(region, 16)
    np.testing.assert_array_equal(patch, expected)
    assert patch.flags.c_contiguous and not np.shares_memory(patch, region)
    np.testing.assert_array_equal(Crop(0, 0, 16, flip, turns).finish(region[..., 0], 16), expected[..., 0])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("side_px", "patch_px"), [(64, 64), (150, 64), (40, 64)])
def test_image_and_depth_stay_aligned(side_px, patch_px, flip):
    column = np.tile(np.arange(256, dtype=np.uint8), (200, 1))
    row = np.tile(np.arange(200, dtype=np.uint8)[:, None], (1, 256))
    image = np.dstack([row, column, column])
    depth = row.astype(np.float32) + 1000 * column.astype(np.float32)
    crop = Crop(top_px=30, left_px=70, side_px=side_px, flip=flip)
    patch = crop.finish(crop.cut(image), patch_px).astype(float)
    depth_patch = crop.finish(crop.cut(depth), patch_px)
    np.testing.assert_allclose(depth_patch, patch[..., 0] + 1000 * patch[..., 1], atol=505)
    across = np.diff(patch[0, :, 1])
    assert (across <= 0).all() if flip else (across >= 0).all()
    centre = 70 + (side_px - 1) / 2
    assert patch[..., 1].mean() == pytest.approx(centre, abs=0.6)


def test_a_patch_does_not_hold_on_to_its_source():
    image = textured(40, 40)
    patch = Crop(0, 0, 16, flip=False).finish(image[:16, :16], 16)
    assert not np.shares_memory(patch, image) and patch.flags.c_contiguous


def test_resizing_does_not_shift_the_mean():
    image = textured(60, 60)
    for side_px in (25, 41, 97):
        assert resize(image, side_px, side_px).mean() == pytest.approx(image.mean(), abs=0.05)


def test_shrinking_averages_also_when_the_other_side_grows():
    stripes = np.zeros((10, 400, 3), np.uint8)
    stripes[:, ::2] = 200
    assert np.ptp(resize(stripes, 20, 100)) <= 1
    assert resize(stripes, 20, 100).shape == (20, 100, 3)


def test_darken_raises_to_a_power():
    rgb = np.array([[[0, 51, 255]]], np.uint8)
    np.testing.assert_allclose(augment.darken(rgb, 2.0), [[[0, 0.04, 1]]], atol=1e-7)
    np.testing.assert_allclose(augment.darken(rgb, 1.0), rgb / np.float32(255), atol=1e-7)


def test_noise_comes_in_three_kinds_at_its_rates_and_levels():
    rng = np.random.default_rng(5)
    grey, colour, correlated = [], [], []
    for mixing in (sample_noise(rng) for _ in range(4000)):
        if mixing.shape == (1, 3):
            grey.append(mixing)
        elif (mixing == mixing[0, 0] * np.eye(3)).all():
            colour.append(mixing)
        else:
            correlated.append(mixing)
    assert len(grey) / 4000 == pytest.approx(0.4, abs=0.03)
    assert len(colour) / 4000 == pytest.approx(0.4, abs=0.03)
    assert len(correlated) / 4000 == pytest.approx(0.2, abs=0.03)
    for plain in (grey, colour):
        levels = {round(float(mixing[0, 0]) * 255, 3) for mixing in plain}
        assert levels == set(range(2, 26))
    assert all(np.ptp(mixing) == 0 for mixing in grey)
    covariances = np.array([mixing.T @ mixing for mixing in correlated]) * 255**2
    assert np.trace(covariances, axis1=1, axis2=2).mean() == pytest.approx(3 * 25**2 / 2, rel=0.05)


def test_correlated_noise_is_that_of_the_published_formula():
    """Of 20,000 draws each: the covariance by numpy's own normal distribution, which takes any matrix."""
    rng = np.random.default_rng(11)
    published, ours = [], []
    for _ in range(20_000):
        basis = scipy.linalg.orth(rng.uniform(size=(3, 3)))
        covariance = np.abs(25**2 * basis.T @ np.diag(rng.uniform(size=3)) @ basis)
        # What `multivariate_normal` makes of a matrix without a root: it takes singular values.
        values, axes = np.linalg.eigh(covariance)
        published.append(axes @ np.diag(np.abs(values)) @ axes.T)
    while len(ours) < 20_000:
        mixing = sample_noise(rng)
        if mixing.shape == (3, 3) and np.count_nonzero(mixing) > 3:
            ours.append(mixing.T @ mixing * 255**2)

    def describe(covariances):
        covariances = np.array(covariances)
        deviations = np.sqrt(np.einsum("nii->ni", covariances))
        correlations = covariances / deviations[:, :, None] / deviations[:, None, :]
        off_diagonal = correlations[:, *np.triu_indices(3, 1)]
        return deviations, off_diagonal

    for mine, theirs in zip(describe(ours), describe(published), strict=True):
        np.testing.assert_allclose(mine.mean(0), theirs.mean(0), rtol=0.03)
        shares = (0.05, 0.25, 0.5, 0.75, 0.95)
        np.testing.assert_allclose(np.quantile(mine, shares), np.quantile(theirs, shares), rtol=0.05, atol=0.01)
    assert describe(ours)[1].mean() == pytest.approx(0.27, abs=0.02)


def test_unit_noise_is_normal_and_independent():
    noise = augment.draw_unit_noise(np.random.default_rng(10), (400, 500, 3))
    assert noise.dtype == np.float32 and noise.shape == (400, 500, 3)
    assert noise.mean() == pytest.approx(0, abs=0.005) and noise.std() == pytest.approx(1, abs=0.005)
    assert (noise**4).mean() == pytest.approx(3, abs=0.05)
    shares = [(noise < bound).mean() for bound in (-2, -1, 0, 1, 2)]
    np.testing.assert_allclose(shares, [NormalDist().cdf(bound) for bound in (-2, -1, 0, 1, 2)], atol=0.002)
    for shifted in (noise[1:], noise[:, 1:], noise[..., 1:]):
        rows, columns, channels = shifted.shape
        assert abs((shifted * noise[:rows, :columns, :channels]).mean()) < 0.005
    np.testing.assert_array_equal(noise, augment.draw_unit_noise(np.random.default_rng(10), (400, 500, 3)))


def test_degrade_darkens_half_and_adds_noise_to_half():
    rng = np.random.default_rng(6)
    flat = np.full((24, 24, 3), 128, np.uint8)
    dark, noisy = [], []
    for _ in range(1500):
        shot = augment.degrade(rng, flat, augment.sample_camera(rng))
        assert shot.dtype == np.float32 and shot.min() >= 0 and shot.max() <= 1
        dark.append(shot.mean() < 0.42)
        noisy.append(shot.std() > 0.004)
    assert np.mean(dark) == pytest.approx(0.5, abs=0.05)
    assert np.mean(noisy) == pytest.approx(0.5, abs=0.05)
    assert np.mean(np.array(dark) & np.array(noisy)) == pytest.approx(0.25, abs=0.05)
    assert (flat == 128).all()


def test_degrade_adds_noise_of_the_sampled_covariance(monkeypatch):
    mixing = np.array([[0.05, 0.03, 0], [0, 0.02, 0], [0, 0, 0.04]], np.float32)
    monkeypatch.setattr(augment, "sample_noise", lambda *_: mixing)
    flat = np.full((96, 96, 3), 128, np.uint8)
    rng = np.random.default_rng(7)
    shots = [augment.degrade(rng, flat, augment.sample_camera(rng)) for _ in range(20)]
    noisy = next(shot for shot in shots if shot.std() > 0.01 and shot.mean() > 0.45)
    covariance = np.cov(noisy.reshape(-1, 3), rowvar=False)
    np.testing.assert_allclose(covariance, mixing.T @ mixing, atol=1.5e-4)


def test_jpeg_loses_more_at_a_lower_quality():
    rgb = textured(64, 80) // np.array([1, 2, 4], np.uint8)  # red, so that swapped channels would show
    error = [np.abs(apply_jpeg(rgb, quality).astype(int) - rgb).mean() for quality in (95, 60, 30)]
    assert 0 < error[0] < error[1] < error[2] < 20
    assert apply_jpeg(rgb, 50).shape == rgb.shape


def test_jpeg_of_a_region_has_its_blocks_where_the_whole_image_would():
    rgb = textured(128, 128)
    region = slice(21, 117), slice(27, 123)
    whole = apply_jpeg(rgb, 40)[region][32:64, 32:64]
    aligned = apply_jpeg(rgb[region], 40, top_px=21, left_px=27)
    assert aligned.shape == (96, 96, 3)
    np.testing.assert_array_equal(aligned[32:64, 32:64], whole)
    assert (apply_jpeg(rgb[region], 40)[32:64, 32:64] != whole).any()


def test_jpeg_qualities_are_drawn_for_half():
    rng = np.random.default_rng(8)
    drawn = [augment.sample_jpeg_quality(rng) for _ in range(6000)]
    qualities = [quality for quality in drawn if quality is not None]
    assert len(qualities) / 6000 == pytest.approx(0.5, abs=0.03)
    assert set(qualities) == set(range(30, 96))


def test_strong_operations_are_drawn_at_their_rates_and_ranges():
    rng = np.random.default_rng(9)
    pairs = [augment.sample_strong_operations(rng) for _ in range(6000)]
    strengths = defaultdict(list)
    for pair in pairs:
        assert len(pair) == 2
        for operation, strength in pair:
            strengths[operation.__name__].append(strength)
    share = {name: len(values) / 12000 for name, values in strengths.items()}
    assert share.pop("adjust_contrast") == pytest.approx(1 / 3, abs=0.02)  # it stands twice in the list
    assert set(share) == {"adjust_brightness", "posterize", "adjust_sharpness", "blur"}
    assert all(value == pytest.approx(1 / 6, abs=0.02) for value in share.values())
    for name in ("adjust_contrast", "adjust_brightness", "adjust_sharpness"):
        assert 0.05 <= min(strengths[name]) < 0.06 and 0.94 < max(strengths[name]) <= 0.95
    # Contrast factors under 0.25 come from one of its two entries only.
    assert np.mean(np.array(strengths["adjust_contrast"]) < 0.25) == pytest.approx(0.5 * 0.2 / 0.9, abs=0.03)
    bits, radii = (np.array(strengths[name]) for name in ("posterize", "blur"))
    for kept in (4, 5, 6, 7):
        assert np.mean(bits == kept) == pytest.approx(1 / 4, abs=0.03)
    for radius_px, expected in ((1, 0.404), (3, 0.404), (5, 0.192)):
        assert np.mean(radii == radius_px) == pytest.approx(expected, abs=0.04)
    repeated = np.mean([first[0] is second[0] for first, second in pairs])
    assert repeated == pytest.approx((2**2 + 4) / 6**2, abs=0.03)


def test_contrast_blends_with_the_mean_grey():
    rgb = textured(40, 50)
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY).mean()
    expected = grey + 0.3 * (rgb.astype(float) - grey)
    np.testing.assert_allclose(augment.adjust_contrast(rgb, 0.3), expected, atol=0.5001)


def test_brightness_blends_with_black():
    rgb = textured(40, 50)
    np.testing.assert_allclose(augment.adjust_brightness(rgb, 0.4), 0.4 * rgb, atol=0.5001)


def test_posterize_keeps_the_high_bits():
    rgb = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    assert np.unique(augment.posterize(rgb, 4)).tolist() == list(range(0, 256, 16))
    assert len(np.unique(augment.posterize(rgb, 7))) == 128
    np.testing.assert_array_equal(augment.posterize(rgb, 8), rgb)


def test_sharpness_blends_with_a_smoothed_image():
    rgb = np.zeros((9, 9, 3), np.uint8)
    rgb[4, 4] = rgb[0, 0] = 130
    softer = augment.adjust_sharpness(rgb, 0.2)
    assert softer[4, 4, 0] == round(0.2 * 130 + 0.8 * 50) and softer[3, 4, 0] == 8
    assert softer[0, 0, 0] == 130 and softer[0, 1, 0] == 0


def test_blur_grows_with_its_radius():
    rgb = textured(64, 64)
    detail = [float(augment.blur(rgb, radius).std()) for radius in (1, 3, 5)]
    assert rgb.std() > detail[0] > detail[1] > detail[2]


def test_a_strong_view_keeps_shape_and_source_and_follows_its_seed():
    rgb = textured(32, 32)
    source = rgb.copy()
    views = [augment.make_strong_view(np.random.default_rng(seed), rgb) for seed in range(30)]
    assert all(view.shape == rgb.shape and view.dtype == np.uint8 for view in views)
    assert sum((view != rgb).any() for view in views) >= 28  # posterizing to 8 bits twice changes nothing
    np.testing.assert_array_equal(rgb, source)
    np.testing.assert_array_equal(augment.make_strong_view(np.random.default_rng(3), rgb), views[3])
