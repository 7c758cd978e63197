"""Full-reference metrics, against values known by hand and an independent implementation."""

import math

import pytest
import torch
from scipy.stats import spearmanr
from skimage.metrics import structural_similarity
from torch import Tensor

from corun_ray.core.metrics.measure import psnr, rank_correlation, ssim


def photograph(height_px: int = 40, width_px: int = 56) -> Tensor:
    """Smooth and textured, 1 3 H W in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 5, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height_px, width_px), mode="bicubic").clamp(0, 1)
    return 0.8 * smooth + 0.2 * torch.rand(smooth.shape, generator=generator)


def test_psnr_of_known_errors() -> None:
    truth = torch.full((4, 3, 8, 8), 0.5)
    images = truth.clone()
    images[0] += 0.1
    images[1, 0] += 0.1  # one channel of three
    images[2, :, :4, :4] -= 0.5  # a quarter of the pixels
    assert psnr(images, truth).tolist() == pytest.approx(
        [20, 20 + 10 * math.log10(3), 10 * math.log10(16), math.inf], abs=1e-4
    )


def test_ssim_of_equal_images_is_one() -> None:
    images = torch.cat([photograph(), torch.zeros(1, 3, 40, 56), torch.ones(1, 3, 40, 56)])
    assert ssim(images, images).tolist() == pytest.approx([1, 1, 1], abs=1e-6)


def test_ssim_is_the_usual_one() -> None:
    truth = photograph()
    noise = 0.1 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    blurred = torch.nn.functional.avg_pool2d(truth, 3, 1, 1, count_include_pad=False)
    images = torch.cat([0.5 * truth + 0.45, (truth + noise).clamp(0, 1), blurred, 1 - truth])
    expected = [
        structural_similarity(
            image.double().numpy(),
            truth[0].double().numpy(),
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
        )
        for image in images
    ]
    ours = ssim(images, truth.expand_as(images))
    assert ours.shape == (4,) and ours.dtype == torch.float32
    assert ours.tolist() == pytest.approx(expected, abs=1e-4)
    assert max(expected) < 0.99 and expected[3] < 0, "the images must differ, else the comparison says nothing"


def test_ssim_is_symmetric_and_does_not_mix_images() -> None:
    first, second = photograph(), photograph().flip(-1)
    both = ssim(torch.cat([first, second]), torch.cat([second, second]))
    assert both[0] == pytest.approx(ssim(second, first).item(), abs=1e-6)
    assert both[1] == pytest.approx(1, abs=1e-6)


def test_rank_correlation_is_spearmans() -> None:
    generator = torch.Generator().manual_seed(2)
    truth = torch.rand(12, 16, generator=generator)
    for found in (
        truth**3,
        -truth,
        truth + 0.3 * torch.randn(truth.shape, generator=generator),
        (8 * truth).round(),  # many equal values
    ):
        assert rank_correlation(found, truth) == pytest.approx(spearmanr(found.flatten(), truth.flatten())[0], abs=1e-9)


def test_a_map_that_is_the_same_everywhere_orders_nothing() -> None:
    assert rank_correlation(torch.full((4, 4), 0.05), torch.rand(4, 4)) == 0
