"""A training that diverges stops at the first number that is not finite, before any weight changes."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from corun_ray.core.scoring.coherence import BlockScores, Coherence, GlobalScores
from corun_ray.core.training.divergence import Diverged, ScoreNotFinite
from corun_ray.core.training.labels import Label, ReadyLabels
from corun_ray.core.training.losses import Losses, LossWeights
from corun_ray.core.training.state import TrainState
from corun_ray.core.training.steps import Colabator, RealBatch

SIZE_PX = 32


class Gain(nn.Module):
    """A network of one weight."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, hazy: Tensor) -> Tensor:
        return self.gain * hazy


class Seen(Gain):
    """A network whose transmission alone is not finite."""

    def forward(self, hazy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return hazy, self.gain * math.nan * hazy[:, :1]


def make_state() -> TrainState:
    """Return a state after 3 steps."""
    state = TrainState.start(Gain())
    for _ in range(3):
        state.backward({"pixel": state.student.gain.square()})
        state.update(lr=1e-3, ema=0.9, batch_images=1)
    return state


LOSSES: dict[str, tuple[Callable[[Tensor], dict[str, Tensor]], str]] = {
    "loss": (lambda gain: {"pixel": gain, "scattering": gain * math.nan}, "the loss scattering is nan"),
    "infinite loss": (lambda gain: {"pixel": gain * 1e38 * 1e38}, "the loss pixel is inf"),
    "gradient": (lambda gain: {"pixel": (gain * 0).sqrt()}, "the gradient of gain is nan"),
}


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("kind", LOSSES)
def test_a_bad_loss_or_gradient_stops_before_any_weight_changes(kind: str, clip_norm: float) -> None:
    make_losses, expected = LOSSES[kind]
    state = make_state()
    before = copy.deepcopy(state.collect_tensors())

    # A good part of the step hides no bad one.
    state.backward({"pixel": state.student.gain.square()}, 0.5)
    state.backward(make_losses(state.student.gain), 0.5)
    with pytest.raises(Diverged, match=f"^step 3: {expected}, not finite$"):
        state.update(lr=1e-3, ema=0.9, batch_images=1, clip_norm=clip_norm)

    assert state.step == 3
    torch.testing.assert_close(state.collect_tensors(), before, rtol=0, atol=0)


class FixedCoherence(Coherence):
    """Scores every image and block alike."""

    def __init__(self, clarity: float, block_quality: float) -> None:
        super().__init__()
        self.fixed_clarity, self.fixed_block_quality = clarity, block_quality

    def score_images(self, images: Tensor, hazy: Tensor) -> GlobalScores:
        return GlobalScores(torch.full((len(images),), self.fixed_clarity), torch.ones(len(images)))

    def score_blocks(self, images: Tensor, hazy: Tensor) -> BlockScores:
        return BlockScores(torch.ones(len(images), 1, 1), torch.full((len(images), 1, 1), self.fixed_block_quality))


class NoLabels:
    """A pool without labels that notes what it is offered."""

    def __init__(self) -> None:
        self.offered: list[Label] = []

    def prefetch(self, keys: list[str]) -> ReadyLabels:
        return ReadyLabels([None for _ in keys])

    def offer(self, labels: list[Label]) -> None:
        self.offered += labels


@pytest.mark.parametrize(
    ("teacher", "clarity", "block_quality", "error", "expected"),
    [
        (Seen(), 1.0, 1.0, Diverged, "the teacher's restoration of b.jpg has nan or inf, not finite"),
        (Gain(math.nan), 1.0, 1.0, Diverged, "the teacher's restoration of b.jpg has nan or inf, not finite"),
        (Gain(math.inf), 1.0, 1.0, Diverged, "the teacher's restoration of b.jpg has nan or inf, not finite"),
        (
            Gain(),
            math.nan,
            1.0,
            ScoreNotFinite,
            "the clarity is nan for the restoration of b.jpg, which is",
        ),
        (Gain(), 1.0, -math.inf, ScoreNotFinite, "the quality of a block is -inf for the restoration of b.jpg, which"),
    ],
)
def test_no_label_is_offered_with_a_bad_image_or_score(
    teacher: Gain, clarity: float, block_quality: float, error: type[Exception], expected: str
) -> None:
    pool = NoLabels()
    losses = Losses(LossWeights(1.0, 0.0, 0.0, 0.0))
    colabator = Colabator(teacher, FixedCoherence(clarity, block_quality), pool, losses)

    images = torch.full((1, 3, SIZE_PX, SIZE_PX), 0.5)
    with pytest.raises(error, match=f"^step 7: {expected}"):
        colabator.choose_labels(RealBatch(images, images, ["b.jpg"]), 7)
    assert pool.offered == []
