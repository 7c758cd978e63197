"""Coherence of pseudo labels: the clarity and quality of an image, as a whole and block by block.

Source: Colabator, Fang et al., NeurIPS 2024, arXiv 2406.07966, section 3.2. Global scores decide which pseudo label an
image keeps. Local scores decide how far each region of that label is trusted.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from corun_ray.core.choices import Combine
from corun_ray.core.scoring.scorers import CLARITY_SCORERS, DEFAULT_CLARITY, DEFAULT_QUALITY, QUALITY_SCORERS, Scorer


@dataclass(frozen=True)
class GlobalScores:
    """Scores of whole images, `B` each, float32 in [0, 1], higher is better."""

    clarity: Tensor
    quality: Tensor


@dataclass(frozen=True)
class BlockScores:
    """Scores of the blocks of images, `B h w` each, float32 in [0, 1], higher is better."""

    clarity: Tensor
    quality: Tensor


class Coherence:
    """The scores of images by one clarity and one quality scorer, and the trust maps made of block scores."""

    def __init__(
        self,
        clarity: str | Scorer = DEFAULT_CLARITY,
        quality: str | Scorer = DEFAULT_QUALITY,
        block_px: int = 32,
        combine: Combine = "addition",
    ) -> None:
        """Choose the scorers.

        `clarity` and `quality` are names of `CLARITY_SCORERS` and `QUALITY_SCORERS`, or scorers of one's own.
        `block_px` is the side of the square blocks. Raises `ValueError` for an unknown name or way of combining.
        """
        if combine not in ("addition", "multiplication"):
            raise ValueError(f"combine: expected addition or multiplication, got {combine!r}")
        self.clarity = _find_scorer(clarity, CLARITY_SCORERS, "clarity")
        self.quality = _find_scorer(quality, QUALITY_SCORERS, "quality")
        self.block_px = block_px
        self.combine = combine

    @torch.no_grad()
    def score_images(self, images: Tensor, hazy: Tensor) -> GlobalScores:
        """Score whole restorations.

        `images` and the hazy images that they restore are `B 3 H W` RGB in [0, 1]. These scorers do not look at the
        hazy ones.
        """
        return GlobalScores(self.clarity(images), self.quality(images))

    @torch.no_grad()
    def score_blocks(self, images: Tensor, hazy: Tensor) -> BlockScores:
        """Compute the local scores of restorations; see `score_images`.

        Every square of `block_px` is rated as an image of its own. Raises `ValueError` where a side is not a multiple
        of `block_px`.
        """
        batch, channels, height, width = images.shape
        side = self.block_px
        check_sides(images, side)

        # Cut the images into blocks: B 3 H W -> B h w 3 side side -> (B h w) 3 side side.
        rows, columns = height // side, width // side
        grid = images.reshape(batch, channels, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
        blocks = grid.reshape(batch * rows * columns, channels, side, side)

        # Rate all blocks together, and put the scores back into the grid.
        clarity, quality = self.rate_blocks(blocks)
        shape = (batch, rows, columns)
        return BlockScores(clarity.reshape(shape), quality.reshape(shape))

    def rate_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Rate the clarity and quality of blocks.

        The blocks are `N 3 h w` in [0, 1], and each result has N scores. N may be 0.
        """
        if not len(blocks):
            return blocks.new_empty(0), blocks.new_empty(0)
        return self.clarity(blocks), self.quality(blocks)

    @torch.no_grad()
    def build_trust_map(self, blocks: BlockScores, height_px: int, width_px: int) -> Tensor:
        """Build the weights w of a label from its block scores.

        Returns `B 1 H W` in [0, 1], higher where the blocks are clearer and better.
        """
        # One weight for each block: the average of both scores, or their product.
        if self.combine == "addition":
            trust = (blocks.clarity + blocks.quality) / 2
        else:
            trust = blocks.clarity * blocks.quality

        # One weight for each pixel: bilinear interpolation between the centres of the blocks.
        size = (height_px, width_px)
        return F.interpolate(trust.unsqueeze(1), size, mode="bilinear", align_corners=False)


def check_sides(images: Tensor, block_px: int) -> None:
    """Raise `ValueError` where images `B 3 H W` cannot be cut into blocks."""
    height, width = images.shape[-2:]
    if height % block_px or width % block_px:
        raise ValueError(f"block scores: expected sides that are multiples of {block_px} px, got {height} x {width} px")


def _find_scorer(scorer: str | Scorer, registry: dict[str, Scorer], role: str) -> Scorer:
    """Find a scorer by its name.

    A scorer of one's own is returned as it is.
    """
    if not isinstance(scorer, str):
        return scorer
    if scorer not in registry:
        raise ValueError(f"{role}: expected one of {', '.join(registry)}, got {scorer!r}")
    return registry[scorer]
