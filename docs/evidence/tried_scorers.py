"""Scorers that were tried beside the registered ones.

A scorer rates images `B 3 H W` (RGB in [0, 1]) with `B` scores; higher is better. The tables show the functions' names.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from corun_ray.core.metrics.fade import compute_distances
from corun_ray.core.scoring.scorers import CLARITY_SCORERS, CONTRAST_PATCH_PX, QUALITY_SCORERS, Scorer


def entropy(images: Tensor) -> Tensor:
    """Compute the Shannon entropy of the grey histogram."""
    levels = (grey(images) * 255).round().long().flatten(1)
    counts = torch.zeros(len(images), 256).scatter_add_(1, levels, torch.ones(levels.shape))
    share = counts / counts.sum(1, keepdim=True)
    return -torch.special.xlogy(share, share).sum(1)


def saturation(images: Tensor) -> Tensor:
    """Compute the mean saturation, as in HSV."""
    largest = images.amax(1)
    return ((largest - images.amin(1)) / largest.clamp_min(1 / 255)).mean((1, 2))


def local_dark_channel(images: Tensor) -> Tensor:
    """Compute 1 - the mean dark channel with a 15 px patch (He, Sun, Tang, CVPR 2009)."""
    return 1 + F.max_pool2d(-images.amin(1, keepdim=True), 15, 1, 7).mean((1, 2, 3))


def colour_attenuation(images: Tensor) -> Tensor:
    """Compute the mean negative depth from brightness and saturation.

    Source: Zhu, Mai, Shao (IEEE TIP 2015).
    """
    return -(0.96 * images.amax(1).mean((1, 2)) - 0.78 * saturation(images))


def bare_contrast(images: Tensor) -> Tensor:
    """Compute `contrast` without the cost of clipping."""
    mean = F.avg_pool2d(grey(images), CONTRAST_PATCH_PX)
    square = F.avg_pool2d(grey(images) ** 2, CONTRAST_PATCH_PX)
    return (square - mean**2).clamp_min(0).sqrt().mean((1, 2, 3))


def spread(images: Tensor) -> Tensor:
    """Compute the standard deviation of grey over the image."""
    return grey(images).flatten(1).std(1)


def gradient(images: Tensor) -> Tensor:
    """Compute the mean absolute difference of neighbours, along rows plus along columns."""
    luma = grey(images)
    return luma.diff(dim=-1).abs().mean((1, 2, 3)) + luma.diff(dim=-2).abs().mean((1, 2, 3))


def colourfulness(images: Tensor) -> Tensor:
    """Compute the colourfulness of Hasler and Suesstrunk (2003)."""
    red, green, blue = images.flatten(2).unbind(1)
    first, second = red - green, (red + green) / 2 - blue
    return (first.var(1) + second.var(1)).sqrt() + 0.3 * torch.hypot(first.mean(1), second.mean(1))


def exposedness(images: Tensor) -> Tensor:
    """Rate how near values are to the middle (Mertens, Kautz, Van Reeth, 2007)."""
    return torch.exp(-((images - 0.5) ** 2) / (2 * 0.2**2)).prod(1).mean((1, 2))


def little_noise(images: Tensor) -> Tensor:
    """Compute the negative noise of Immerkaer (1996), not divided by the contrast."""
    kernel = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]]).view(1, 1, 3, 3)
    return -F.conv2d(grey(images), kernel).abs().mean((1, 2, 3))


def natural_mscn(images: Tensor) -> Tensor:
    """Rate how near the variance of normalised grey is to 0.35, a natural value.

    Grey is normalised by the mean and the contrast of its surroundings.
    """
    pixels = F.pad(grey(images) * 255, (3, 3, 3, 3), mode="replicate")
    mean = F.avg_pool2d(pixels, 7, 1)
    deviation = (F.avg_pool2d(pixels**2, 7, 1) - mean**2).clamp_min(0).sqrt()
    return -(((grey(images) * 255 - mean) / (deviation + 1)).flatten(1).var(1) - 0.35).abs()


def fog_free(images: Tensor) -> Tensor:
    """Compute the negative distance to FADE's model of fog-free patches."""
    return -compute_distances(images)[0].nanmean((1, 2)).float()


def any_offer(images: Tensor) -> Tensor:
    """Rate all images alike, so that the last offer always wins."""
    return torch.zeros(len(images))


def grey(images: Tensor) -> Tensor:
    """Convert images to BT.601 luma, `B 1 H W`."""
    return (images * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


TRIED = (
    entropy,
    saturation,
    local_dark_channel,
    colour_attenuation,
    bare_contrast,
    spread,
    gradient,
    colourfulness,
    exposedness,
    little_noise,
    natural_mscn,
    fog_free,
    any_offer,
)
SCORERS: dict[str, Scorer] = {**CLARITY_SCORERS, **QUALITY_SCORERS, **{scorer.__name__: scorer for scorer in TRIED}}
