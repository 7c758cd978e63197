"""Bands give what the whole image gives, and need no more memory than their features."""

import pytest
import torch

from corun_ray.core.inference.banded import HALO_PX, in_bands
from corun_ray.core.inference.restore import restore
from corun_ray.core.networks.cpmm import Block
from tests.core.inference.test_tiled import network, photograph


@pytest.mark.parametrize(("height", "width"), [(208, 232), (100, 300), (163, 41)])
def test_bands_give_what_the_whole_image_gives(height: int, width: int) -> None:
    net, hazy = network(), photograph(height, width)
    whole, parts = restore(net, hazy), restore(in_bands(net, 12 * width), hazy)
    assert (whole.scene - hazy).abs().mean() > 0.01
    torch.testing.assert_close(parts.scene, whole.scene, rtol=0, atol=2e-5)
    torch.testing.assert_close(parts.transmission, whole.transmission, rtol=0, atol=2e-5)


def test_half_precision_takes_bands_too() -> None:
    net, hazy = network(), photograph(96, 64)
    with torch.autocast("cpu", torch.bfloat16):
        whole, parts = restore(net, hazy), restore(in_bands(net, 16 * 64), hazy)
    assert (parts.scene - whole.scene).abs().mean() < 2e-3


def test_the_margin_is_what_a_block_sees() -> None:
    torch.manual_seed(0)
    block = Block(4, 4).double()
    for module in block.modules():
        if hasattr(module, "fixed_mixing"):
            module.fixed_mixing = torch.randn(1, 4, 4, dtype=torch.double)
    image = torch.rand(1, 4, 64, 8, dtype=torch.double)
    changed = image.clone()
    changed[:, :, 32] += 10
    with torch.no_grad():
        touched = (block(changed) - block(image)).abs().amax((0, 1, 3)).nonzero()
    assert (int(touched.min()), int(touched.max())) == (32 - HALO_PX, 32 + HALO_PX)


def test_the_network_itself_is_left_as_it_was() -> None:
    net, hazy = network(), photograph(64, 64)
    before = restore(net, hazy).scene
    restore(in_bands(net, 8 * 64), hazy)
    assert torch.equal(restore(net, hazy).scene, before)
