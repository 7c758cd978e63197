"""One pre-training step and one Colabator step: the forward half, from a batch to a loss.

Source: Fang et al., NeurIPS 2024, arXiv 2406.07966, sections 3.2 and 3.3. What follows a loss (backward,
optimizer, EMA) is the same for both and lives in `state`.


Mixup of synthetic or paired batches (Zhang et al., ICLR 2018)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from corun_ray.core.choices import Encoding
from corun_ray.core.networks.corun import Restoration, as_restoration
from corun_ray.core.scoring.coherence import BlockScores, Coherence
from corun_ray.core.timing import span
from corun_ray.core.training.labels import Label, LabelPool, Scores, decode, encode, supersedes
from corun_ray.core.training.losses import Losses


class SyntheticBatch(NamedTuple):
    """Synthetic pairs, B 3 H W each, RGB in [0, 1]."""

    hazy: Tensor
    clear: Tensor


class RealBatch(NamedTuple):
    """Real hazy images without a truth."""

    weak: Tensor
    """The teacher's view, B 3 H W in [0, 1]."""
    strong: Tensor
    """The student's view of the same images, B 3 H W in [0, 1]."""
    keys: Sequence[str]
    """B names by which the pool knows the images."""


class PseudoLabels(NamedTuple):
    """What the student learns from on real haze, and how it came to be."""

    scene: Tensor
    """J*, B 3 H W in [0, 1]."""
    trust: Tensor
    """w*, B 1 H W in [0, 1]."""
    from_teacher: list[bool]
    """Per image: the teacher's new candidate (else the pool's stored label)."""
    block_ratings: int
    """Blocks rated in this step."""
    block_ratings_saved: int
    """Blocks of losing candidates, which rating before deciding, as published, would have rated too."""


@dataclass(frozen=True)
class StepOutput:
    """A step's losses (their sum is minimised) and what else is worth logging."""

    losses: dict[str, Tensor]
    labels: PseudoLabels | None = None


def run_pretraining_step(student: nn.Module, batch: SyntheticBatch, losses: Losses) -> StepOutput:
    """Supervised training on synthetic pairs."""
    with span("student"):
        restoration = as_restoration(student(batch.hazy))
    with span("losses"):
        return StepOutput(losses.compute_pretraining(restoration, batch.clear, batch.hazy))


@dataclass(frozen=True)
class Colabator:
    """The collaborator around a student: teacher, coherence, label pool and losses.

    Student and teacher return a scene, or a pair of a scene and a transmission (see `networks`).
    """

    teacher: nn.Module
    coherence: Coherence
    pool: LabelPool
    losses: Losses
    encoding: Encoding = "uint8"

    def step(self, student: nn.Module, synthetic: SyntheticBatch, real: RealBatch, step: int) -> StepOutput:
        """Student on the synthetic pairs and, by the best labels known, on the real images."""
        labels = self.choose_labels(real, step)
        # Both halves go through in one batch: the same result, and one forward pass for DDP to follow.
        with span("student"):
            restoration = as_restoration(student(torch.cat([synthetic.hazy, real.strong])))
        with span("losses"):
            on_synthetic, on_real = _split(restoration, len(synthetic.hazy))
            losses = self.losses.compute_colabator(
                on_synthetic, synthetic.clear, on_real, real.strong, labels.scene, labels.trust
            )
        return StepOutput(losses, labels)

    @torch.no_grad()
    def choose_labels(self, real: RealBatch, step: int) -> PseudoLabels:
        """The teacher's candidates against the pool's labels; winners are offered to the pool.

        Only a winner's blocks are rated: a losing candidate's trust map would be thrown away.
        """
        with span("pool"):
            pending = self.pool.prefetch(real.keys)
        with span("teacher"):
            scene, transmission = as_restoration(self.teacher(real.weak))
            scene = scene.float().clamp(0, 1)
        with span("global scores"):
            rated = self.coherence.score_images(scene)
            # Both in one copy: the device is waited for once in a step.
            scores = [Scores(*pair) for pair in torch.stack([rated.clarity, rated.quality], 1).tolist()]
        if not all(math.isfinite(score) for pair in scores for score in pair):
            # Such a label would win the pool's first comparison and lose none after it.
            raise FloatingPointError(f"step {step}: the teacher's scores are not finite; training has diverged")
        with span("pool"):
            stored = pending.result()
        wins = [supersedes(new, old.scores if old else None) for new, old in zip(scores, stored, strict=True)]

        winners = [i for i, win in enumerate(wins) if win]
        candidates = Restoration(scene, transmission)
        # Also without winners: workers may rate each other's.
        fresh = self._make_labels(winners, real.keys, scores, candidates, step)
        if fresh:
            with span("pool"):
                self.pool.offer(list(fresh.values()))
        chosen = [fresh.get(i, old) for i, old in enumerate(stored)]
        return self._as_tensors([label for label in chosen if label is not None], scene, wins)

    def _make_labels(
        self,
        winners: list[int],
        keys: Sequence[str],
        scores: list[Scores],
        candidates: Restoration,
        step: int,
    ) -> dict[int, Label]:
        scene, transmission = candidates
        with span("local scores"):
            blocks = self.coherence.score_blocks(scene[winners])
        return {
            i: Label(
                key=keys[i],
                scores=scores[i],
                step=step,
                scene=encode(scene[i].cpu().numpy(), self.encoding),
                transmission=None
                if transmission is None
                else encode(transmission[i].float().cpu().numpy(), self.encoding),
                block_clarity=blocks.clarity[row].float().cpu().numpy(),
                block_quality=blocks.quality[row].float().cpu().numpy(),
            )
            for row, i in enumerate(winners)
        }

    def _as_tensors(self, labels: list[Label], like: Tensor, from_teacher: list[bool]) -> PseudoLabels:
        scene = torch.from_numpy(np.stack([decode(label.scene) for label in labels]))
        clarity = torch.from_numpy(np.stack([label.block_clarity for label in labels]))
        quality = torch.from_numpy(np.stack([label.block_quality for label in labels]))
        trust = self.coherence.build_trust_map(BlockScores(clarity, quality), *like.shape[-2:])
        num_blocks, num_fresh = clarity[0].numel(), sum(from_teacher)
        return PseudoLabels(
            scene.to(like.device),
            trust.to(like.device),
            from_teacher,
            block_ratings=num_fresh * num_blocks,
            block_ratings_saved=(len(from_teacher) - num_fresh) * num_blocks,
        )


def _split(restoration: Restoration, count: int) -> tuple[Restoration, Restoration]:
    """The first `count` images, and the others."""
    scene, transmission = restoration
    if transmission is None:
        return Restoration(scene[:count], None), Restoration(scene[count:], None)
    return Restoration(scene[:count], transmission[:count]), Restoration(scene[count:], transmission[count:])


def apply_mixup(batch: SyntheticBatch, alpha: float, generator_seed: Sequence[int]) -> SyntheticBatch:
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
