import numpy as np
import pytest

from corun_ray.core.data.haze import (
    Haze,
    HazeRange,
    add_haze,
    compute_density,
    compute_transmission,
    sample_haze,
)


def test_transmission_at_given_values():
    nearness = np.array([[1.0, 0.5, 0.0]], np.float32)
    expected = [[1.0, np.exp(-1.3), np.exp(-2.6)]]
    result = compute_transmission(nearness, beta=1.3)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_haze_at_given_values():
    scene = np.array([[[0.2, 0.4, 0.6], [0.2, 0.4, 0.6]]], np.float32)
    hazy = add_haze(scene, np.array([[1.0, 0.25]], np.float32), Haze(1.0, (0.8, 0.9, 1.0)))
    assert hazy.dtype == np.float32
    np.testing.assert_allclose(hazy, [[[0.2, 0.4, 0.6], [0.65, 0.775, 0.9]]], rtol=1e-6)


def test_haze_leaves_the_scene_as_it_was():
    scene = np.full((2, 2, 3), 0.5, np.float32)
    add_haze(scene, np.full((2, 2), 0.1, np.float32), Haze(1.0, (1.0, 1.0, 1.0)))
    assert (scene == 0.5).all()


def test_sampled_haze_fills_its_ranges():
    rng = np.random.default_rng(1)
    hazes = [sample_haze(rng, HazeRange()) for _ in range(4000)]
    beta = np.array([haze.beta for haze in hazes])
    airlight = np.array([haze.airlight for haze in hazes])
    assert 0.2 <= beta.min() < 0.21 and 2.79 < beta.max() <= 2.8
    np.testing.assert_allclose(np.quantile(beta, [0.25, 0.5, 0.75]), [0.85, 1.5, 2.15], atol=0.08)
    assert 0.225 <= airlight.min() < 0.25 and airlight.max() == 1.0
    assert np.median(airlight) == pytest.approx(0.625, abs=0.03)
    spread = np.ptp(airlight, axis=1)
    assert 0.04 < spread.max() <= 0.05 and spread.mean() > 0.02


def test_without_tint_the_airlight_is_grey():
    red, green, blue = sample_haze(np.random.default_rng(2), HazeRange(airlight_tint=0.0)).airlight
    assert red == green == blue


def test_the_same_seed_draws_the_same_haze():
    first, second = (sample_haze(np.random.default_rng(3), HazeRange()) for _ in range(2))
    assert first == second


def test_haze_before_the_nearest_point():
    nearness = np.array([[1.0, 0.5, 0.0]], np.float32)
    expected = np.exp(-2 * 1.3 * (1 - nearness + 0.25))
    np.testing.assert_allclose(compute_transmission(nearness, beta=1.3, nearest=0.25), expected, rtol=1e-6)


def test_a_range_of_nearest_distances_is_drawn_last():
    plain, ranged = (np.random.default_rng(4) for _ in range(2))
    without, with_range = sample_haze(plain, HazeRange()), sample_haze(ranged, HazeRange(nearest=(0.0, 0.3)))
    assert (without.beta, without.airlight, without.nearest) == (with_range.beta, with_range.airlight, 0.0)
    distances = [sample_haze(ranged, HazeRange(nearest=(0.1, 0.3))).nearest for _ in range(400)]
    assert 0.1 <= min(distances) < 0.11 and 0.29 < max(distances) <= 0.3


def test_uniform_haze_has_one_density():
    density = compute_density(Haze(1.3, (1.0, 1.0, 1.0)), 4, 6)
    assert density.shape == (4, 6) and (density == np.float32(1.3)).all()


def test_uneven_haze_varies_smoothly_about_its_density():
    rng = np.random.default_rng(5)
    uneven = HazeRange(beta=(1.0, 1.0), density_variation=(0.6, 0.6))
    fields = [compute_density(sample_haze(rng, uneven), 120, 160) for _ in range(200)]
    assert np.mean(fields) == pytest.approx(1.0, abs=0.03)

    # Deviations reach most of the share that was asked for.
    deviations = [np.abs(field - 1).max() for field in fields]
    assert min(deviations) > 0.4 and np.median(deviations) > 0.55 and max(deviations) <= np.float32(0.6001)

    # From one pixel to the next, the density changes by a small part of that.
    assert max(np.abs(np.diff(field, axis=1)).max() for field in fields) < 0.1


def test_the_thinnest_haze_is_clear_air():
    rng = np.random.default_rng(6)
    fields = [compute_density(sample_haze(rng, HazeRange(density_variation=(1.0, 1.0))), 32, 32) for _ in range(50)]
    assert 0 <= min(field.min() for field in fields) < 0.01


def test_a_transmission_follows_the_density():
    density = np.array([[0.0, 0.5, 1.0]], np.float32)
    expected = np.exp(-2 * density * 0.75)
    np.testing.assert_allclose(compute_transmission(np.full((1, 3), 0.25, np.float32), density), expected, rtol=1e-6)


def test_variation_leaves_the_other_draws_as_they_were():
    plain, uneven = (np.random.default_rng(7) for _ in range(2))
    without, with_range = sample_haze(plain, HazeRange()), sample_haze(uneven, HazeRange(density_variation=(0.0, 0.5)))
    assert (without.beta, without.airlight) == (with_range.beta, with_range.airlight)
    assert without.deviation is None and with_range.deviation is not None
