"""Tiles give what the whole image gives: no seam, whatever the sizes; and memory decides when there are tiles."""

import pytest
import torch
from torch import nn

from corun_ray.core.inference.banded import BandedCPMM
from corun_ray.core.inference.memory import (
    CPU_BAND_PX,
    TooLarge,
    choose_tile_side_px,
    compute_batch_size,
    estimate_banded_mib,
    estimate_whole_mib,
    fit_in_memory,
)
from corun_ray.core.inference.restore import restore
from corun_ray.core.inference.tiled import HALO_PX, TiledCPMM, in_tiles, split_into_tiles
from corun_ray.core.networks.corun import CORUN
from corun_ray.core.networks.cpmm import CPMM


def network(stages: int = 2, width: int = 4) -> CORUN:
    """One whose CPMMs do something, with attention that depends on the image."""
    torch.manual_seed(0)
    made = CORUN(stages, width).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("mapping.weight"):
            nn.init.normal_(parameter, std=0.05)
        elif name.endswith("rescale"):
            nn.init.constant_(parameter, 5.0)
    return made


def photograph(height: int, width: int) -> torch.Tensor:
    """Brighter to the right, so that no part is like the whole."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, height // 24 + 2, width // 24 + 2, generator=generator)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (0.6 * smooth + 0.4 * torch.linspace(0, 1, width)).clamp(0, 1)


@pytest.mark.parametrize(("height", "width"), [(208, 232), (100, 300), (163, 141)])
def test_tiles_give_what_the_whole_image_gives(height: int, width: int) -> None:
    net, hazy = network(), photograph(height, width)
    whole, parts = restore(net, hazy), restore(in_tiles(net, 2 * HALO_PX + 104), hazy)
    assert (whole.scene - hazy).abs().mean() > 0.01
    torch.testing.assert_close(parts.scene, whole.scene, rtol=0, atol=2e-4)
    torch.testing.assert_close(parts.transmission, whole.transmission, rtol=0, atol=2e-4)


def test_the_attention_is_the_whole_images() -> None:
    """Cut in two and restored apart, the same image comes out differently: what the sums over all tiles prevent."""
    net, hazy = network(), photograph(208, 416)
    whole = restore(net, hazy).scene
    apart = torch.cat([restore(net, half).scene for half in hazy.chunk(2, 3)], 3)
    assert (apart - whole)[..., :100].abs().max() > 3e-3
    torch.testing.assert_close(restore(in_tiles(net, 2 * HALO_PX + 208), hazy).scene, whole, rtol=0, atol=2e-4)


def test_convolutions_see_no_further_than_the_margin() -> None:
    torch.manual_seed(0)
    cpmm = CPMM(1, 4).double().eval()
    for parameter in cpmm.parameters():
        nn.init.normal_(parameter, std=0.3)
    for attention in cpmm.list_attentions():
        channels = attention.proj.out_features
        attention.fixed_mixing = torch.randn(1, channels, channels, dtype=torch.double) / 10
    estimate, partner = (torch.rand(1, channels, 8, 512, dtype=torch.double) for channels in (1, 3))
    with torch.no_grad():
        before = cpmm(estimate, partner)
        seen = 0
        for place in range(256, 264):
            changed = estimate.clone()
            changed[..., place] += 1e6
            touched = (cpmm(changed, partner) - before).abs().amax((0, 1, 2)).nonzero()
            seen = max(seen, place - int(touched.min()), int(touched.max()) - place)
    assert 80 < seen < HALO_PX


def test_the_network_itself_stays_as_it_was() -> None:
    net, hazy = network(), photograph(64, 96)
    before = restore(net, hazy).scene
    restore(in_tiles(net, 2 * HALO_PX + 32), hazy)
    assert torch.equal(restore(net, hazy).scene, before)


@pytest.mark.parametrize(("height", "width", "side"), [(8, 8, 200), (400, 1000, 264), (808, 96, 1000)])
def test_cores_cover_the_image_once(height: int, width: int, side: int) -> None:
    covered = torch.zeros(height, width)
    for tile in split_into_tiles(height, width, side):
        covered[tile.core] += 1
        outer = covered[tile.outer]
        assert max(outer.shape) <= side and outer[tile.inner()].shape == covered[tile.core].shape
    assert (covered == 1).all()


def test_memory_decides_between_whole_and_tiles() -> None:
    net = network(2, 16)
    assert fit_in_memory(net, torch.rand(1, 3, 32, 32), 512) is net
    side = choose_tile_side_px(net, 4000, 6000, 2816)
    assert side % 8 == 0 and 600 < side < 1500
    with pytest.raises(TooLarge, match=r"6000 x 4000 px need \d+ MiB, even in tiles; 512 are allowed"):
        choose_tile_side_px(net, 4000, 6000, 512)
    need = int(str(pytest.raises(TooLarge, choose_tile_side_px, net, 4000, 6000, 512).value).split()[5])
    assert choose_tile_side_px(net, 4000, 6000, need) == 2 * HALO_PX + 64
    assert choose_tile_side_px(net, 4000, 6000, need + 200) > 2 * HALO_PX + 64


def test_whole_comes_before_bands_and_bands_before_tiles() -> None:
    net, hazy = network(2, 8), torch.empty(1, 3, 800, 1000)
    whole, bands = estimate_whole_mib(net, 800, 1000), estimate_banded_mib(net, 800, 1000, CPU_BAND_PX)
    assert whole > 2 * bands
    # On a CPU, large images go in bands even where they would fit whole.
    for memory_mib, kind in ((whole, BandedCPMM), (bands, BandedCPMM), (bands - 1, TiledCPMM)):
        assert type(fit_in_memory(net, hazy, memory_mib).first.dehaze_net) is kind
    small = hazy[..., :200, :200]
    small_mib = estimate_whole_mib(net, 200, 200)
    for memory_mib, kind in ((small_mib, CPMM), (small_mib - 1, BandedCPMM)):
        assert type(fit_in_memory(net, small, memory_mib).first.dehaze_net) is kind


def test_other_networks_take_whole_what_fits() -> None:
    other = nn.Identity()
    assert fit_in_memory(other, torch.rand(1, 3, 2000, 2000), 512) is other


def test_as_many_images_go_together_as_fit_whole() -> None:
    net = network(width=8)
    for memory_mib in (64, 256, 700):
        many = compute_batch_size(net, 128, 208, memory_mib)
        assert many is not None and estimate_whole_mib(net, 128 * many, 208) <= memory_mib < estimate_whole_mib(
            net, 128 * (many + 1), 208
        )
    assert compute_batch_size(net, 4000, 6000, 64) == 1
    assert compute_batch_size(nn.Conv2d(3, 3, 1), 120, 200, 64) is None
