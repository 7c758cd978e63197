"""Coherence by a reference: a restoration is good where it is near that of a network that has learnt to restore.

Given a hazy image, many scenes are possible. The squared error to expect of a restoration is its squared distance to
the mean of these scenes, and their variance about that mean:

    E |x - truth|^2 = |x - mean|^2 + variance

A trained network's restoration stands for the mean. The variance grows with the haze, which hides the scene.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corun_ray.core.choices import Combine
from corun_ray.core.inference.restore import restore
from corun_ray.core.networks.corun import Restoration
from corun_ray.core.scoring.coherence import BlockScores, Coherence, GlobalScores, check_sides

VARIANCE_OF_HAZE = 0.02
"""Variance of the truth about the reference where haze hides everything.

A round number: trust ranks blocks about equally well from 0.01 to 0.08 (docs/coherence.md).
"""

WORST_DB, BEST_DB = 5.0, 45.0
"""Expected peak signal-to-noise ratios that score 0 and 1."""


class ReferenceCoherence(Coherence):
    """The scores of restorations by the errors to expect, given what a reference network restores.

    Both scores are the same: clarity falls with haze that is left or overdone, quality with noise and blur, and the
    distance to the reference grows with both. The reference sees the whole hazy image, also to rate a block.
    """

    def __init__(self, network: nn.Module, block_px: int = 32, combine: Combine = "addition") -> None:
        """Rate by the restorations of `network`."""
        super().__init__(block_px=block_px, combine=combine)
        self.network = network

    @torch.no_grad()
    def score_images(self, images: Tensor, hazy: Tensor) -> GlobalScores:
        """Score whole restorations. See `Coherence`."""
        errors = expect_errors(images, self.restore_reference(hazy))
        score = rate_error(errors.mean((1, 2, 3)))
        return GlobalScores(score, score)

    @torch.no_grad()
    def score_blocks(self, images: Tensor, hazy: Tensor) -> BlockScores:
        """Compute the local scores of restorations. See `Coherence`."""
        check_sides(images, self.block_px)

        # Without winners there is nothing to rate.
        if not len(images):
            none = images.new_empty(0, *(side // self.block_px for side in images.shape[-2:]))
            return BlockScores(none, none)

        errors = expect_errors(images, self.restore_reference(hazy))
        score = rate_error(F.avg_pool2d(errors, self.block_px).squeeze(1))
        return BlockScores(score, score)

    def restore_reference(self, hazy: Tensor) -> Restoration:
        """Restore hazy images, `B 3 H W` in [0, 1], in full precision."""
        with torch.autocast(hazy.device.type, enabled=False):
            return restore(self.network, hazy.float())


def expect_errors(images: Tensor, reference: Restoration) -> Tensor:
    """Compute the squared error to expect of each pixel.

    `images` are restorations, `B 3 H W` in [0, 1], and `reference` those of the same hazy images, with transmissions.
    Returns `B 1 H W`.
    """
    assert reference.transmission is not None
    distance = (images.float() - reference.scene).square().mean(1, keepdim=True)
    hidden = 1 - reference.transmission
    return distance + VARIANCE_OF_HAZE * hidden.square()


def rate_error(squared_error: Tensor) -> Tensor:
    """Turn mean squared errors into scores in [0, 1], higher is better.

    The scores are linear in dB, between `WORST_DB` and `BEST_DB`.
    """
    ratio_db = -10 * squared_error.clamp_min(1e-9).log10()
    return ((ratio_db - WORST_DB) / (BEST_DB - WORST_DB)).clamp(0, 1)
