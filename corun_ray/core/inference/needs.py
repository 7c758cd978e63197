"""What any network needs to restore an image: memory, found by counting, and margins of a tile, found by trying.

Both come from runs on a small drawn image, so equal networks need the same everywhere, whatever else a machine does.
"""

import itertools
import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from corun_ray.core.networks.corun import as_restoration
from corun_ray.core.networks.spec import PAD_MULTIPLE_PX

COUNTED_SIDE_PX = 64
"""Least side of the first image on which memory is counted; the second has twice the side."""
SMALLEST_TILE_PX = 128
MAX_TRIED_SIDE_PX = 512
"""Side of the largest image on which margins are sought."""
MEMORY_FACTOR = 1.3
"""Memory in use by the counted tensors (NAFNet of 512 px on a CPU: 1.07 to 1.26; not measured on a GPU)."""
ROUNDING = 1e-5
"""Differences of a scene in [0, 1] that are rounding: kernels add up in another order for another size."""
MAX_GLOBAL_MARGIN_PX = 64
"""Widest margin where no margin makes tiles exact."""
SETTLED = 2.0
"""A margin is wide enough if the difference falls no further than by this factor with wider ones."""
FADING = 4.0
"""A difference that falls by this factor over half of the tried distances fades with the distance."""


# --- Sizes ---


def find_grid_px(network: nn.Module) -> int:
    """Return the grid on which tiles of a network must begin and end, in pixels.

    Elsewhere its strides and windows would lie otherwise than on the whole image. Window sizes are those that modules
    of windowed attention have as attributes `window_size` and `split_size`.
    """
    grid_px = getattr(network, "size_multiple_px", PAD_MULTIPLE_PX)
    for module in network.modules():
        for name in ("window_size", "split_size"):
            for side in tree_leaves(getattr(module, name, None)):
                if isinstance(side, int) and side > 0:
                    grid_px = math.lcm(grid_px, side)
    return grid_px


def list_tried_sides(network: nn.Module) -> list[int]:
    """List the sides of the square images on which margins are sought, in pixels; each is twice the one before.

    The first is that of the smallest tile, which must get on by one step of the grid.
    """
    sides = [_round_up_side(network, max(SMALLEST_TILE_PX, 2 * find_grid_px(network)))]
    while len(sides) < 2 or 2 * sides[-1] <= MAX_TRIED_SIDE_PX:
        sides.append(2 * sides[-1])
    return sides


def _round_up_side(network: nn.Module, side_px: int) -> int:
    """Return the least side on the grid that is not below `side_px`, and that the network takes."""
    grid_px = find_grid_px(network)
    return math.ceil(max(side_px, getattr(network, "size_min_px", 0)) / grid_px) * grid_px


# --- Memory ---


@dataclass(frozen=True)
class MemoryNeed:
    """The memory that a network takes beside its weights and its input, by the pixels of an image."""

    pixels: int
    bytes: float
    """Memory for an image of `pixels`."""
    power: float
    """The memory grows with the pixels to this power: 1, or more where all pixels attend to all others."""

    def estimate_bytes(self, pixels: int) -> float:
        """Estimate the memory for an image of so many pixels."""
        return self.bytes * (pixels / self.pixels) ** self.power

    def find_pixels(self, limit_bytes: float) -> int:
        """Return the pixels of the largest image for which the memory is enough."""
        return int(self.pixels * (max(0.0, limit_bytes) / self.bytes) ** (1 / self.power))


_memory_needs: "weakref.WeakKeyDictionary[nn.Module, MemoryNeed]" = weakref.WeakKeyDictionary()
_reaches: "weakref.WeakKeyDictionary[nn.Module, dict[int, Reach]]" = weakref.WeakKeyDictionary()
"""What is known of networks; the reach by the side of the largest image that it may be tried on."""


def measure_memory(network: nn.Module) -> MemoryNeed:
    """Measure the memory that a network takes, once for each network."""
    if network not in _memory_needs:
        side_px = _round_up_side(network, COUNTED_SIDE_PX)
        small, large = (count_bytes(network, _draw_image(network, side)) for side in (side_px, 2 * side_px))

        # The sides differ by 2, the pixels by 4. What does not grow with the pixels counts as if it did.
        power = max(1.0, math.log(large / small, 4))
        _memory_needs[network] = MemoryNeed((2 * side_px) ** 2, MEMORY_FACTOR * large, power)
    return _memory_needs[network]


@torch.no_grad()
def count_bytes(network: nn.Module, image: Tensor) -> int:
    """Count the most bytes of tensors that exist at a time while a network restores an image.

    Neither the weights nor the image count; at the least, there is a scene as large as the image.
    """
    with _LiveTensors([image, *network.parameters(), *network.buffers()]) as tensors:
        network(image)
    return max(tensors.peak_bytes, image.nbytes)


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, as long as they exist."""

    def __init__(self, known: list[Tensor]) -> None:
        """Count nothing yet; the memory of `known` tensors does not count."""
        super().__init__()
        self.peak_bytes = self._bytes = 0
        self._counted = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in results:
            self._count(tensor.untyped_storage())

        # A convolution works on copies of its input and output, in the order of a processor's registers.
        copies = [args[0], *results] if func is torch.ops.aten.convolution.default else []
        self.peak_bytes = max(self.peak_bytes, self._bytes + sum(tensor.nbytes for tensor in copies))
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Count the memory of a tensor until it is freed; views share memory that is counted already."""
        place = storage.data_ptr()
        if place and place not in self._counted:
            self._counted.add(place)
            self._bytes += storage.nbytes()
            weakref.finalize(storage, self._drop, place, storage.nbytes())

    def _drop(self, place: int, size_bytes: int) -> None:
        """Forget memory that has been freed."""
        self._counted.discard(place)
        self._bytes -= size_bytes


# --- Reach ---


@dataclass(frozen=True)
class Reach:
    """How far from an edge of a tile its pixels still differ from those of the whole image."""

    margin_px: int
    """The margin that a tile needs; beyond it, a wider one would change little or nothing."""
    is_exact: bool
    """Whether pixels beyond the margin are those of the whole image, but for rounding."""
    seen_px: int | None
    """Without exact tiles: how far the network sees at least; None: as far as the image goes."""

    def describe(self) -> str:
        """Describe how far the network looks, as the end of a sentence."""
        return "at the whole picture" if self.seen_px is None else f"further than {self.seen_px} px"


def measure_reach(network: nn.Module, max_side_px: int) -> Reach:
    """Measure how far a network looks, on images of at most `max_side_px` a side, once for each network."""
    # The smallest image shows little of what fades; it is for networks that have no memory for larger ones.
    smallest_px, *larger_px = list_tried_sides(network)
    sides = [side for side in larger_px if side <= max_side_px] or [smallest_px]

    known = _reaches.setdefault(network, {})
    if sides[-1] not in known:
        known[sides[-1]] = _find_reach(network, sides)
    return known[sides[-1]]


def _find_reach(network: nn.Module, sides: list[int]) -> Reach:
    """Find a network's reach on larger and larger images, until it is exact or does not fade."""
    for side_px in sides:
        reach = judge_differences(measure_differences(network, side_px))
        if reach.is_exact or reach.seen_px is None:
            break
    return reach


@torch.no_grad()
def measure_differences(network: nn.Module, side_px: int) -> list[float]:
    """Measure by how much a tile differs from the whole image, by the distance from the tile's edge in pixels.

    The tile is the image without its upper and left quarters. Each value is the greatest difference at this distance or
    further away, relative to the scene's values where these exceed 1.
    """
    grid_px = find_grid_px(network)
    cut_px = math.ceil(side_px / 4 / grid_px) * grid_px
    image = _draw_image(network, side_px)

    # TF32 would round a thousand times coarser, and for each size otherwise.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        whole = as_restoration(network(image)).scene
        tile = as_restoration(network(image[..., cut_px:, cut_px:])).scene

    # The greatest difference on each line of pixels that are equally far from the two edges.
    scale = max(1.0, float(whole.abs().amax()))
    differences = ((whole[..., cut_px:, cut_px:] - tile).abs() / scale).amax((0, 1)).float()
    lines = torch.stack(
        [torch.maximum(differences[n, n:].max(), differences[n:, n].max()) for n in range(len(differences))]
    )
    return lines.flip(0).cummax(0).values.flip(0).tolist()


def judge_differences(differences: list[float]) -> Reach:
    """Judge a network's reach by the differences at each distance, none greater than the one before.

    The last quarter of the distances is left for comparison: there are few pixels so far away.
    """
    last = len(differences) * 3 // 4

    # Exact: beyond some distance there is but rounding.
    for margin_px in range(0, last + 1, PAD_MULTIPLE_PX):
        if differences[margin_px] <= ROUNDING:
            return Reach(margin_px, True, None)

    # Otherwise as wide as helps: the rest is that of another picture's sums, which no margin mends.
    margin_px = PAD_MULTIPLE_PX
    while margin_px < MAX_GLOBAL_MARGIN_PX and differences[margin_px] > SETTLED * differences[last]:
        margin_px += PAD_MULTIPLE_PX
    fades = differences[last // 3] > FADING * differences[last]
    return Reach(margin_px, False, last if fades else None)


def _draw_image(network: nn.Module, side_px: int) -> Tensor:
    """Draw an image to try a network on, 1 3 H W in [0, 1], on the network's device.

    It is noise that brightens to the lower right, so that no part has the whole's mean.
    """
    parameter = next(itertools.chain(network.parameters(), network.buffers()), torch.empty(0))
    noise = torch.rand(1, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(0, 1, side_px)
    return (noise / 2 + (ramp + ramp[:, None]) / 4).to(parameter.device)
