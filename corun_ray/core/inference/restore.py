"""Restoring whole photographs of any size with a trained network.

A network takes images whose sides are multiples of 16 px, unless it has an attribute `size_multiple_px`; it may also
have `size_min_px`, the least side, and `size_square`, whether it takes square images only.
"""

import numpy as np
import torch
from torch import Tensor, nn

from corun_ray.core.networks.corun import Restoration, as_restoration
from corun_ray.core.networks.spec import compute_padded_size

MIN_SIDE_PX = 16


@torch.no_grad()
def restore(network: nn.Module, hazy: Tensor) -> Restoration:
    """The clamped restoration of B 3 H W in [0, 1], any size of at least 16 px; padded by reflection and cropped.

    Raises ValueError for smaller images.
    """
    return _cropped(as_restoration(network(_padded(network, hazy))), hazy)


@torch.no_grad()
def restore_stages(network: nn.Module, hazy: Tensor) -> list[Restoration]:
    """What every stage of an unfolding network makes of `hazy`, as `restore` gives the last one's.

    Raises ValueError for small images, and for a network without stages (without a method `unfold`).
    """
    unfold = getattr(network, "unfold", None)
    if unfold is None:
        raise ValueError(f"{type(network).__name__} has no stages to show; only unfolding networks (corun) have")
    return [_cropped(as_restoration(output), hazy) for output in unfold(_padded(network, hazy))]


class AnySize(nn.Module):
    """A network as a module that takes photographs of any size: `B 3 H W` in [0, 1] → its scene, clamped."""

    def __init__(self, network: nn.Module) -> None:
        """`network` stays within reach under this name, for those who train on."""
        super().__init__()
        self.network = network

    def forward(self, hazy: Tensor) -> Tensor:
        """Raises ValueError for images with a side below 16 px."""
        return restore(self.network, hazy).scene


def _padded(network: nn.Module, hazy: Tensor) -> Tensor:
    height, width = hazy.shape[-2:]
    if min(height, width) < MIN_SIDE_PX:
        raise ValueError(f"an image of {width} x {height} px is too small to restore (at least {MIN_SIDE_PX} px)")
    rows, columns = compute_padded_size(network, height, width)
    if (rows, columns) == (height, width):
        return hazy
    return hazy[..., _reflected(height, rows, hazy.device)[:, None], _reflected(width, columns, hazy.device)]


def _reflected(side: int, padded_side: int, device: torch.device) -> Tensor:
    """Indices into a side extended by reflection, to and fro where the padding is longer than the side."""
    position = torch.arange(padded_side, device=device) % (2 * side - 2)
    return torch.minimum(position, 2 * side - 2 - position)


def _cropped(restoration: Restoration, hazy: Tensor) -> Restoration:
    height, width = hazy.shape[-2:]
    scene, transmission = restoration
    if transmission is not None:
        transmission = transmission[..., :height, :width].float()
    return Restoration(scene[..., :height, :width].float().clamp(0, 1), transmission)


def to_tensor(image: np.ndarray) -> Tensor:
    """uint8 or uint16 H W 3 → 1 3 H W float in [0, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    return pixels.float().div_(np.iinfo(image.dtype).max)


def to_image(scene: Tensor, dtype: type[np.unsignedinteger] = np.uint8) -> np.ndarray:
    """1 C H W in [0, 1] → uint8 (or uint16) H W C, rounded."""
    levels = scene[0].clamp(0, 1).mul_(np.iinfo(dtype).max).round_()
    return levels.permute(1, 2, 0).cpu().numpy().astype(dtype)
