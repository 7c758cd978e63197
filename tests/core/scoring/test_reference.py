"""Coherence by a reference: what the shipped model says of restorations of scenes that it has not seen."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from corun_ray.core.data.images import decode_image
from corun_ray.core.metrics.measure import rank_correlation
from corun_ray.core.networks.corun import CORUN, Restoration
from corun_ray.core.scoring.reference import VARIANCE_OF_HAZE, ReferenceCoherence, expect_errors, rate_error
from corun_ray.demo.dataset import DemoSize, write_demo
from corun_ray.service.train.coherence import load_reference

SIDE_PX = 96


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, Tensor]:
    """Hazy photographs of four rendered scenes, and their truth."""
    root = tmp_path_factory.mktemp("scenes")
    write_demo(root, seed=4242, size=DemoSize(clear_images=0, hazy_images=4))
    return tuple(torch.cat([read(path) for path in sorted((root / name).iterdir())]) for name in ("hazy", "hazy_truth"))


def read(path: Path) -> Tensor:
    image = torch.from_numpy(decode_image(path.read_bytes())).permute(2, 0, 1)[None].float() / 255
    return F.interpolate(image, (SIDE_PX, SIDE_PX), mode="area")


def test_expected_errors_by_hand() -> None:
    reference = Restoration(torch.full((1, 3, 1, 2), 0.5), torch.tensor([[[[1.0, 0.5]]]]))
    images = torch.tensor([[[[0.5, 0.8]], [[0.5, 0.8]], [[0.5, 0.5]]]])
    expected = torch.tensor([[[[0.0, 0.06 + VARIANCE_OF_HAZE / 4]]]])
    torch.testing.assert_close(expect_errors(images, reference), expected)


def test_scores_are_linear_in_decibels() -> None:
    errors = torch.tensor([1.0, 10**-0.5, 10**-2.5, 10**-4.5, 0.0])
    torch.testing.assert_close(rate_error(errors), torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def test_more_of_the_truth_scores_higher(scenes: tuple[Tensor, Tensor]) -> None:
    hazy, truth = scenes
    coherence = ReferenceCoherence(load_reference())
    levels = [coherence.score_images(hazy + share * (truth - hazy), hazy).clarity for share in (0.0, 0.5)]
    assert (levels[1] > levels[0]).all(), levels


def test_noise_costs_quality(scenes: tuple[Tensor, Tensor]) -> None:
    hazy, truth = scenes
    restored = hazy + 0.8 * (truth - hazy)
    noise = torch.randn(restored.shape, generator=torch.Generator().manual_seed(0))
    coherence = ReferenceCoherence(load_reference())
    good = coherence.score_images(restored, hazy).quality
    assert (coherence.score_images((restored + 0.06 * noise).clamp(0, 1), hazy).quality < good).all()


def test_parts_with_haze_left_are_trusted_less_in_the_mean(scenes: tuple[Tensor, Tensor]) -> None:
    hazy, truth = scenes
    half = truth.clone()
    half[..., : SIDE_PX // 2] = hazy[..., : SIDE_PX // 2]
    blocks = ReferenceCoherence(load_reference(), block_px=16).score_blocks(half, hazy)
    assert blocks.clarity.shape == (4, 6, 6)
    assert blocks.clarity[..., :3].mean() < blocks.clarity[..., 3:].mean()


def test_expected_errors_order_the_blocks_of_a_restoration(scenes: tuple[Tensor, Tensor]) -> None:
    hazy, truth = scenes
    restored = ((hazy - 0.9) / 0.5 + 0.9).clamp(0, 1)
    coherence = ReferenceCoherence(load_reference(), block_px=16)
    trust = coherence.score_blocks(restored, hazy).quality
    error = F.avg_pool2d((restored - truth).square().mean(1), 16)
    ranks = [rank_correlation(-a, b) for a, b in zip(trust, error, strict=True)]
    assert sum(ranks) / len(ranks) > 0.4, ranks


def test_a_score_does_not_depend_on_the_batch(scenes: tuple[Tensor, Tensor]) -> None:
    hazy, truth = scenes
    coherence = ReferenceCoherence(load_reference())
    together = coherence.score_images(truth, hazy).clarity
    alone = torch.cat([coherence.score_images(truth[i : i + 1], hazy[i : i + 1]).clarity for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_sides_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 32 px, got 48 x 64 px"):
        ReferenceCoherence(CORUN(2, 4)).score_blocks(torch.zeros(1, 3, 48, 64), torch.zeros(1, 3, 48, 64))


def test_no_winners_have_no_blocks() -> None:
    none = torch.zeros(0, 3, 64, 96)
    blocks = ReferenceCoherence(CORUN(2, 4)).score_blocks(none, none)
    assert blocks.clarity.shape == blocks.quality.shape == (0, 2, 3)
