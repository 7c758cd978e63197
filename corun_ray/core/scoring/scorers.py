"""Scorers of clarity and quality that need no weights.

A scorer rates images `B 3 H W` (RGB in [0, 1]) with `B` float32 scores in [0, 1]; higher is better. The images have
sides of 8 px and more (`fade`: 16 px).

A label pool keeps a restoration only if neither score falls, so the two scores must pull against each other: clarity
rises as haze comes off, and quality falls where an image pays for that with noise or lost shadows.
`docs/coherence.md` measures how well the scorers rank restorations of one image by PSNR against the truth.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from corun_ray.core.metrics.fade import fade

DARKEST, BRIGHTEST = 2 / 255, 253 / 255
"""Values at these bounds and beyond count as clipped."""

CONTRAST_PATCH_PX = 8
CONTRAST_HALF = 0.05
"""The local standard deviation that scores one half."""
CLIPPING_COST = 3.0
"""A clipped share of 1 / 3 costs the whole contrast score."""

NOISE_TOLERATED = 0.2
"""The ratio of noise to contrast that fine texture also reaches."""
CONTRAST_FLOOR = 0.02
"""Keeps the ratio of noise to contrast finite in flat images."""
CRUSHED_TOLERATED = 0.02
"""The share of black values that natural scenes also have."""
CRUSHED_COST = 2.0
"""The score that each unit of a larger share costs."""

LUMA_WEIGHTS = (0.299, 0.587, 0.114)
"""BT.601."""

Scorer = Callable[[Tensor], Tensor]
"""Images `B 3 H W` in [0, 1] to `B` float32 scores in [0, 1]; higher is better."""


def rate_contrast(images: Tensor) -> Tensor:
    """Rate clarity by local contrast, reduced by clipping.

    Haze scales the deviations from the airlight by the transmission. So contrast within small patches (the standard
    deviation of grey in 8 px squares) rises as haze comes off. Too much restoration also raises contrast, but drives
    values out of range: the truncation loss that Kim et al. (J. Vis. Commun. Image R. 24, 2013) weigh against contrast.
    """
    # Mean standard deviation of grey in the patches.
    grey = _to_grey(images)
    mean = F.avg_pool2d(grey, CONTRAST_PATCH_PX)
    variance = F.avg_pool2d(grey * grey, CONTRAST_PATCH_PX) - mean * mean
    deviation = variance.clamp_min(0).sqrt().mean((1, 2, 3))

    # Reduce the score by the share of clipped values.
    clipped = _measure_share(images <= DARKEST) + _measure_share(images >= BRIGHTEST)
    return deviation / (deviation + CONTRAST_HALF) * (1 - CLIPPING_COST * clipped).clamp_min(0)


def rate_fade(images: Tensor) -> Tensor:
    """Rate clarity by FADE: `1 / (1 + FADE)`.

    The score is 0 where FADE is undefined (all black).
    """
    return (1 / (1 + fade(images))).nan_to_num(0.0).float()


def rate_dark_channel(images: Tensor) -> Tensor:
    """Rate clarity by the dark channel.

    The score is 1 − the mean of each pixel's smallest channel. Haze lifts that channel (He, Sun, Tang, CVPR 2009).
    """
    return 1 - images.float().amin(1).mean((1, 2))


def rate_cleanness(images: Tensor) -> Tensor:
    """Rate quality by noise and crushed shadows.

    The score is 1 − excess noise − crushed shadows. Noise is Immerkaer's estimate (Comput. Vis. Image Underst. 64,
    1996) divided by the image's contrast. Dehazing amplifies both alike, so the ratio counts only noise and artefacts
    that were *added*, beyond what texture also has. Crushed shadows, the mark of too much dehazing, are black values
    beyond a natural share.
    """
    # Excess noise, relative to contrast.
    grey = _to_grey(images)
    noise = _measure_laplacian(grey) * math.sqrt(math.pi / 2) / 6
    ratio = noise / (grey.flatten(1).std(1) + CONTRAST_FLOOR)
    excess = (ratio - NOISE_TOLERATED).clamp_min(0)

    # Crushed shadows.
    crushed = (_measure_share(images <= DARKEST) - CRUSHED_TOLERATED).clamp_min(0)
    return (1 - excess - CRUSHED_COST * crushed).clamp_min(0)


def rate_unclipped(images: Tensor) -> Tensor:
    """Rate quality by the share of unclipped values.

    These colour values are neither black nor white.
    """
    return _measure_share((images > DARKEST) & (images < BRIGHTEST))


def _to_grey(images: Tensor) -> Tensor:
    """Convert images to BT.601 luma, `B 1 H W`."""
    weights = torch.tensor(LUMA_WEIGHTS, device=images.device).view(1, 3, 1, 1)
    return (images.float() * weights).sum(1, keepdim=True)


def _measure_laplacian(grey: Tensor) -> Tensor:
    """Measure the mean magnitude of a Laplacian, `B`.

    The kernel `[[1 -2 1] [-2 4 -2] [1 -2 1]]` is a second difference down the rows, then one along them. It ignores
    ramps and straight edges.
    """
    rows = grey[..., :-2, :] - 2 * grey[..., 1:-1, :] + grey[..., 2:, :]
    both = rows[..., :-2] - 2 * rows[..., 1:-1] + rows[..., 2:]
    return both.abs().mean((1, 2, 3))


def _measure_share(chosen: Tensor) -> Tensor:
    """Measure the share of true values in each image."""
    return chosen.float().mean((1, 2, 3))


# --- The scorers by the names that jobs use ---

CLARITY_SCORERS: dict[str, Scorer] = {"contrast": rate_contrast, "fade": rate_fade, "dark_channel": rate_dark_channel}
QUALITY_SCORERS: dict[str, Scorer] = {"clean": rate_cleanness, "unclipped": rate_unclipped}
DEFAULT_CLARITY = "contrast"
DEFAULT_QUALITY = "clean"
