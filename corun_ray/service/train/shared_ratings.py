"""Winners' blocks rated by all workers together: each takes as many, whoever's candidates have won.

Workers wait for each other once a step. Among many, one nearly always has a winner, and would keep all the others
waiting for as long as a scorer takes for the blocks of an image. Shared, the step waits for the mean, not for the most.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from corun_ray.core.scoring.coherence import Coherence


class SharedCoherence(Coherence):
    """Rates as `plain` does, but blocks together with all other ranks, each of which must call it as often."""

    def __init__(self, plain: Coherence) -> None:
        super().__init__(plain.clarity, plain.quality, plain.block_px, plain.combine)

    def rate_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """See `Coherence`; none of one's own is no reason not to call it."""
        counts = _counts_of_all_ranks(len(blocks), blocks.device)
        if not any(counts):
            return super().rate_blocks(blocks)
        gives, takes = shares(counts, dist.get_rank())
        scores = torch.stack(super().rate_blocks(_exchanged(blocks, gives, takes)), 1)
        clarity, quality = _exchanged(scores, takes, gives).unbind(1)
        return clarity, quality


def shares(counts: Sequence[int], rank: int) -> tuple[list[int], list[int]]:
    """How many blocks `rank` gives to each rank, and takes of each, for all to rate as many but for one.

    `counts` are the ranks' own. Blocks are numbered through all ranks, and every rank takes a stretch of them: so all
    comes back in order.
    """
    ranks, total = len(counts), sum(counts)
    owned = [0, *accumulate(counts)]
    taken = [total * taker // ranks for taker in range(ranks + 1)]

    def common(owner: int, taker: int) -> int:
        begin, end = max(owned[owner], taken[taker]), min(owned[owner + 1], taken[taker + 1])
        return max(0, end - begin)

    return [common(rank, taker) for taker in range(ranks)], [common(owner, rank) for owner in range(ranks)]


def _counts_of_all_ranks(count: int, device: torch.device) -> list[int]:
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    dist.all_gather_single(counts, torch.tensor([count], device=device))
    found: list[int] = counts.tolist()
    return found


def _exchanged(rows: Tensor, gives: list[int], takes: list[int]) -> Tensor:
    taken = rows.new_empty(sum(takes), *rows.shape[1:])
    dist.all_to_all_single(taken, rows.contiguous(), takes, gives)
    return taken
