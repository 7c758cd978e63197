"""The Laplacian pyramid by hand, and the losses that compare its bands."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from corun_ray.core.networks.corun import Restoration
from corun_ray.core.training.losses import (
    COLABATOR_WEIGHTS,
    PRETRAIN_WEIGHTS,
    LaplacianFeatures,
    Losses,
    compute_contrastive,
    compute_perceptual,
)

EXTRACTOR = LaplacianFeatures()


def pictures(count: int, seed: int) -> Tensor:
    return torch.rand(count, 3, 32, 48, generator=torch.Generator().manual_seed(seed))


def columns(*values: float, size_px: int = 16) -> Tensor:
    """One image of 3 channels whose columns repeat these values."""
    return torch.tensor(values).repeat(size_px // len(values)).expand(1, 3, size_px, size_px).clone()


def flat(value: float) -> Tensor:
    return columns(value)


def test_levels_halve_their_sides() -> None:
    sides = [tuple(level.shape) for level in EXTRACTOR(pictures(2, 0))]
    assert sides == [(2, 3, 32, 48), (2, 3, 16, 24), (2, 3, 8, 12), (2, 3, 4, 6), (2, 3, 2, 3)]
    assert len(sides) == len(EXTRACTOR.layer_weights)


def test_a_flat_image_is_its_rest_alone() -> None:
    *bands, rest = EXTRACTOR(flat(0.7))
    assert all(not band.any() for band in bands)
    assert torch.equal(rest, torch.full((1, 3, 1, 1), 0.7))


def test_stripes_lie_in_the_band_of_their_width() -> None:
    # Stripes of one pixel: pairs have the mean 0.5, and nothing is left for coarser bands.
    first, *bands, rest = EXTRACTOR(columns(0, 1))
    torch.testing.assert_close(first, columns(-0.5, 0.5))
    assert all(not band.any() for band in bands) and (rest == 0.5).all()

    # Stripes of two pixels: the first band has what bilinear interpolation of 0 1 0 1 misses, a quarter of a step. At
    # the border, the outermost pixel has the value of the outermost pair.
    first, second, *bands, rest = EXTRACTOR(columns(0, 0, 1, 1))
    expected = columns(-0.25, -0.25, 0.25, 0.25)
    expected[..., [0, -1]] = 0
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, columns(-0.5, 0.5, size_px=8))
    assert all(not band.any() for band in bands) and (rest == 0.5).all()


def test_the_levels_rebuild_the_image() -> None:
    image = pictures(2, 1)
    *bands, rebuilt = EXTRACTOR(image)
    for band in reversed(bands):
        rebuilt = band + F.interpolate(rebuilt, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(rebuilt, image, rtol=0, atol=1e-6)


def test_few_bits_do_not_round_the_bands_away() -> None:
    image = (0.5 + columns(0, 1) / 256).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        first, *_ = EXTRACTOR(image)
    torch.testing.assert_close(first, columns(-1, 1) / 512)


def test_losses_by_hand() -> None:
    # Stripes against a flat image of the same mean differ by 0.5 in the first band alone.
    stripes, grey, light = (EXTRACTOR(image) for image in (columns(0, 1), flat(0.5), flat(0.9)))
    assert compute_perceptual(EXTRACTOR, stripes, grey).item() == pytest.approx(0.2 * 0.5)
    # From the light image, the stripes differ by 0.5 in the first band and by 0.4 in the rest; grey by the rest alone.
    assert compute_perceptual(EXTRACTOR, stripes, light).item() == pytest.approx(0.2 * (0.5 + 0.4))
    assert compute_contrastive(EXTRACTOR, stripes, grey, light).item() == pytest.approx(0.2 * 0.5 / 0.53)
    assert compute_contrastive(EXTRACTOR, grey, stripes, light).item() == pytest.approx(0.2 * 0.5 / 0.03, rel=1e-4)


def test_a_perfect_restoration_has_no_loss() -> None:
    clear, hazy = EXTRACTOR(pictures(1, 0)), EXTRACTOR(pictures(1, 1))
    assert compute_perceptual(EXTRACTOR, clear, clear) == 0
    assert compute_contrastive(EXTRACTOR, clear, clear, hazy) == 0


def test_both_methods_have_both_losses() -> None:
    scene, clear, hazy = pictures(1, 0), pictures(1, 1), pictures(1, 2)
    distances = {
        "perceptual": 0.2 * compute_perceptual(EXTRACTOR, EXTRACTOR(scene), EXTRACTOR(clear)),
        "contrastive": compute_contrastive(EXTRACTOR, EXTRACTOR(scene), EXTRACTOR(clear), EXTRACTOR(hazy)),
    }
    restoration = Restoration(scene, None)
    pretraining = Losses(replace(PRETRAIN_WEIGHTS, perceptual=0.2), EXTRACTOR)
    found = pretraining.compute_pretraining(restoration, clear, hazy)
    assert list(found) == ["pixel", "perceptual", "contrastive"]
    torch.testing.assert_close({name: found[name] for name in distances}, distances)

    colabator = Losses(COLABATOR_WEIGHTS, EXTRACTOR)
    found = colabator.compute_colabator(restoration, clear, restoration, hazy, clear, torch.ones(1, 1, 32, 48))
    assert list(found) == ["pixel_synthetic", "pixel_real", "perceptual", "contrastive"]
    torch.testing.assert_close({name: found[name] for name in distances}, distances)


@pytest.mark.parametrize("clear", [0.2, 0.6], ids=["another clear image", "all the same"])
def test_gradients_are_finite_where_images_are_flat(clear: float) -> None:
    scene = flat(0.6).requires_grad_()
    losses = Losses(replace(PRETRAIN_WEIGHTS, pixel=0, perceptual=0.2), EXTRACTOR)
    found = losses.compute_pretraining(Restoration(scene, None), flat(clear), flat(0.6))
    torch.stack([*found.values()]).sum().backward()
    assert scene.grad is not None and scene.grad.isfinite().all()
    assert scene.grad.any() == (clear != 0.6)
