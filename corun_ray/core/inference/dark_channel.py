"""Dehazing by the dark channel prior, the classic that needs no training: a baseline worth beating.

Source: He, Sun, Tang, "Single Image Haze Removal Using Dark Channel Prior", CVPR 2009; the transmission is refined by
the guided filter (He, Sun, Tang, ECCV 2010), as its authors recommend since.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

PATCH_PX = 15
HAZE_KEPT = 0.05
"""1 - omega: a trace of haze is left to distant things."""
TRANSMISSION_MIN = 0.1
BRIGHTEST = 0.001
"""Share of the pixels, those with the brightest dark channel, among which the airlight is looked for."""
GUIDE_RADIUS_PX = 40
GUIDE_SMOOTHNESS = 1e-3

Floats = NDArray[np.floating]


def dehaze(hazy: NDArray[np.float32]) -> NDArray[np.float32]:
    """H W 3, RGB in [0, 1] → its scene, of the same shape and range."""
    airlight = _airlight(hazy)
    transmission = 1 - (1 - HAZE_KEPT) * _dark_channel(hazy / airlight)
    transmission = _guided(transmission, np.asarray(cv2.cvtColor(hazy, cv2.COLOR_RGB2GRAY))).clip(TRANSMISSION_MIN, 1)
    return ((hazy - airlight) / transmission[..., None] + airlight).clip(0, 1).astype(np.float32)


def _dark_channel(image: Floats) -> Floats:
    return np.asarray(cv2.erode(image.min(2), np.ones((PATCH_PX, PATCH_PX), np.uint8)))


def _airlight(hazy: Floats) -> Floats:
    """The colour of the brightest of those pixels in whose neighbourhood nothing is dark; above 0."""
    dark = _dark_channel(hazy).ravel()
    count = max(1, int(len(dark) * BRIGHTEST))
    candidates = hazy.reshape(-1, 3)[np.argpartition(dark, -count)[-count:]]
    return candidates[candidates.sum(1).argmax()].clip(1 / 255)


def _guided(values: Floats, guide: Floats) -> Floats:
    """Smooths `values` H W but for the edges of `guide` H W: locally linear in it."""

    def mean(x: Floats) -> Floats:
        return np.asarray(cv2.blur(x, (2 * GUIDE_RADIUS_PX + 1,) * 2, borderType=cv2.BORDER_REFLECT))

    mean_guide, mean_values = mean(guide), mean(values)
    covariance = mean(guide * values) - mean_guide * mean_values
    slope = covariance / (mean(guide * guide) - mean_guide**2 + GUIDE_SMOOTHNESS)
    return mean(slope) * guide + mean(mean_values - slope * mean_guide)
