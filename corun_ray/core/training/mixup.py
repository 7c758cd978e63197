"""Mixup of synthetic or paired batches (Zhang et al., ICLR 2018)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from corun_ray.core.training.steps import SyntheticBatch


def mixup(batch: SyntheticBatch, alpha: float, generator_seed: Sequence[int]) -> SyntheticBatch:
    """Every image and its truth, mixed alike with another pair of the batch (or, by chance, with themselves).

    Each image draws its own share of itself from Beta(`alpha`, `alpha`), `alpha` above 0. `generator_seed` is numbers
    of 0 and above (the run's seed, the step, the rank); equal ones mix equally.
    """
    generator = np.random.default_rng(generator_seed)
    count = len(batch.hazy)
    share = torch.from_numpy(generator.beta(alpha, alpha, count).astype(np.float32)).view(-1, 1, 1, 1)
    partner = torch.from_numpy(generator.permutation(count))
    share, partner = share.to(batch.hazy.device), partner.to(batch.hazy.device)

    def mix(images: Tensor) -> Tensor:
        return share * images + (1 - share) * images[partner]

    return SyntheticBatch(mix(batch.hazy), mix(batch.clear))
