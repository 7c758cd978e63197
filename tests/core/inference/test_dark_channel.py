"""The dark channel prior, on a scene that obeys it and on images that give it nothing to hold on to."""

import numpy as np
import pytest

from corun_ray.core.inference.dark_channel import dehaze


def scene(rng: np.random.Generator) -> np.ndarray:
    """Patches of strong colour, so that some channel is dark everywhere nearby; H W 3 in [0, 1]."""
    colours = rng.uniform(0, 1, (12, 16, 3))
    colours[np.arange(12)[:, None], np.arange(16), rng.integers(0, 3, (12, 16))] = 0
    return colours.repeat(10, 0).repeat(10, 1).astype(np.float32)


@pytest.mark.parametrize("transmission", [0.4, 0.7])
def test_haze_over_a_colourful_scene_is_mostly_removed(transmission: float) -> None:
    clear = scene(np.random.default_rng(0))
    airlight = np.array([0.85, 0.9, 0.95], np.float32)
    clear[:20] = airlight  # a sky, where the airlight is to be found
    hazy = (clear * transmission + airlight * (1 - transmission)).astype(np.float32)
    found = dehaze(hazy)
    assert found.shape == hazy.shape and found.dtype == np.float32
    below = slice(60, None)  # beyond the reach of the sky
    assert np.abs(found[below] - clear[below]).mean() < 0.35 * np.abs(hazy[below] - clear[below]).mean()


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_flat_images_stay_finite_and_in_range(level: float) -> None:
    found = dehaze(np.full((40, 30, 3), level, np.float32))
    assert np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1
