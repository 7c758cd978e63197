"""Rate the restorations of one scene: PSNR against the truth, scores, and the choice of a label pool."""

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from restorations import Image
from tried_scorers import SCORERS

from corun_ray.core.scoring.coherence import Coherence
from corun_ray.core.scoring.reference import ReferenceCoherence, expect_errors, rate_error
from corun_ray.core.scoring.scorers import CLARITY_SCORERS, QUALITY_SCORERS
from corun_ray.service.train.coherence import load_reference

Floats = NDArray[np.float64]
Pair = tuple[str, str]
REFERENCE = ReferenceCoherence(load_reference())


@dataclass(frozen=True)
class Case:
    """`N` rated restorations of one scene."""

    size_px: int
    names: list[str]
    """Empty for the restorations of a network."""
    psnr: Floats
    """dB, `N`."""
    scores: dict[str, Floats]
    """By scorer, `N` each."""

    def accepted(self, pair: Pair) -> NDArray[np.bool_]:
        """Return `N N`: whether a pool with the row's restoration accepts the column's."""
        clarity, quality = (self.scores[name] for name in pair)
        return (clarity[None] >= clarity[:, None]) & (quality[None] >= quality[:, None])

    def precision_and_recall(self, pair: Pair) -> tuple[float, float]:
        """Compute precision and recall.

        Precision is the share of accepted offers that raise PSNR. Recall is the share of PSNR-raising offers that are
        accepted.
        """
        better = self.psnr[None] > self.psnr[:, None]
        accepted = self.accepted(pair) & ~np.eye(len(self.psnr), dtype=bool)
        right = (accepted & better).sum()
        return right / max(accepted.sum(), 1), right / better.sum()

    def pool_gain(self, pair: Pair, sequences: NDArray[np.int64]) -> float:
        """Compute the pool's gain over the mean offer, in dB.

        Each row of `sequences` holds the offers to one pool, as indices of restorations. The gain is the PSNR of the
        last label.
        """
        # All pools at once: the label of each after each offer.
        accepted = self.accepted(pair)
        held = sequences[:, 0]
        for offer in sequences[:, 1:].T:
            held = np.where(accepted[held, offer], offer, held)
        return float(self.psnr[held].mean() - self.psnr[sequences].mean())

    def best_gain(self, sequences: NDArray[np.int64]) -> float:
        """Compute the gain of a choice by PSNR itself, in dB."""
        return float(self.psnr[sequences].max(1).mean() - self.psnr[sequences].mean())

    def rank_correlation(self, scorer: str) -> float:
        """Compute the rank correlation of a score with PSNR."""
        return spearman(self.scores[scorer], self.psnr)


def rate(names: list[str], images: Image, truth: Image, hazy: Image) -> Case:
    """Rate restorations `N H W 3` of a hazy image `H W 3`, whose truth is known."""
    error = ((images - truth) ** 2).mean((1, 2, 3))

    # Small batches stay in the processor's cache.
    batches = to_tensor(images).split(8)
    scores = {
        name: torch.cat([scorer(batch) for batch in batches]).double().numpy() for name, scorer in SCORERS.items()
    }

    # The reference sees the hazy image.
    reference = REFERENCE.restore_reference(to_tensor(hazy[None]))
    expected = torch.cat([expect_errors(batch, reference).mean((1, 2, 3)) for batch in batches])
    scores["reference"] = rate_error(expected).double().numpy()

    return Case(truth.shape[0], names, -10 * np.log10(error + 1e-10), scores)


def trust_agreement(images: Image, truth: Image, hazy: Image) -> dict[str, float]:
    """Compute the rank correlation of trust and PSNR over an image's 32 px blocks.

    Returns the mean over the image's restorations for each pair of scorers.
    """
    # The mean squared error of each block.
    side = truth.shape[0] // 32
    error = ((images - truth) ** 2).mean(-1).reshape(len(images), side, 32, side, 32).mean((2, 4))

    # Every pair of scorers without weights.
    batch = to_tensor(images)
    ratings = {}
    for pair in product(CLARITY_SCORERS, QUALITY_SCORERS):
        blocks = Coherence(*pair, block_px=32).score_blocks(batch, batch)
        ratings[" + ".join(pair)] = blocks.clarity + blocks.quality

    # The reference.
    reference = REFERENCE.restore_reference(to_tensor(hazy[None]))
    ratings["reference"] = rate_error(F.avg_pool2d(expect_errors(batch, reference), 32))

    agreement = {}
    for name, trust in ratings.items():
        found = [spearman(t.numpy().ravel(), -e.ravel()) for t, e in zip(trust, error, strict=True)]
        agreement[name] = float(np.mean(found))
    return agreement


def spearman(first: NDArray, second: NDArray) -> float:
    """Compute the rank correlation, with averaged ties; 0 if one side is constant."""
    first, second = average_ranks(first), average_ranks(second)
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def average_ranks(values: NDArray) -> Floats:
    """Return the rank of each value; equal values have their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]


def to_tensor(images: Image) -> torch.Tensor:
    """Convert images from `N H W 3` to `N 3 H W`."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
