"""Blocks rated by several processes together, by gloo: the same scores as alone, and as much work for each."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from corun_ray.core.scoring.coherence import BlockScores, Coherence
from corun_ray.service.train.coherence import SharedCoherence, plan_exchange
from corun_ray.service.train.worker import Worker
from tests.service.jobs import small_job

WINNERS = [(2, 0, 1), (0, 0, 0), (0, 5, 0), (1, 0, 0)]
"""Of each of three ranks, step by step; an image has six blocks, so that they do not always share evenly."""


@pytest.mark.parametrize("counts", [[0, 0], [7], [81, 0, 0, 0], [0, 1, 0, 0], [5, 3, 8], [0, 162, 81, 0, 81]])
def test_each_rank_takes_as_many_but_for_one_and_in_order(counts: list[int]) -> None:
    gives, takes = zip(*(plan_exchange(counts, rank) for rank in range(len(counts))), strict=True)
    assert [sum(row) for row in gives] == counts
    assert [list(column) for column in zip(*gives, strict=True)] == list(takes)
    work = [sum(taken) for taken in takes]
    assert sum(work) == sum(counts) and max(work) - min(work) <= 1
    pairs = [(owner, taker) for owner, row in enumerate(gives) for taker, given in enumerate(row) if given]
    assert all(before[1] <= after[1] for before, after in pairwise(pairs)), "stretches follow each other"


def images_of(rank: int, step: int) -> Tensor:
    """The winners of a rank at a step, other ones each time."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.rand(WINNERS[step][rank], 3, 64, 96, generator=generator)


class Counting(Coherence):
    """Notes how many blocks its clarity scorer was given."""

    def __init__(self) -> None:
        super().__init__(block_px=32)
        plain, self.rated = self.clarity, 0

        def counted(images: Tensor) -> Tensor:
            self.rated += len(images)
            return plain(images)

        self.clarity = counted


def rate(rank: int, folder: Path) -> None:
    """Rates all steps' winners in one process and keeps the scores that it got."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    found, rated = {}, []
    for step in range(len(WINNERS)):
        plain = Counting()
        scores: BlockScores = SharedCoherence(plain).score_blocks(images := images_of(rank, step), images)
        found |= {f"{step}_clarity": scores.clarity.numpy(), f"{step}_quality": scores.quality.numpy()}
        rated.append(plain.rated)
    np.savez(folder / f"{rank}.npz", rated=rated, **found)
    dist.destroy_process_group()


def test_scores_are_those_of_rating_alone_and_the_work_is_shared(tmp_path: Path) -> None:
    mp.spawn(rate, (tmp_path,), nprocs=3)
    ranks = [np.load(tmp_path / f"{rank}.npz") for rank in range(3)]
    assert np.array([rank["rated"] for rank in ranks]).T.tolist() == [[6, 6, 6], [0, 0, 0], [10, 10, 10], [2, 2, 2]]
    for step in range(len(WINNERS)):
        for rank, found in enumerate(ranks):
            alone = Coherence(block_px=32).score_blocks(images := images_of(rank, step), images)
            assert found[f"{step}_clarity"].shape == (WINNERS[step][rank], 2, 3)
            np.testing.assert_allclose(found[f"{step}_clarity"], alone.clarity, rtol=0, atol=1e-6)
            np.testing.assert_allclose(found[f"{step}_quality"], alone.quality, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("share_blocks", "workers", "is_shared"), [(True, 2, True), (True, 1, False), (False, 2, False)]
)
def test_a_worker_shares_where_the_job_says_so_and_there_are_others(
    dataset: Path, tmp_path: Path, share_blocks: bool, workers: int, is_shared: bool
) -> None:
    job = small_job("colabator", dataset, tmp_path, coherence={"share_blocks": share_blocks})
    worker = SimpleNamespace(job=job, num_workers=workers, device=torch.device("cpu"))
    coherence = Worker._build_coherence(worker)  # type: ignore[arg-type]  # it looks at no more of a worker
    assert coherence is not None and isinstance(coherence.plain, SharedCoherence) == is_shared
