"""Any network in tiles: no seam where its reach allows that, a word where it does not, and memory that decides."""

import pytest
import torch
from torch import Tensor, nn

from corun_ray.core.inference.memory import MIB, SMALL_IMAGE_PX, TooLarge, compute_batch_size, fit_in_memory
from corun_ray.core.inference.needs import Reach, count_bytes, find_grid_px, judge_differences, measure_memory
from corun_ray.core.inference.overlapping import OverlappingTiles, Tiling, find_worse, split_side
from corun_ray.core.inference.restore import restore
from corun_ray.core.networks.spec import compute_padded_size


class Strided(nn.Module):
    """Sees some 30 px far, on a grid of 4 px; with `looks_far`, the mean of all pixels too."""

    def __init__(self, looks_far: bool = False, has_transmission: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.Conv2d(3, 8, 4, 4)
        self.body = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.GELU())])
        self.up = nn.ConvTranspose2d(8, 4, 4, 4)
        self.looks_far, self.has_transmission = looks_far, has_transmission

    def forward(self, hazy: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = self.body(self.down(hazy))
        if self.looks_far:
            features = features + 30 * features.mean((2, 3), keepdim=True)
        output = self.up(features)
        scene = hazy - output[:, :3]
        return (scene, output[:, 3:].sigmoid()) if self.has_transmission else scene


class Square(Strided):
    """Takes square images alone."""

    size_square = True

    def forward(self, hazy: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        assert hazy.shape[2] == hazy.shape[3]
        return super().forward(hazy)


class Windowed(nn.Module):
    """Takes the mean of each window of 12 px, and pads to windows itself."""

    def __init__(self) -> None:
        super().__init__()
        self.window_size = 12
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, hazy: Tensor) -> Tensor:
        height, width = hazy.shape[2:]
        padded = nn.functional.pad(hazy, (0, -width % 12, 0, -height % 12), mode="reflect")
        means = nn.functional.interpolate(nn.functional.avg_pool2d(padded, 12), scale_factor=12)
        return hazy - self.weight * means[..., :height, :width]


def photograph(height: int, width: int, images: int = 1) -> Tensor:
    """Brighter to the lower right, so that no part is like the whole."""
    noise = torch.rand(images, 3, height, width, generator=torch.Generator().manual_seed(1))
    return 0.4 * noise + 0.3 * torch.linspace(0, 1, width) + 0.3 * torch.linspace(0, 1, height)[:, None]


def limit_mib(network: nn.Module, hazy: Tensor, side_px: int) -> int:
    """Return the memory in which an image goes in tiles of about `side_px`."""
    rows, columns = compute_padded_size(network, *hazy.shape[2:])
    images_bytes = hazy.shape[0] * rows * columns * 48
    return round((images_bytes + measure_memory(network).estimate_bytes(side_px**2)) / MIB + 0.5)


@pytest.mark.parametrize(("length", "side_px", "margin_px", "grid_px"), [(4000, 496, 64, 16), (700, 448, 16, 112)])
def test_the_weights_of_all_spans_add_up_to_1(length: int, side_px: int, margin_px: int, grid_px: int) -> None:
    spans = split_side(length, side_px, margin_px, 48, grid_px)
    total = torch.zeros(length)
    for span in spans:
        assert span.start % grid_px == 0
        assert span.stop - span.start <= side_px
        assert span.start == 0 or span.kept.start - span.start >= margin_px
        assert span.stop == length or span.stop - span.kept.stop >= margin_px
        total[span.start : span.stop] += span.weights
    assert len(spans) > 1
    torch.testing.assert_close(total, torch.ones(length))


@pytest.mark.parametrize("network", [Strided(), Strided(has_transmission=True), Square(), Windowed()])
def test_tiles_of_a_network_that_does_not_look_far_give_what_the_whole_gives(network: nn.Module) -> None:
    hazy = photograph(330, 490)
    tiles = fit_in_memory(network, hazy, limit_mib(network, hazy, 176))
    assert isinstance(tiles, OverlappingTiles) and tiles.reach.is_exact
    whole, parts = restore(network, hazy), restore(tiles, hazy)
    if isinstance(network, Square):
        # The whole is padded to another size, which shows beside the padding.
        whole, parts = (type(found)(found.scene[..., :290, :450], None) for found in (whole, parts))

    assert (whole.scene - hazy[..., : whole.scene.shape[2], : whole.scene.shape[3]]).abs().mean() > 0.01
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    assert tiles.tiling is None


def test_tiles_off_the_grid_would_not() -> None:
    """Windows that lie otherwise: what the grid prevents."""
    network, hazy = Windowed(), photograph(330, 490)
    assert find_grid_px(network) == 48
    off = restore(network, hazy[..., 64:, 64:]).scene
    assert (off - restore(network, hazy).scene[..., 64:, 64:])[..., 100:-100, 100:-100].abs().max() > 1e-3


def test_a_network_that_looks_at_the_whole_picture_is_told() -> None:
    network, hazy = Strided(looks_far=True), photograph(330, 490)
    tiles = fit_in_memory(network, hazy, limit_mib(network, hazy, 176))
    assert isinstance(tiles, OverlappingTiles)
    difference = (restore(tiles, hazy).scene - restore(network, hazy).scene).abs().max()

    tiling = tiles.tiling
    assert tiling is not None
    assert 1e-4 < tiling.mean_difference < tiling.max_difference < 5 * difference
    assert tiling.describe("Strided").startswith(
        f"tiles of {tiling.side_px} px: Strided looks at the whole picture, so the result depends on the tiles; "
    )

    # They are blended: from stride to stride, no step is as high as the tiles differ.
    error = nn.functional.avg_pool2d(restore(tiles, hazy).scene - restore(network, hazy).scene, 4)
    assert error.diff(dim=3).abs().max() < 0.5 * tiling.max_difference


def test_the_worse_tiles_are_kept() -> None:
    first, second = Tiling(256, "far", 0.1, 0.01), Tiling(128, "far", 0.2, 0.01)
    assert find_worse(first, second) is find_worse(second, None) is second
    assert find_worse(None, None) is None


@pytest.mark.parametrize(
    ("differences", "reach"),
    [
        ([0.1] * 20 + [1e-7] * 172, Reach(32, is_exact=True, seen_px=None)),
        ([0.1] * 20 + [0.01] * 172, Reach(32, is_exact=False, seen_px=None)),
        ([0.5**n for n in range(16) for _ in range(12)], Reach(64, is_exact=False, seen_px=144)),
    ],
)
def test_a_reach_is_judged_by_the_differences_at_each_distance(differences: list[float], reach: Reach) -> None:
    assert judge_differences(differences) == reach


def test_memory_decides() -> None:
    network = Strided()

    # The scene, what is taken from the haze (four channels), and the convolution's copies.
    px = 128 * 128
    counted = count_bytes(network, torch.rand(1, 3, 128, 128))
    assert (4 + 3) * 4 * px <= counted < 3 * (4 + 3) * 4 * px

    small, large = photograph(256, 256), photograph(330, 490)
    assert fit_in_memory(network, small, 1) is network
    assert fit_in_memory(network, large, 100) is network
    with pytest.raises(TooLarge, match=r"490 x 330 px need \d+ MiB, even in tiles; 2 are allowed"):
        fit_in_memory(network, large, 2)

    # A batch needs as many times the memory, and its images go through tiles one by one.
    assert compute_batch_size(network, 128, SMALL_IMAGE_PX // 128, 1) is None
    image_bytes = measure_memory(network).estimate_bytes(336 * 496) + 336 * 496 * 48
    assert compute_batch_size(network, 330, 490, 100) == 100 * MIB // image_bytes > 2
    both = photograph(330, 490, images=2)
    tiles = fit_in_memory(network, both, limit_mib(network, both, 176))
    assert isinstance(tiles, OverlappingTiles)
    torch.testing.assert_close(restore(tiles, both).scene, restore(network, both).scene, rtol=0, atol=1e-5)


def test_a_wider_margin_than_a_quarter_of_a_tile_is_not_taken() -> None:
    tiles = OverlappingTiles(Strided(looks_far=True), 128, Reach(144, is_exact=True, seen_px=None))
    assert tiles.margin_px == 32
    restore(tiles, photograph(300, 300))
    assert tiles.tiling is not None and tiles.tiling.looks == "further than 32 px"
