"""Restoring whole photographs of any size with a trained network.

A network takes images whose sides are multiples of 16 px, unless it has an attribute `size_multiple_px`; it may also
have `size_min_px`, the least side, and `size_square`, whether it takes square images only.
"""

import numpy as np
import torch
from torch import Tensor, nn

from corun_ray.core.networks.corun import Restoration, as_restoration
from corun_ray.core.networks.finite import refuse_not_finite
from corun_ray.core.networks.spec import compute_padded_size

MIN_SIDE_PX = 16


@torch.no_grad()
def restore(network: nn.Module, hazy: Tensor) -> Restoration:
    """Restore images of any size, scene clamped.

    `hazy` is B 3 H W in [0, 1]. The image is padded by reflection, and the result is cropped.

    Raises `ValueError` for images with a side below 16 px, and `NotFinite` for a result that is not finite.
    """
    return _crop(as_restoration(network(_pad(network, hazy))), hazy)


@torch.no_grad()
def restore_stages(network: nn.Module, hazy: Tensor) -> list[Restoration]:
    """Restore `hazy` by every stage of an unfolding network.

    The last stage's result is that of `restore`.

    Raises as `restore` does, and `ValueError` for a network without stages (without a method `unfold`).
    """
    unfold = getattr(network, "unfold", None)
    if unfold is None:
        raise ValueError(f"{type(network).__name__} has no stages to show; only unfolding networks (corun) have")
    return [_crop(as_restoration(output), hazy) for output in unfold(_pad(network, hazy))]


class AnySize(nn.Module):
    """A network as a module that takes photographs of any size: `B 3 H W` in [0, 1] → its scene, clamped."""

    def __init__(self, network: nn.Module) -> None:
        """Wrap a network.

        It keeps the name `network` for those who train on.
        """
        super().__init__()
        self.network = network

    def forward(self, hazy: Tensor) -> Tensor:
        """Restore the scene of `hazy`.

        Raises `ValueError` for images with a side below 16 px.
        """
        return restore(self.network, hazy).scene


def _pad(network: nn.Module, hazy: Tensor) -> Tensor:
    """Pad to a size that the network takes.

    Padding is a reflection at the right and at the bottom.

    Raises `ValueError` for images with a side below 16 px.
    """
    height, width = hazy.shape[-2:]
    if min(height, width) < MIN_SIDE_PX:
        raise ValueError(f"an image of {width} x {height} px is too small to restore (at least {MIN_SIDE_PX} px)")

    rows, columns = compute_padded_size(network, height, width)
    if (rows, columns) == (height, width):
        return hazy
    padded = hazy.index_select(-2, _reflect(height, rows, hazy.device))
    return padded.index_select(-1, _reflect(width, columns, hazy.device))


def _reflect(side: int, padded_side: int, device: torch.device) -> Tensor:
    """Return indices into a side that extend it by reflection.

    Indices go to and fro where the padding is longer than the side.
    """
    position = torch.arange(padded_side, device=device)
    # The period is a tensor, since ONNX has no remainder of a number that is not known yet.
    period = torch.full_like(position, 2 * side - 2)
    position = torch.remainder(position, period)
    return torch.minimum(position, period - position)


def _crop(restoration: Restoration, hazy: Tensor) -> Restoration:
    """Crop a restoration to the size of `hazy`.

    Returns float32; the scene is clamped. Raises `NotFinite`.
    """
    height, width = hazy.shape[-2:]
    scene, transmission = restoration

    # Before clamping, which makes a plausible number of infinity.
    scene = scene[..., :height, :width].float()
    refuse_not_finite(scene, "the restored image")
    if transmission is not None:
        transmission = transmission[..., :height, :width].float()
        refuse_not_finite(transmission, "the transmission")
    return Restoration(scene.clamp(0, 1), transmission)


def to_tensor(image: np.ndarray) -> Tensor:
    """Convert an image to a tensor.

    uint8 or uint16 H W 3 → 1 3 H W, float in [0, 1].
    """
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    return pixels.float().div_(np.iinfo(image.dtype).max)


def to_image(scene: Tensor, dtype: type[np.unsignedinteger] = np.uint8) -> np.ndarray:
    """Convert a tensor to an image, rounded.

    1 C H W in [0, 1] → H W C, uint8 or uint16.
    """
    levels = scene[0].clamp(0, 1).mul_(np.iinfo(dtype).max).round_()
    return levels.permute(1, 2, 0).cpu().numpy().astype(dtype)
