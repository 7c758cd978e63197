"""How long work on a device takes, measured without ever waiting for the device.

Winners' blocks rated by all workers together: each takes as many, whoever's candidates have won.

Workers wait for each other once a step. Among many, one nearly always has a winner, and would keep all the others
waiting for as long as a scorer takes for the blocks of an image. Shared, the step waits for the mean, not for the most.
"""

import time
from collections import deque
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch import device as Device

from corun_ray.config.jobs import ColabatorJob, TrainingJob
from corun_ray.config.training import CoherenceSection, ColabatorLossSection
from corun_ray.core.choices import QUALITY_NAMES
from corun_ray.core.scoring.coherence import BlockScores, Coherence, GlobalScores
from corun_ray.core.scoring.daclip import DACLIP_FILE, load_daclip
from corun_ray.core.scoring.quality import load_quality, probe_scorer
from corun_ray.core.scoring.scorers import Scorer
from corun_ray.core.training.losses import VGG_FILE, Losses, LossWeights, load_vgg19
from corun_ray.core.weights import WeightsError, WeightsSource
from corun_ray.service.weights.needed import open_weights


class DeviceTimer:
    """Adds up the seconds between entering and leaving it.

    On CUDA, kernels run later than they are called: the device notes both moments itself, in its own time.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._total_s = 0.0
        self._since_s = 0.0
        self._under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __enter__(self) -> None:
        if self._on_cuda:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._under_way.append(pair)
            pair[0].record()
        else:
            self._since_s = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if self._on_cuda:
            self._under_way[-1][1].record()
        else:
            self._total_s += time.perf_counter() - self._since_s

    def total_s(self) -> float:
        """As far as the device has come."""
        while self._under_way and self._under_way[0][1].query():
            begun, ended = self._under_way.popleft()
            self._total_s += begun.elapsed_time(ended) / 1000
        return self._total_s


class TimedCoherence(Coherence):
    """Scores as another does, and says how long that took, waiting for others included."""

    def __init__(self, plain: Coherence, device: torch.device) -> None:
        super().__init__(plain.clarity, plain.quality, plain.block_px, plain.combine)
        self.plain = plain
        self.watches = {"global": DeviceTimer(device), "blocks": DeviceTimer(device)}

    def score_images(self, images: Tensor) -> GlobalScores:
        """See `Coherence`."""
        with self.watches["global"]:
            return self.plain.score_images(images)

    def score_blocks(self, images: Tensor) -> BlockScores:
        """See `Coherence`."""
        with self.watches["blocks"]:
            return self.plain.score_blocks(images)


class SharedCoherence(Coherence):
    """Rates as `plain` does, but blocks together with all other ranks, each of which must call it as often."""

    def __init__(self, plain: Coherence) -> None:
        super().__init__(plain.clarity, plain.quality, plain.block_px, plain.combine)

    def rate_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """See `Coherence`; none of one's own is no reason not to call it."""
        counts = _counts_of_all_ranks(len(blocks), blocks.device)
        if not any(counts):
            return super().rate_blocks(blocks)
        gives, takes = plan_exchange(counts, dist.get_rank())
        scores = torch.stack(super().rate_blocks(_exchanged(blocks, gives, takes)), 1)
        clarity, quality = _exchanged(scores, takes, gives).unbind(1)
        return clarity, quality


def plan_exchange(counts: Sequence[int], rank: int) -> tuple[list[int], list[int]]:
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


def build_coherence(section: CoherenceSection, source: WeightsSource, device: Device | str = "cpu") -> Coherence:
    """The job's two scorers; raises `WeightsError`."""
    clarity: str | Scorer = section.clarity
    if section.clarity == "daclip":
        clarity = load_daclip(source(DACLIP_FILE), section.degradations, section.chunk_images).to(device)
    quality: str | Scorer = section.quality
    if section.quality not in QUALITY_NAMES:
        quality = load_quality(section.quality, source, section.quality_range, section.chunk_images).to(device)
    return Coherence(clarity, quality, section.block_px, section.combine)


def build_losses(
    job: TrainingJob, source: WeightsSource, coherence: Coherence | None, device: Device | str = "cpu"
) -> Losses:
    """The job's losses; raises `WeightsError`."""
    loss = job.loss
    features = load_vgg19(source(VGG_FILE)).to(device) if loss.perceptual == "vgg19" else None
    density_weight = 0.0
    if isinstance(loss, ColabatorLossSection) and coherence is not None:
        clarity, density_weight = coherence.clarity, loss.haze_density_weight

        def density(images: Tensor) -> Tensor:
            return 1 - clarity(images)

    terms = (loss.pixel_weight, loss.scattering_weight, loss.perceptual_weight, loss.contrastive_weight)
    return Losses(LossWeights(*terms, density_weight), features, density if density_weight else None)


def check_scoring(job: TrainingJob) -> None:
    """Builds everything once and tries the scorers on the sizes that they will see, so that no worker starts in vain.

    Raises `WeightsError`, also for a scorer that cannot rate such images.
    """
    coherence = None
    if isinstance(job, ColabatorJob):
        coherence = build_coherence(job.coherence, open_weights(job.coherence.weights))
        if job.coherence.quality not in QUALITY_NAMES:
            try:
                probe_scorer(coherence.quality, job.coherence.block_px, job.data.patch_px)
            except ValueError as error:
                raise WeightsError(f"coherence.quality: {error}") from None
    build_losses(job, open_weights(job.loss.weights), coherence)
