import numpy as np
import pytest

from corun_ray.core.data.augment import resize
from corun_ray.core.data.depth import DepthMap, draw_procedural_depth
from corun_ray.core.data.haze import compute_transmission
from corun_ray.core.data.images import BadImage


def whole(depth_map: DepthMap) -> np.ndarray:
    return depth_map.to_inverse(depth_map.pixels)


def test_inverse_maps_are_scaled_to_the_unit_range():
    result = whole(DepthMap.from_pixels(np.array([[10.0, 15.0, 30.0]], np.float32), "inverse"))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, [[0.0, 0.25, 1.0]])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", "uint16", "int32", ">f4"])
@pytest.mark.parametrize("kind", ["inverse", "metres"])
def test_numbers_of_any_kind_give_the_same_depth(kind, dtype):
    values = np.array([[2, 4, 6, 10, 0]])
    result = whole(DepthMap.from_pixels(values.astype(dtype), kind))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, [[0.2, 0.4, 0.6, 1, 0]] if kind == "inverse" else [[1, 0.75, 0.5, 0, 0]])


def test_metres_give_a_transmission_that_decays_with_distance_and_no_reading_is_farthest():
    nearness = whole(DepthMap.from_pixels(np.array([[2.0, 4.0, 6.0, 10.0, 0.0, -1.0]], np.float32), "metres"))
    np.testing.assert_allclose(nearness, [[1.0, 0.75, 0.5, 0.0, 0.0, 0.0]])
    equal_steps = compute_transmission(nearness, beta=0.9)[0]
    assert equal_steps[1] / equal_steps[0] == pytest.approx(equal_steps[2] / equal_steps[1])


@pytest.mark.parametrize("kind", ["inverse", "metres"])
def test_a_region_is_scaled_by_the_whole_map(kind):
    pixels = np.random.default_rng(0).uniform(0.5, 40, (30, 40)).astype(np.float32)
    depth_map = DepthMap.from_pixels(pixels, kind)
    np.testing.assert_array_equal(depth_map.to_inverse(pixels[5:9, 20:33]), whole(depth_map)[5:9, 20:33])


@pytest.mark.parametrize(
    ("values", "kind", "reason"),
    [
        ([[4, 4]], "inverse", "constant .4 everywhere"),
        ([[4, 4]], "metres", "constant .4 everywhere"),
        ([[0, 4]], "metres", "same value at every reading"),
        ([[0, -3]], "metres", "same value at every reading"),
        ([[0, np.nan]], "inverse", "not finite"),
        ([[0, np.inf]], "metres", "not finite"),
        ([[0, 1e300]], "inverse", "not finite"),
    ],
)
def test_a_map_without_depth_is_refused(values, kind, reason):
    with pytest.raises(BadImage, match=reason):
        DepthMap.from_pixels(np.array(values, np.float64), kind)


def test_a_map_of_another_resolution_is_inverted_and_then_resized():
    """Where nothing was read, the depth must not be averaged with what was."""
    metres = np.full((20, 30), 5, np.uint16)
    metres[:, 15:] = 0
    metres[0, 0] = 1
    depth_map = DepthMap.from_pixels(metres, "metres")
    assert depth_map.fit_to_image(20, 30) is depth_map
    np.testing.assert_array_equal(whole(depth_map.fit_to_image(40, 60)), resize(whole(depth_map), 40, 60))
    with pytest.raises(BadImage, match="30 x 20 px does not fit its image of 30 x 30 px"):
        depth_map.fit_to_image(30, 30)


@pytest.mark.parametrize(("height_px", "width_px"), [(321, 481), (481, 321), (40, 300), (8, 8)])
def test_procedural_depth_is_a_smooth_outdoor_scene(height_px, width_px):
    rng = np.random.default_rng(4)
    for _ in range(20):
        depth = whole(draw_procedural_depth(rng, height_px, width_px))
        assert depth.shape == (height_px, width_px) and depth.dtype == np.float32
        assert depth.min() == 0 and depth.max() == 1
        assert depth[-1].mean() > 0.7 and depth[0].mean() < 0.4  # ground at the foot, sky at the top


def test_procedural_depth_has_no_edges():
    rng = np.random.default_rng(5)
    steepest = max(np.abs(np.diff(whole(draw_procedural_depth(rng, 321, 481)), axis=1)).max() for _ in range(20))
    assert steepest < 0.05


def test_procedural_depth_follows_its_seed():
    same = [whole(draw_procedural_depth(np.random.default_rng(6), 60, 80)) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    assert (same[0] != whole(draw_procedural_depth(np.random.default_rng(7), 60, 80))).any()
