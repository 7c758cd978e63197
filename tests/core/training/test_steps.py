"""The two training steps, with a teacher of one weight and scripted scores in place of the real ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from corun_ray.core.choices import Encoding
from corun_ray.core.networks.corun import CORUN, Restoration
from corun_ray.core.scoring.coherence import BlockScores, Coherence, GlobalScores
from corun_ray.core.training.labels import Label, LocalPool, ReadyLabels, Scores, decode, encode
from corun_ray.core.training.losses import COLABATOR_WEIGHTS, PRETRAIN_WEIGHTS, Losses
from corun_ray.core.training.state import TrainState
from corun_ray.core.training.steps import Colabator, PseudoLabels, RealBatch, SyntheticBatch, run_pretraining_step
from corun_ray.core.training.streams import open_stream
from tests.streams import LateStream

SIDE_PX, BLOCK_PX = 32, 16
LOSSES = Losses(COLABATOR_WEIGHTS)


class FakeNetwork(nn.Module):
    """Scales the image; its transmission is the scaled mean channel. Remembers its inputs."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.inputs: list[Tensor] = []

    def forward(self, hazy: Tensor) -> Restoration:
        self.inputs.append(hazy)
        return Restoration(self.gain * hazy, 0.5 * self.gain * hazy.mean(1, keepdim=True))


class SceneNetwork(FakeNetwork):
    """Has no transmission."""

    def forward(self, hazy: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hazy).scene


class ScriptedCoherence(Coherence):
    """Returns given global scores; a block's clarity is its mean, its quality its maximum. Remembers its inputs."""

    def __init__(self, scores: Sequence[tuple[float, float]]) -> None:
        super().__init__(lambda x: x.mean((1, 2, 3)), lambda x: x.amax((1, 2, 3)), BLOCK_PX)
        self.scores = torch.tensor(scores)
        self.rated_globally: list[Tensor] = []
        self.rated_in_blocks: list[Tensor] = []
        self.haze_shown: list[Tensor] = []

    def score_images(self, images: Tensor, hazy: Tensor) -> GlobalScores:
        self.rated_globally.append(images)
        self.haze_shown.append(hazy)
        return GlobalScores(self.scores[:, 0], self.scores[:, 1])

    def score_blocks(self, images: Tensor, hazy: Tensor) -> BlockScores:
        self.rated_in_blocks.append(images)
        self.haze_shown.append(hazy)
        return super().score_blocks(images, hazy)


class RecordingPool(LocalPool):
    """Remembers what it was asked and offered, in order."""

    def __init__(self, labels: Sequence[Label] = ()) -> None:
        super().__init__(labels)
        self.asked: list[list[str]] = []
        self.offers: list[list[Label]] = []

    def prefetch(self, keys: Sequence[str]) -> ReadyLabels:
        self.asked.append(list(keys))
        return super().prefetch(keys)

    def offer(self, labels: Sequence[Label]) -> None:
        self.offers.append(list(labels))
        super().offer(labels)


def stored_label(key: str, clarity: float, quality: float) -> Label:
    random = np.random.default_rng(len(key))
    return Label(
        key=key,
        scores=Scores(clarity, quality),
        step=1,
        scene=random.integers(0, 256, (3, SIDE_PX, SIDE_PX), dtype=np.uint8),
        transmission=random.integers(0, 256, (1, SIDE_PX, SIDE_PX), dtype=np.uint8),
        block_clarity=random.uniform(0, 1, (2, 2)).astype(np.float32),
        block_quality=random.uniform(0, 1, (2, 2)).astype(np.float32),
    )


def real_batch(*keys: str) -> RealBatch:
    generator = torch.Generator().manual_seed(0)
    weak, strong = torch.rand(2, len(keys), 3, SIDE_PX, SIDE_PX, generator=generator)
    return RealBatch(weak, strong, keys)


def synthetic_batch(count: int) -> SyntheticBatch:
    hazy, clear = torch.rand(2, count, 3, SIDE_PX, SIDE_PX, generator=torch.Generator().manual_seed(1))
    return SyntheticBatch(hazy, clear)


def trust_of(clarity: Tensor, quality: Tensor) -> Tensor:
    mean = (clarity + quality)[None, None] / 2
    return nn.functional.interpolate(mean, (SIDE_PX, SIDE_PX), mode="bilinear", align_corners=False)[0]


def assert_stored(labels: PseudoLabels, row: int, stored: Label) -> None:
    """That row `row` of a step's labels is what the pool had, value by value."""
    assert not labels.from_teacher[row]
    np.testing.assert_array_equal(labels.scene[row].numpy(), decode(stored.scene))
    expected = trust_of(torch.from_numpy(stored.block_clarity), torch.from_numpy(stored.block_quality))
    torch.testing.assert_close(labels.trust[row], expected)


def assert_candidate(labels: PseudoLabels, row: int, weak: Tensor, gain: float) -> None:
    """That row `row` is the teacher's candidate for `weak`, as the pool would keep it."""
    assert labels.from_teacher[row]
    candidate = (gain * weak).clamp(0, 1)
    torch.testing.assert_close(labels.scene[row], candidate, rtol=0, atol=0.5 / 255 + 1e-6)
    blocks = candidate.unfold(1, BLOCK_PX, BLOCK_PX).unfold(2, BLOCK_PX, BLOCK_PX)  # 3 2 2 16 16
    torch.testing.assert_close(labels.trust[row], trust_of(blocks.mean((0, 3, 4)), blocks.amax((0, 3, 4))))


def test_pretraining_step_is_its_losses() -> None:
    student, batch, losses = FakeNetwork(0.7), synthetic_batch(2), Losses(PRETRAIN_WEIGHTS)
    output = run_pretraining_step(student, batch, losses)
    torch.testing.assert_close(output.losses, losses.compute_pretraining(student(batch.hazy), batch.clear, batch.hazy))
    assert output.labels is None


def test_images_seen_first_take_the_teacher_s_candidate() -> None:
    pool, coherence, teacher = RecordingPool(), ScriptedCoherence([(0.0, 0.3), (0.2, 0.0)]), FakeNetwork(1.5)
    real = real_batch("a.jpg", "b/a.jpg")
    labels = Colabator(teacher, coherence, pool, LOSSES).choose_labels(real, step=17)

    assert pool.asked == [["a.jpg", "b/a.jpg"]]
    assert torch.equal(teacher.inputs[0], real.weak), "the teacher sees the weak view"
    (rated,) = coherence.rated_globally
    assert rated.max() == 1, "candidates are clamped before they are rated"
    for row in range(2):
        assert_candidate(labels, row, real.weak[row], 1.5)

    (offered,) = pool.offers
    assert [(o.key, o.step) for o in offered] == [("a.jpg", 17), ("b/a.jpg", 17)]
    assert [o.scores for o in offered] == [pytest.approx((0.0, 0.3)), pytest.approx((0.2, 0.0))]
    for row, label in enumerate(offered):
        assert label.scene.dtype == np.uint8 and label.scene.shape == (3, SIDE_PX, SIDE_PX)
        np.testing.assert_array_equal(label.scene, encode((1.5 * real.weak[row]).numpy(), "uint8"))
        assert label.transmission is not None
        np.testing.assert_array_equal(label.transmission, encode(0.75 * real.weak[row].mean(0)[None].numpy(), "uint8"))
        assert label.block_clarity.shape == label.block_quality.shape == (2, 2)
        assert label.block_clarity.dtype == label.block_quality.dtype == np.float32
        assert pool.labels[label.key] is label


def test_losers_keep_the_pool_s_labels_and_no_block_is_rated() -> None:
    stored = [stored_label("a", 0.5, 0.5), stored_label("bb", 0.5, 0.5)]
    # Better in one score alone is not enough.
    pool, coherence = RecordingPool(stored), ScriptedCoherence([(0.9, 0.4), (0.4, 0.9)])
    labels = Colabator(FakeNetwork(1.0), coherence, pool, LOSSES).choose_labels(real_batch("a", "bb"), step=2)
    for row, label in enumerate(stored):
        assert_stored(labels, row, label)
        assert pool.labels[label.key] is label
    assert pool.offers == []
    assert not any(len(images) for images in coherence.rated_in_blocks)


@pytest.mark.parametrize("scores", [(0.5, 0.5), (0.5, 0.6), (0.9, 0.5)])
def test_a_candidate_at_least_as_good_in_both_replaces_the_stored_one(scores: tuple[float, float]) -> None:
    pool, real = RecordingPool([stored_label("a", 0.5, 0.5)]), real_batch("a")
    labels = Colabator(FakeNetwork(0.8), ScriptedCoherence([scores]), pool, LOSSES).choose_labels(real, step=9)
    assert_candidate(labels, 0, real.weak[0], 0.8)
    assert pool.labels["a"].step == 9


def test_a_mixed_batch_keeps_its_order() -> None:
    stored = [stored_label("loses", 0.5, 0.5), stored_label("wins", 0.5, 0.5), stored_label("loses too", 0.8, 0.1)]
    pool = RecordingPool(stored)
    coherence = ScriptedCoherence([(0.6, 0.4), (0.1, 0.1), (0.6, 0.6), (0.7, 0.2)])
    real = real_batch("loses", "new", "wins", "loses too")
    labels = Colabator(FakeNetwork(0.9), coherence, pool, LOSSES).choose_labels(real, step=5)

    # Scorers see the hazy image of each candidate that they rate.
    of_all, of_winners = coherence.haze_shown
    assert torch.equal(of_all, real.weak) and torch.equal(of_winners, real.weak[1:3])

    assert labels.from_teacher == [False, True, True, False]
    assert_stored(labels, 0, stored[0])
    assert_candidate(labels, 1, real.weak[1], 0.9)
    assert_candidate(labels, 2, real.weak[2], 0.9)
    assert_stored(labels, 3, stored[2])
    (rated,) = coherence.rated_in_blocks
    torch.testing.assert_close(rated, 0.9 * real.weak[1:3])
    assert [[(o.key, o.step) for o in offer] for offer in pool.offers] == [[("new", 5), ("wins", 5)]]
    assert (labels.block_ratings, labels.block_ratings_saved) == (8, 8)


@pytest.mark.parametrize("encoding", ["float16", "float32"])
def test_labels_are_kept_as_the_encoding_says(encoding: Encoding) -> None:
    pool, real = RecordingPool(), real_batch("a")
    colabator = Colabator(FakeNetwork(0.9), ScriptedCoherence([(0.5, 0.5)]), pool, LOSSES, encoding)
    labels = colabator.choose_labels(real, step=0)
    assert pool.labels["a"].scene.dtype == encoding
    bound = 2**-12 if encoding == "float16" else 0
    torch.testing.assert_close(labels.scene, (0.9 * real.weak).detach(), rtol=0, atol=bound + 1e-7)


def test_a_colabator_step_is_the_student_s_losses_on_both_halves() -> None:
    student, teacher, pool = FakeNetwork(0.7), FakeNetwork(0.9), RecordingPool([stored_label("a", 0.5, 0.5)])
    synthetic, real = synthetic_batch(3), real_batch("a", "new")
    colabator = Colabator(teacher, ScriptedCoherence([(0.1, 0.1), (0.1, 0.1)]), pool, LOSSES)
    output = colabator.step(student, synthetic, real, step=3)

    (seen,) = student.inputs
    assert torch.equal(seen, torch.cat([synthetic.hazy, real.strong]))
    labels = output.labels
    assert labels is not None and labels.from_teacher == [False, True]
    assert_candidate(labels, 1, real.weak[1], 0.9)
    expected = LOSSES.compute_colabator(
        student(synthetic.hazy), synthetic.clear, student(real.strong), real.strong, labels.scene, labels.trust
    )
    torch.testing.assert_close(output.losses, expected)


def test_only_the_student_learns() -> None:
    student, teacher = FakeNetwork(0.7), FakeNetwork(0.9)
    colabator = Colabator(teacher, ScriptedCoherence([(0.1, 0.1)]), LocalPool(), LOSSES)
    output = colabator.step(student, synthetic_batch(1), real_batch("a"), step=0)
    sum(output.losses.values()).backward()  # type: ignore[union-attr]
    assert student.gain.grad is not None and student.gain.grad != 0
    assert teacher.gain.grad is None
    assert output.labels is not None
    assert not output.labels.scene.requires_grad and not output.labels.trust.requires_grad


def test_a_network_without_a_transmission_has_neither_its_label_nor_its_loss() -> None:
    student, pool, real = SceneNetwork(0.7), RecordingPool(), real_batch("a", "b")
    assert list(run_pretraining_step(student, synthetic_batch(1), LOSSES).losses) == ["pixel"]
    colabator = Colabator(SceneNetwork(0.9), ScriptedCoherence([(0.1, 0.1)] * 2), pool, LOSSES)
    output = colabator.step(student, synthetic_batch(1), real, step=0)
    assert list(output.losses) == ["pixel_synthetic", "pixel_real"]
    assert output.labels is not None
    assert_candidate(output.labels, 1, real.weak[1], 0.9)
    assert [pool.labels[key].transmission for key in "ab"] == [None, None]


class PlacedNetwork(FakeNetwork):
    """Notes in which stream it works, and draws a random number on the way."""

    def __init__(self, gain: float, name: str, stream: LateStream) -> None:
        super().__init__(gain)
        self.name, self.stream = name, stream

    def forward(self, hazy: Tensor) -> Restoration:
        self.stream.notes.append(f"{self.name} in {self.stream.where}")
        scene, transmission = super().forward(hazy * torch.rand(()))
        return Restoration(scene, transmission)


class PlacedCoherence(ScriptedCoherence):
    """Notes in which stream it rates."""

    def __init__(self, scores: Sequence[tuple[float, float]], stream: LateStream) -> None:
        super().__init__(scores)
        self.stream = stream

    def score_images(self, images: Tensor, hazy: Tensor) -> GlobalScores:
        self.stream.notes.append(f"images rated in {self.stream.where}")
        return super().score_images(images, hazy)

    def score_blocks(self, images: Tensor, hazy: Tensor) -> BlockScores:
        self.stream.notes.append(f"blocks rated in {self.stream.where}")
        return super().score_blocks(images, hazy)


class PlacedLosses(Losses):
    """Notes in which stream the losses are computed."""

    stream: LateStream

    def compute_colabator(self, *restored: Any, **rest: Any) -> dict[str, Tensor]:
        self.stream.notes.append(f"losses in {self.stream.where}")
        return super().compute_colabator(*restored, **rest)


def test_teacher_and_scorers_work_in_their_own_stream_beside_the_student() -> None:
    scores, real, synthetic = [(0.6, 0.6), (0.1, 0.1)], real_batch("wins", "loses"), synthetic_batch(2)
    outputs, notes, pools = [], [], []
    for is_beside in (False, True):
        stream = LateStream()
        losses = PlacedLosses(COLABATOR_WEIGHTS)
        object.__setattr__(losses, "stream", stream)
        student, teacher = PlacedNetwork(0.7, "student", stream), PlacedNetwork(0.9, "teacher", stream)
        pool = RecordingPool([stored_label("wins", 0.5, 0.5), stored_label("loses", 0.5, 0.5)])
        coherence = PlacedCoherence(scores, stream)
        colabator = Colabator(teacher, coherence, pool, losses, side=stream if is_beside else None)
        torch.manual_seed(3)
        outputs.append(colabator.step(student, synthetic, real, step=4))
        notes.append(stream.notes)
        pools.append(pool.labels)

    before, beside = notes
    assert before == [
        *("teacher in main", "images rated in main", "blocks rated in main", "student in main", "losses in main")
    ]
    assert beside == [
        *("side waits for main", "teacher in side", "images rated in side", "student in main"),
        *("blocks rated in side", "main waits for side", "losses in main"),
    ]
    # Memory that both streams use is kept for the other one.
    assert len(stream.borrowed) == 1 and stream.borrowed[0] is real.weak
    assert stream.lent == [(2, 3, SIDE_PX, SIDE_PX), (2, 1, SIDE_PX, SIDE_PX)]

    # The results are the very same: losses, labels and the pool.
    one, other = outputs
    torch.testing.assert_close(other.losses, one.losses, rtol=0, atol=0)
    assert one.labels is not None and other.labels is not None
    assert torch.equal(one.labels.scene, other.labels.scene) and torch.equal(one.labels.trust, other.labels.trust)
    assert one.labels[2:] == other.labels[2:] and one.labels.from_teacher == [True, False]
    for key in ("wins", "loses"):
        assert pools[0][key].scores == pools[1][key].scores
        np.testing.assert_array_equal(pools[0][key].scene, pools[1][key].scene)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_s_second_stream_changes_no_number() -> None:
    device = torch.device("cuda")
    found = []
    for side in (None, open_stream(device)):
        torch.manual_seed(0)
        network = CORUN(2, 8)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1)
        state, pool = TrainState.start(network, device), LocalPool()
        colabator = Colabator(state.teacher, Coherence(block_px=BLOCK_PX), pool, LOSSES, side=side)
        for step in range(8):
            synthetic = SyntheticBatch(*(images.to(device) for images in synthetic_batch(2)[:2]))
            weak, strong, keys = real_batch("a", "b")
            output = colabator.step(state.student, synthetic, RealBatch(weak.to(device), strong.to(device), keys), step)
            state.backward(output.losses)
            state.update(1e-3, 0.9, 2)
        found.append({name: tensor.cpu() for name, tensor in state.collect_tensors().items()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
