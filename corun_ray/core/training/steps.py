"""One pre-training step and one Colabator step: the forward half, from a batch to its losses.

Source: Fang et al., NeurIPS 2024, arXiv 2406.07966, sections 3.2 and 3.3. The rest of a step (backward, optimizer, EMA)
is the same for both, and is in `state`.
"""

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
from corun_ray.core.training.divergence import Diverged, refuse_bad_score
from corun_ray.core.training.labels import Label, LabelPool, PendingLabels, Scores, decode, encode, supersedes
from corun_ray.core.training.losses import Losses
from corun_ray.core.training.streams import SideStream


class SyntheticBatch(NamedTuple):
    """Synthetic pairs, `B 3 H W` each, RGB in [0, 1]."""

    hazy: Tensor
    clear: Tensor
    transmission: Tensor | None = None
    """The true transmission of the haze, `B 1 H W` in [0, 1]; None where it is unknown or not learnt from."""


class RealBatch(NamedTuple):
    """Real hazy images without a known truth."""

    weak: Tensor
    """The teacher's view, `B 3 H W` in [0, 1]."""
    strong: Tensor
    """The student's view of the same images, `B 3 H W` in [0, 1]."""
    keys: Sequence[str]
    """The B keys of the images in the label pool."""


class PseudoLabels(NamedTuple):
    """The best labels known of a real batch, and how they were chosen."""

    scene: Tensor
    """J*, `B 3 H W` in [0, 1]."""
    trust: Tensor
    """w*, `B 1 H W` in [0, 1]."""
    from_teacher: list[bool]
    """For each image, whether the label is the teacher's new candidate (else the pool's stored label)."""
    block_ratings: int
    """The number of blocks rated in this step."""
    block_ratings_saved: int
    """The number of blocks of losing candidates. The published code rates them too, before it decides."""


class Candidates(NamedTuple):
    """The teacher's restorations of a real batch and their global scores, which a GPU may still be computing."""

    restoration: Restoration
    """J clamped to [0, 1], and T."""
    rated: Tensor
    """`B 3`: clarity, quality, and 1 where the restoration is finite, else 0."""
    stored: PendingLabels
    """The pool's labels of the same images."""


@dataclass(frozen=True)
class StepOutput:
    """The losses of a step, whose sum is minimised, and its pseudo labels for the log."""

    losses: dict[str, Tensor]
    labels: PseudoLabels | None = None


def run_pretraining_step(student: nn.Module, batch: SyntheticBatch, losses: Losses) -> StepOutput:
    """Restore synthetic hazy images, and compare them with their clear images."""
    with span("student"):
        restoration = as_restoration(student(batch.hazy))
    with span("losses"):
        return StepOutput(losses.compute_pretraining(restoration, batch.clear, batch.hazy, batch.transmission))


@dataclass(frozen=True)
class Colabator:
    """Colabator, the collaborator around a student: teacher, coherence, label pool and losses (section 3.2).

    Student and teacher return a scene, or a pair of a scene and a transmission (see `networks.build`).
    """

    teacher: nn.Module
    coherence: Coherence
    pool: LabelPool
    losses: Losses
    encoding: Encoding = "uint8"
    side: SideStream | None = None
    """The stream of teacher and scorers, which then work beside the student; None: before the student."""

    def step(self, student: nn.Module, synthetic: SyntheticBatch, real: RealBatch, step: int) -> StepOutput:
        """Run one Colabator step.

        The student learns from synthetic pairs and from pseudo labels.
        """
        # The best label known of each real image: the teacher's candidate, or the label in the pool. Only the losses
        # need it, so the student can restore the images at the same time.
        if self.side is None:
            labels = self.choose_labels(real, step)
            restoration = self._restore(student, synthetic, real)
        else:
            labels, restoration = self._restore_beside(self.side, student, synthetic, real, step)

        # The synthetic half is compared with the truth, the real half with its labels as far as they are trusted.
        with span("losses"):
            on_synthetic, on_real = _split(restoration, len(synthetic.hazy))
            losses = self.losses.compute_colabator(
                on_synthetic,
                synthetic.clear,
                on_real,
                real.strong,
                labels.scene,
                labels.trust,
                synthetic.transmission,
            )
        return StepOutput(losses, labels)

    def _restore(self, student: nn.Module, synthetic: SyntheticBatch, real: RealBatch) -> Restoration:
        """Restore the synthetic images and the strong views of the real ones.

        Both halves form one batch: the result is the same, and DDP follows one forward pass.
        """
        with span("student"):
            return as_restoration(student(torch.cat([synthetic.hazy, real.strong])))

    def _restore_beside(
        self, side: SideStream, student: nn.Module, synthetic: SyntheticBatch, real: RealBatch, step: int
    ) -> tuple[PseudoLabels, Restoration]:
        """Choose labels in a side stream, while the student restores in the main one.

        Teacher and student run, and so draw random numbers, in the same order as without a side stream.
        """
        # The teacher needs the weak views, and its own weights as the last step has left them.
        side.follow()
        side.borrow([real.weak])
        with side.use():
            candidates = self._make_candidates(real)

        # All this is only submitted. The host reads the scores while the student's kernels wait or run.
        restoration = self._restore(student, synthetic, real)
        with side.use():
            labels = self._choose_labels(candidates, real, step)

        # The losses need the labels.
        side.join(side.mark())
        side.lend([labels.scene, labels.trust])
        return labels, restoration

    def choose_labels(self, real: RealBatch, step: int) -> PseudoLabels:
        """Choose the best label of each real image (section 3.2).

        This is the teacher's candidate or the pool's label. Winning candidates are offered to the pool. Only their
        blocks are rated: the trust map of a losing candidate would be thrown away.

        Raises `Diverged` for a candidate that is not finite, and `ScoreNotFinite`.
        """
        return self._choose_labels(self._make_candidates(real), real, step)

    @torch.no_grad()
    def _make_candidates(self, real: RealBatch) -> Candidates:
        """Restore the weak views and score the results, without waiting for the device."""
        # Start reading the stored labels; the pool works while the teacher does.
        with span("pool"):
            stored = self.pool.prefetch(real.keys)

        # The candidates: J clamped to [0, 1], and T.
        with span("teacher"):
            scene, transmission = as_restoration(self.teacher(real.weak))
            is_finite = scene.isfinite().flatten(1).all(1)
            if transmission is not None:
                is_finite &= transmission.isfinite().flatten(1).all(1)
            scene = scene.float().clamp(0, 1)

        # Global coherence.
        with span("global scores"):
            scores = self.coherence.score_images(scene, real.weak)
            rated = torch.stack([scores.clarity, scores.quality, is_finite.to(scores.clarity.dtype)], 1)
        return Candidates(Restoration(scene, transmission), rated, stored)

    @torch.no_grad()
    def _choose_labels(self, candidates: Candidates, real: RealBatch, step: int) -> PseudoLabels:
        """Choose between candidates and stored labels; see `choose_labels`."""
        scores = self._read_scores(candidates, real, step)

        # A candidate wins if the image has no label yet, or if neither score is lower than the stored label's.
        with span("pool"):
            stored = candidates.stored.result()
        wins = []
        for candidate, old in zip(scores, stored, strict=True):
            wins.append(supersedes(candidate, old.scores if old else None))
        winners = [image for image, won in enumerate(wins) if won]

        # Rate the winners' blocks and make labels of them. This runs even without winners, since workers may rate each
        # other's blocks.
        fresh = self._make_labels(winners, real, scores, candidates.restoration, step)
        if fresh:
            with span("pool"):
                self.pool.offer(list(fresh.values()))

        # Each image learns from its new label, or else from the stored one.
        chosen = []
        for image, old in enumerate(stored):
            label = fresh.get(image, old)
            if label is not None:
                chosen.append(label)
        return self._to_tensors(chosen, candidates.restoration.scene, wins)

    def _read_scores(self, candidates: Candidates, real: RealBatch, step: int) -> list[Scores]:
        """Read the global scores of the candidates.

        Raises `Diverged` for a candidate that is not finite, and `ScoreNotFinite`.
        """
        # All numbers leave the device in one copy, so that a step waits for the device once.
        with span("global scores"):
            rows = candidates.rated.tolist()

        # Stop at NaN and infinity: such a label would win the pool's first comparison and lose none after it.
        scores = []
        for key, (clarity, quality, finite) in zip(real.keys, rows, strict=True):
            if not finite:
                raise Diverged(f"step {step}: the teacher's restoration of {key} has nan or inf, not finite")
            refuse_bad_score(clarity, "clarity", key, step)
            refuse_bad_score(quality, "quality", key, step)
            scores.append(Scores(clarity, quality))
        return scores

    def _make_labels(
        self,
        winners: list[int],
        real: RealBatch,
        scores: list[Scores],
        restoration: Restoration,
        step: int,
    ) -> dict[int, Label]:
        """Make labels of the winning candidates.

        The keys of the result are the images' places in the batch. Raises `ScoreNotFinite`.
        """
        # Local coherence, which the trust map follows from.
        scene, transmission = restoration
        with span("local scores"):
            blocks = self.coherence.score_blocks(scene[winners], real.weak[winners])

        # Encode the images for storage, on the CPU.
        labels = {}
        for row, image in enumerate(winners):
            block_clarity, block_quality = blocks.clarity[row].float().cpu(), blocks.quality[row].float().cpu()
            refuse_bad_score(float(block_clarity.sum()), "clarity of a block", real.keys[image], step)
            refuse_bad_score(float(block_quality.sum()), "quality of a block", real.keys[image], step)

            encoded_transmission = None
            if transmission is not None:
                encoded_transmission = encode(transmission[image].float().cpu().numpy(), self.encoding)

            labels[image] = Label(
                key=real.keys[image],
                scores=scores[image],
                step=step,
                scene=encode(scene[image].cpu().numpy(), self.encoding),
                transmission=encoded_transmission,
                block_clarity=block_clarity.numpy(),
                block_quality=block_quality.numpy(),
            )
        return labels

    def _to_tensors(self, labels: list[Label], like: Tensor, from_teacher: list[bool]) -> PseudoLabels:
        """Convert labels, one for each image, to tensors J* and w*.

        Both have the height, the width and the device of `like`, `B 3 H W`.
        """
        # J* as stored: new labels are decoded too, so that a label is the same in this step and in later ones.
        scene = torch.from_numpy(np.stack([decode(label.scene) for label in labels]))

        # w* from the block scores.
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
    """Split a batch into its first `count` images and the others."""
    scene, transmission = restoration
    if transmission is None:
        return Restoration(scene[:count], None), Restoration(scene[count:], None)
    return Restoration(scene[:count], transmission[:count]), Restoration(scene[count:], transmission[count:])


def apply_mixup(batch: SyntheticBatch, alpha: float, generator_seed: Sequence[int]) -> SyntheticBatch:
    """Mix each pair with another pair of the batch.

    This is mixup (Zhang et al., ICLR 2018). An image and its truth are mixed alike, with a partner that may by chance
    be themselves. Each image draws its own share of itself from Beta(`alpha`, `alpha`), with `alpha` above 0.
    `generator_seed` is numbers of 0 and above (the run's seed, the step, the rank); equal numbers mix equally.
    """
    # Draw shares and partners.
    generator = np.random.default_rng(generator_seed)
    count = len(batch.hazy)
    share = torch.from_numpy(generator.beta(alpha, alpha, count).astype(np.float32)).view(-1, 1, 1, 1)
    partner = torch.from_numpy(generator.permutation(count))

    # Mix the hazy and the clear images alike.
    share, partner = share.to(batch.hazy.device), partner.to(batch.hazy.device)
    hazy = share * batch.hazy + (1 - share) * batch.hazy[partner]
    clear = share * batch.clear + (1 - share) * batch.clear[partner]
    return SyntheticBatch(hazy, clear)
