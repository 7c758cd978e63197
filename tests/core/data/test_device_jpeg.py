"""JPEG by torch beside OpenCV's encoder and decoder, and its tables beside Pillow's."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from corun_ray.core.data import augment
from corun_ray.core.data.device_jpeg import apply_jpeg, compute_quantisation
from tests.core.data.test_samples_plain import photograph

PLACES = [(150, 0, 0), (131, 5, 11), (96, 32, 48), (97, 3, 2), (33, 15, 0), (8, 9, 9)]
"""Side of a region, and where it begins in its image."""


def compute_psnr(image: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((image.astype(float) - other) ** 2), 1e-9)))


def stack(regions: list[np.ndarray], padding: float) -> torch.Tensor:
    """Regions at the top left of images that are otherwise of one level."""
    side_px = max(len(region) for region in regions)
    images = torch.full((len(regions), 3, side_px, side_px), padding)
    for image, region in zip(images, regions, strict=True):
        image[:, : len(region), : len(region)] = torch.from_numpy(region.copy()).permute(2, 0, 1)
    return images


@pytest.mark.parametrize("quality", [30, 50, 75, 95])
def test_regions_of_any_size_and_place_come_out_as_from_the_encoder(quality):
    photo = photograph(300, 400)
    regions = [photo[top : top + side, left : left + side] for side, top, left in PLACES]
    sides, tops, lefts = torch.tensor(PLACES).T
    qualities = torch.full_like(sides, quality)
    ours, others = (apply_jpeg(stack(regions, level), sides, tops, lefts, qualities) for level in (0.0, 255.0))

    for index, (side, top, left) in enumerate(PLACES):
        made, other = (images[index, :, :side, :side].permute(1, 2, 0).numpy() for images in (ours, others))
        assert np.array_equal(made, other), "what lies beyond a region has no effect on it"
        assert np.array_equal(made, made.round()) and made.min() >= 0 and made.max() <= 255
        encoded = augment.apply_jpeg(np.ascontiguousarray(regions[index]), quality, top_px=top, left_px=left)
        # As near to the encoder's as nothing else: JPEG itself takes 36 to 46 dB.
        assert compute_psnr(made, encoded) > 46, (side, top, left)
        assert compute_psnr(made, encoded) > compute_psnr(regions[index], encoded) + 5


def test_colours_that_change_in_single_pixels_bleed_as_from_the_encoder():
    """Chroma has half the resolution; halving and doubling it show where colours change and luma hardly does."""
    rng = np.random.default_rng(0)
    region = np.where(rng.random((64, 64, 1)) < 0.5, [200, 60, 60], [20, 120, 200]).astype(np.uint8)
    sides, tops, lefts, qualities = torch.tensor([[64], [0], [0], [90]])
    made = apply_jpeg(stack([region], 0.0), sides, tops, lefts, qualities)[0].permute(1, 2, 0).numpy()
    encoded = augment.apply_jpeg(region, 90)
    assert compute_psnr(region, encoded) < 20 and compute_psnr(made, encoded) > 40


def test_quantisation_is_that_of_pillow():
    for quality in (1, 10, 30, 49, 50, 51, 77, 95, 100):
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, "jpeg", quality=quality)
        tables = Image.open(file).quantization
        for ours, theirs in zip(compute_quantisation(torch.tensor([quality])), tables.values(), strict=True):
            assert ours.flatten().tolist() == list(theirs), quality
