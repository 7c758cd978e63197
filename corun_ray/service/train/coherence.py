"""The scorers and losses of a job, timed on their device, and shared by all workers where the job says so."""

import time
from collections import deque
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch import device as Device

from corun_ray.config.jobs import ColabatorJob, TrainingJob
from corun_ray.config.training import CoherenceSection, ColabatorLossSection
from corun_ray.core.choices import MUSIQ_NAMES, QUALITY_NAMES, REFERENCE, REFERENCE_MODEL
from corun_ray.core.scoring.arithmetic import CannotCapture, Capture
from corun_ray.core.scoring.coherence import BlockScores, Coherence, GlobalScores
from corun_ray.core.scoring.daclip import DACLIP_FILE, DaClip, load_daclip
from corun_ray.core.scoring.quality import IqaScorer, load_quality, probe_scorer
from corun_ray.core.scoring.reference import ReferenceCoherence
from corun_ray.core.scoring.scorers import Scorer
from corun_ray.core.training.checkpoints import load_network
from corun_ray.core.training.losses import (
    VGG_FILE,
    FeatureExtractor,
    LaplacianFeatures,
    Losses,
    LossWeights,
    load_vgg19,
)
from corun_ray.core.weights import WeightsError, WeightsSource
from corun_ray.service.models.sources import SHIPPED_FOLDER
from corun_ray.service.weights.needed import open_weights

# --- Building scorers and losses ---


def build_coherence(section: CoherenceSection, source: WeightsSource, device: Device | str = "cpu") -> Coherence:
    """Build the two scorers of a job: clarity and quality.

    Raises `WeightsError`.
    """
    if section.clarity == REFERENCE:
        return ReferenceCoherence(load_reference().to(device), section.block_px, section.combine)

    clarity: str | Scorer = section.clarity
    if section.clarity == "daclip":
        file = source(DACLIP_FILE)
        network = load_daclip(file, section.degradations, section.chunk_images, section.antialias).to(device)
        network.precision = section.precision
        clarity = network

    quality: str | Scorer = section.quality
    if section.quality not in QUALITY_NAMES:
        metric = load_quality(section.quality, source, section.quality_range, section.chunk_images).to(device)
        if section.quality in MUSIQ_NAMES:
            metric.precision = section.precision
        quality = metric

    return Coherence(clarity, quality, section.block_px, section.combine)


def replay_scorers(coherence: Coherence, images: Tensor, capture: Capture) -> None:
    """Let DA-CLIP and MUSIQ be replayed as graphs from now on; try this on `images`, `B 3 H W` as in training.

    Raises `CannotCapture`.
    """
    for scorer in (coherence.clarity, coherence.quality):
        if isinstance(scorer, DaClip) or (isinstance(scorer, IqaScorer) and scorer.name in MUSIQ_NAMES):
            scorer.use_graphs(capture)

    # The first call of a shape runs, the second one is captured.
    try:
        for _ in range(2):
            coherence.score_images(images, images)
            coherence.score_blocks(images[:1], images[:1])
    except CannotCapture as error:
        raise CannotCapture(f"coherence.gpu: graphs: {error}") from None


@cache
def load_reference() -> nn.Module:
    """Load the network that makes the reference: the model that comes with the package, frozen, on the CPU."""
    network = load_network(SHIPPED_FOLDER / REFERENCE_MODEL).network
    return network.requires_grad_(False).eval()


def build_losses(
    job: TrainingJob, source: WeightsSource, coherence: Coherence | None, device: Device | str = "cpu"
) -> Losses:
    """Build the losses of a job.

    Raises `WeightsError`.
    """
    loss = job.loss

    # The features of the perceptual and the contrastive loss.
    features: FeatureExtractor | None = None
    if loss.perceptual == "vgg19":
        features = load_vgg19(source(VGG_FILE)).to(device)
    elif loss.perceptual == "laplacian":
        features = LaplacianFeatures()

    # The haze-density loss of Colabator: what the clarity scorer finds lacking.
    density_weight = 0.0
    if isinstance(loss, ColabatorLossSection) and coherence is not None:
        clarity, density_weight = coherence.clarity, loss.haze_density_weight

        def score_density(images: Tensor) -> Tensor:
            return 1 - clarity(images)

    weights = LossWeights(
        loss.pixel_weight,
        loss.scattering_weight,
        loss.perceptual_weight,
        loss.contrastive_weight,
        density_weight,
        loss.transmission,
    )
    return Losses(weights, features, score_density if density_weight else None)


def check_scoring(job: TrainingJob) -> None:
    """Try to build scorers and losses, and to rate images.

    The images have the sizes of training. So a mistake is found before any worker starts.

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


# --- Timing ---


class DeviceTimer:
    """A context manager that adds up the seconds spent within, without ever waiting for the device.

    CUDA kernels run later than they are called. So the device itself notes begin and end, as events in its stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._total_s = 0.0
        self._since_s = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        """Begin and end of intervals that the device has not been asked about yet, oldest first."""

    def __enter__(self) -> None:
        if self._on_cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._pending.append((begin, end))
            begin.record()
        else:
            self._since_s = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if self._on_cuda:
            _, end = self._pending[-1]
            end.record()
        else:
            self._total_s += time.perf_counter() - self._since_s

    def total_s(self) -> float:
        """Return the seconds of all intervals that the device has finished."""
        while self._pending and self._pending[0][1].query():
            begin, end = self._pending.popleft()
            self._total_s += begin.elapsed_time(end) / 1000  # Milliseconds.
        return self._total_s


class TimedCoherence(Coherence):
    """Scores as another coherence does, and measures how long scoring takes, waiting for other ranks included."""

    def __init__(self, plain: Coherence, device: torch.device) -> None:
        super().__init__(plain.clarity, plain.quality, plain.block_px, plain.combine)
        self.plain = plain
        self.timers = {"global": DeviceTimer(device), "blocks": DeviceTimer(device)}

    def score_images(self, images: Tensor, hazy: Tensor) -> GlobalScores:
        """Score whole images, timed. See `Coherence`."""
        with self.timers["global"]:
            return self.plain.score_images(images, hazy)

    def score_blocks(self, images: Tensor, hazy: Tensor) -> BlockScores:
        """Score the blocks of images, timed. See `Coherence`."""
        with self.timers["blocks"]:
            return self.plain.score_blocks(images, hazy)


# --- Sharing ---


class SharedCoherence(Coherence):
    """Rates as `plain` does, but the blocks of all ranks' winners together, the same number on every rank.

    Ranks wait for each other once a step. Among many ranks, one nearly always has a winner, and all the others would
    wait while its scorer rates an image's blocks. Shared, a step waits for the mean rating time, not for the longest.
    """

    def __init__(self, plain: Coherence) -> None:
        super().__init__(plain.clarity, plain.quality, plain.block_px, plain.combine)

    def rate_blocks(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Rate blocks `N 3 H W`.

        All ranks must call this equally often, also without blocks. See `Coherence`.
        """
        counts = _gather_counts(len(blocks), blocks.device)
        if not any(counts):
            return super().rate_blocks(blocks)

        # Hand blocks over, rate this rank's share, and send the scores back the same way.
        num_given, num_taken = plan_exchange(counts, dist.get_rank())
        share = _exchange(blocks, num_given, num_taken)
        scores = torch.stack(super().rate_blocks(share), 1)
        clarity, quality = _exchange(scores, num_taken, num_given).unbind(1)
        return clarity, quality


def plan_exchange(counts: Sequence[int], rank: int) -> tuple[list[int], list[int]]:
    """Return the numbers of blocks that `rank` gives to and takes from each rank.

    `counts` are the ranks' own blocks. After the exchange, the numbers of any two ranks differ by at most one. Blocks
    are numbered through all ranks and every rank takes one stretch of them, so their order is kept.
    """
    num_ranks, total = len(counts), sum(counts)

    # Rank r owns the blocks from owned[r] to owned[r + 1], and rates those from taken[r] to taken[r + 1].
    owned = [0, *accumulate(counts)]
    taken = [total * taker // num_ranks for taker in range(num_ranks + 1)]

    def count_common(owner: int, taker: int) -> int:
        begin, end = max(owned[owner], taken[taker]), min(owned[owner + 1], taken[taker + 1])
        return max(0, end - begin)

    num_given = [count_common(rank, taker) for taker in range(num_ranks)]
    num_taken = [count_common(owner, rank) for owner in range(num_ranks)]
    return num_given, num_taken


def _gather_counts(count: int, device: torch.device) -> list[int]:
    """Return the block counts of all ranks."""
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    dist.all_gather_single(counts, torch.tensor([count], device=device))
    found: list[int] = counts.tolist()
    return found


def _exchange(rows: Tensor, num_given: list[int], num_taken: list[int]) -> Tensor:
    """Give rows to the other ranks; return the rows taken, in order of ranks."""
    taken = rows.new_empty(sum(num_taken), *rows.shape[1:])
    dist.all_to_all_single(taken, rows.contiguous(), num_taken, num_given)
    return taken
