"""Weight-free scorers: `B 3 H W` RGB in [0, 1] to `B` float32 in [0, 1], higher is better.

A label pool keeps a restoration only if neither score falls, so the two must pull against each other: clarity
rises as haze comes off, quality falls where an image pays for it with noise or lost shadows. How well they
rank restorations of one image by PSNR against the truth is measured in `docs/coherence.md`. Images have sides
of 8 px and more (`fade`: 16).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from corun_ray.core.metrics.fade import fade

Scorer = Callable[[Tensor], Tensor]

DARKEST, BRIGHTEST = 2 / 255, 253 / 255  # values at and beyond these count as clipped

CONTRAST_PATCH_PX = 8
CONTRAST_HALF = 0.05  # local standard deviation that scores one half
CLIPPING_COST = 3.0

NOISE_TOLERATED = 0.2  # ratio of noise to contrast that fine texture also reaches
CRUSHED_TOLERATED = 0.02  # share of black values that natural scenes also have
CRUSHED_COST = 2.0


def rate_contrast(images: Tensor) -> Tensor:
    """Local contrast, less what clipping made of it.

    Haze scales the deviations from the airlight by the transmission, so contrast within small patches (the
    standard deviation of grey in 8 px squares) rises as haze comes off. Restoring too much also raises it,
    but drives values out of range: the truncation loss that Kim et al. (J. Vis. Commun. Image R. 24, 2013)
    weigh against contrast. Here a clipped share of one third costs the whole score.
    """
    grey = _grey(images)
    mean = F.avg_pool2d(grey, CONTRAST_PATCH_PX)
    variance = F.avg_pool2d(grey * grey, CONTRAST_PATCH_PX) - mean * mean
    deviation = variance.clamp_min(0).sqrt().mean((1, 2, 3))
    clipped = _share(images <= DARKEST) + _share(images >= BRIGHTEST)
    return deviation / (deviation + CONTRAST_HALF) * (1 - CLIPPING_COST * clipped).clamp_min(0)


def rate_fade(images: Tensor) -> Tensor:
    """`1 / (1 + FADE)`, clear of fog by patch statistics; 0 where FADE is undefined (all black)."""
    return (1 / (1 + fade(images))).nan_to_num(0.0).float()


def rate_dark_channel(images: Tensor) -> Tensor:
    """1 − the mean of each pixel's smallest channel, which haze lifts (He, Sun, Tang, CVPR 2009)."""
    return 1 - images.float().amin(1).mean((1, 2))


def rate_cleanness(images: Tensor) -> Tensor:
    """1 − excess noise − crushed shadows.

    Noise is Immerkaer's estimate (Comput. Vis. Image Underst. 64, 1996) divided by the image's contrast:
    lifting haze amplifies both alike, so only noise or an artefact that was *added* is counted, beyond what
    texture also has. Crushed shadows, the mark of too much dehazing, are black values beyond a natural share.
    """
    grey = _grey(images)
    noise = _mean_laplacian(grey) * math.sqrt(math.pi / 2) / 6
    ratio = noise / (grey.flatten(1).std(1) + 0.02)
    excess = (ratio - NOISE_TOLERATED).clamp_min(0)
    crushed = (_share(images <= DARKEST) - CRUSHED_TOLERATED).clamp_min(0)
    return (1 - excess - CRUSHED_COST * crushed).clamp_min(0)


def rate_unclipped(images: Tensor) -> Tensor:
    """Share of colour values that are neither black nor white."""
    return _share((images > DARKEST) & (images < BRIGHTEST))


CLARITY_SCORERS: dict[str, Scorer] = {"contrast": rate_contrast, "fade": rate_fade, "dark_channel": rate_dark_channel}
QUALITY_SCORERS: dict[str, Scorer] = {"clean": rate_cleanness, "unclipped": rate_unclipped}
DEFAULT_CLARITY = "contrast"
DEFAULT_QUALITY = "clean"


def _grey(images: Tensor) -> Tensor:
    """BT.601 luma: `B 3 H W` to `B 1 H W`."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)
    return (images.float() * weights).sum(1, keepdim=True)


def _mean_laplacian(grey: Tensor) -> Tensor:
    """Mean magnitude of `[[1 -2 1] [-2 4 -2] [1 -2 1]]`, which is blind to ramps and straight edges."""
    rows = grey[..., :-2, :] - 2 * grey[..., 1:-1, :] + grey[..., 2:, :]
    both = rows[..., :-2] - 2 * rows[..., 1:-1] + rows[..., 2:]
    return both.abs().mean((1, 2, 3))


def _share(chosen: Tensor) -> Tensor:
    return chosen.float().mean((1, 2, 3))
