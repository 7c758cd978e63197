"""Dehazing by the dark channel prior, the classic that needs no training: a baseline to compare networks with.

Source: He, Sun, Tang, "Single Image Haze Removal Using Dark Channel Prior", CVPR 2009; the transmission is refined by
the guided filter (He, Sun, Tang, ECCV 2010), as its authors recommend since.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

PATCH_PX = 15
HAZE_KEPT = 0.05
"""1 - omega: a trace of haze is left on distant things."""
TRANSMISSION_MIN = 0.1
BRIGHTEST_SHARE = 0.001
"""Share of the pixels, with the brightest dark channel, that are candidates for the airlight."""
GUIDE_RADIUS_PX = 40
GUIDE_SMOOTHNESS = 1e-3

Floats = NDArray[np.floating]


def dehaze(hazy: NDArray[np.float32]) -> NDArray[np.float32]:
    """Restore the scene of a hazy image.

    `hazy` and the scene are `H W 3`, RGB in [0, 1].
    """
    airlight = _estimate_airlight(hazy)

    # The darkest channel of a clear patch is about 0: what remains of it is haze.
    transmission = 1 - (1 - HAZE_KEPT) * _compute_dark_channel(hazy / airlight)
    grey = np.asarray(cv2.cvtColor(hazy, cv2.COLOR_RGB2GRAY), np.float32)
    transmission = _smooth_by_guide(transmission, grey).clip(TRANSMISSION_MIN, 1)

    # Invert the scattering model.
    return ((hazy - airlight) / transmission[..., None] + airlight).clip(0, 1).astype(np.float32)


def _compute_dark_channel(image: Floats) -> Floats:
    """Return the least value in each pixel's patch, `H W`.

    All channels count.
    """
    return np.asarray(cv2.erode(image.min(2), np.ones((PATCH_PX, PATCH_PX), np.uint8)))


def _estimate_airlight(hazy: Floats) -> Floats:
    """Estimate the airlight, above 0.

    It is the colour of the brightest pixel among those with the brightest dark channel.
    """
    dark = _compute_dark_channel(hazy).ravel()
    count = max(1, int(len(dark) * BRIGHTEST_SHARE))
    candidates = hazy.reshape(-1, 3)[np.argpartition(dark, -count)[-count:]]
    return candidates[candidates.sum(1).argmax()].clip(1 / 255)


def _smooth_by_guide(values: Floats, guide: Floats) -> Floats:
    """Smooth `values` except at the edges of `guide`.

    Both are `H W`; this is the guided filter.
    """
    side_px = 2 * GUIDE_RADIUS_PX + 1

    def mean(x: Floats) -> Floats:
        """Average over the window around each pixel."""
        return np.asarray(cv2.blur(x, (side_px, side_px), borderType=cv2.BORDER_REFLECT))

    # In each window, fit `values` as a linear function of `guide`.
    mean_guide, mean_values = mean(guide), mean(values)
    covariance = mean(guide * values) - mean_guide * mean_values
    slope = covariance / (mean(guide * guide) - mean_guide**2 + GUIDE_SMOOTHNESS)

    # Each pixel gets the average of the functions of all windows that contain it.
    return mean(slope) * guide + mean(mean_values - slope * mean_guide)
