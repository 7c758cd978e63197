import pytest
import torch
from torch import Tensor

from corun_ray.core.scoring.coherence import BlockScores, Coherence
from corun_ray.core.scoring.scorers import CLARITY_SCORERS, DEFAULT_CLARITY, DEFAULT_QUALITY, QUALITY_SCORERS, Scorer


def brightness(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


def redness(images: Tensor) -> Tensor:
    return images[:, 0].mean((1, 2))


def scene(height_px: int = 64, width_px: int = 96, seed: int = 0) -> Tensor:
    """A smooth coloured scene with edges and texture, 1 3 H W in [0.03, 0.97]."""
    generator = torch.Generator().manual_seed(seed)
    size = (height_px, width_px)
    layers = [
        torch.nn.functional.interpolate(torch.rand(1, 3, side, side, generator=generator), size, mode="bilinear")
        for side in (4, 16, 48)
    ]
    mixed = 0.6 * (layers[0] > 0.5).float() + 0.25 * layers[1] + 0.15 * layers[2]
    return 0.03 + 0.94 * mixed


def add_haze(images: Tensor, transmission: float | Tensor, airlight: float = 0.9) -> Tensor:
    return images * transmission + airlight * (1 - transmission)


EVERY = [*CLARITY_SCORERS.items(), *QUALITY_SCORERS.items()]


@pytest.mark.parametrize(("name", "scorer"), EVERY)
@pytest.mark.parametrize("side_px", [32, 64])
def test_scores_are_one_number_an_image_in_0_1(name: str, scorer: Scorer, side_px: int) -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(1, 3, side_px, side_px, generator=generator)
    constants = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 3, side_px, side_px)
    scores = scorer(torch.cat([noise, constants, scene(side_px, side_px)]))
    assert scores.shape == (5,) and scores.dtype == torch.float32
    assert ((scores >= 0) & (scores <= 1)).all(), (name, scores)


@pytest.mark.parametrize(("name", "scorer"), EVERY)
def test_scores_of_an_image_do_not_depend_on_its_batch(name: str, scorer: Scorer) -> None:
    images = torch.cat([scene(seed=0), add_haze(scene(seed=1), 0.4)])
    singles = torch.cat([scorer(image[None]) for image in images])
    torch.testing.assert_close(scorer(images), singles)


@pytest.mark.parametrize(("name", "scorer"), CLARITY_SCORERS.items())
def test_clarity_falls_with_haze(name: str, scorer: Scorer) -> None:
    scores = [scorer(add_haze(scene(), t)).item() for t in (1.0, 0.75, 0.5, 0.25)]
    assert scores == sorted(scores, reverse=True), scores
    assert scores[0] > scores[-1] + 0.05


def test_block_scores_equal_the_global_scores_of_each_block() -> None:
    coherence = Coherence(block_px=32)
    images = torch.cat([scene(64, 96, seed=0), scene(64, 96, seed=1)])
    blocks = coherence.score_blocks(images, images)
    assert blocks.clarity.shape == blocks.quality.shape == (2, 2, 3)
    for row in range(2):
        for column in range(3):
            block = images[..., row * 32 : (row + 1) * 32, column * 32 : (column + 1) * 32]
            whole = coherence.score_images(block, block)
            torch.testing.assert_close(blocks.clarity[:, row, column], whole.clarity)
            torch.testing.assert_close(blocks.quality[:, row, column], whole.quality)


def test_block_scores_refuse_sides_that_blocks_do_not_fill() -> None:
    with pytest.raises(ValueError, match="multiples of 32 px, got 64 x 80 px"):
        Coherence(block_px=32).score_blocks(images := torch.zeros(1, 3, 64, 80), images)


def test_trust_map_interpolates_between_block_centres() -> None:
    blocks = BlockScores(clarity=torch.tensor([[[0.0, 1.0]]]), quality=torch.tensor([[[0.4, 0.8]]]))
    # Averages 0.2 and 0.9 stand at columns 0.5 and 2.5 (pixel centres); outside them they are continued.
    expected = [0.2, 0.2 + 0.7 * 0.25, 0.2 + 0.7 * 0.75, 0.9]
    averaged = Coherence(block_px=2, combine="addition").build_trust_map(blocks, 2, 4)
    assert averaged.shape == (1, 1, 2, 4)
    torch.testing.assert_close(averaged[0, 0], torch.tensor([expected, expected]))
    expected = [0.0, 0.8 * 0.25, 0.8 * 0.75, 0.8]
    multiplied = Coherence(block_px=2, combine="multiplication").build_trust_map(blocks, 2, 4)
    torch.testing.assert_close(multiplied[0, 0], torch.tensor([expected, expected]))


@pytest.mark.parametrize("combine", ["addition", "multiplication"])
def test_trust_map_prefers_the_clear_half(combine: str) -> None:
    images = scene(96, 192)
    images[..., 96:] = add_haze(images[..., :96], 0.25)
    coherence = Coherence(block_px=32, combine=combine)  # type: ignore[arg-type]
    trust = coherence.build_trust_map(coherence.score_blocks(images, images), 96, 192)
    assert trust.shape == (1, 1, 96, 192)
    assert ((trust >= 0) & (trust <= 1)).all()
    assert trust[..., :96].mean() > trust[..., 96:].mean() + 0.03


def test_scorers_of_ones_own_are_used_as_they_are() -> None:
    coherence = Coherence(clarity=brightness, quality=redness)
    images = torch.tensor([0.8, 0.5, 0.2]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    scores = coherence.score_images(images, images)
    assert scores.clarity.item() == pytest.approx(0.5)
    assert scores.quality.item() == pytest.approx(0.8)


def test_scoring_keeps_no_gradient() -> None:
    images = scene(32, 32).requires_grad_()
    coherence = Coherence()
    blocks = coherence.score_blocks(images, images)
    trust = coherence.build_trust_map(blocks, 32, 32)
    for scores in (coherence.score_images(images, images).clarity, blocks.quality, trust):
        assert not scores.requires_grad


def test_defaults_are_registered() -> None:
    assert DEFAULT_CLARITY in CLARITY_SCORERS and DEFAULT_QUALITY in QUALITY_SCORERS


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^clarity: expected one of .*fade.*, got 'sharp'"):
        Coherence(clarity="sharp")
    with pytest.raises(ValueError, match=r"^quality: expected one of .*, got 'nice'"):
        Coherence(quality="nice")
    with pytest.raises(ValueError, match="expected addition or multiplication, got 'sum'"):
        Coherence(combine="sum")  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "scorer"), QUALITY_SCORERS.items())
def test_quality_falls_with_dehazing_too_much(name: str, scorer: Scorer) -> None:
    scores = [scorer((scene() - offset).clamp(0, 1)).item() for offset in (0.0, 0.1, 0.3, 0.5)]
    assert scores == sorted(scores, reverse=True), scores
    assert scores[0] > scores[-1] + 0.05


def test_clean_falls_with_noise() -> None:
    noise = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    scores = [QUALITY_SCORERS["clean"]((scene() + level * noise).clamp(0, 1)).item() for level in (0.0, 0.1, 0.2, 0.4)]
    assert scores == sorted(scores, reverse=True), scores
    assert scores[0] > scores[-1] + 0.05


def test_clean_forgives_the_noise_that_lifting_haze_amplifies() -> None:
    noise = 0.08 * torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    noisy = scene() + noise
    faded = 0.3 + 0.4 * noisy
    assert QUALITY_SCORERS["clean"](faded).item() == pytest.approx(QUALITY_SCORERS["clean"](noisy).item(), abs=0.05)


def test_contrast_does_not_reward_dehazing_too_much() -> None:
    assert CLARITY_SCORERS["contrast"](scene()) > CLARITY_SCORERS["contrast"](((scene() - 0.4) * 3).clamp(0, 1))
