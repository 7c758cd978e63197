"""Restoring whole photographs of any size with a trained network."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corun_ray.core.corun import Restoration

PAD_MULTIPLE_PX = 16
"""The published recipe pads to 16, though 8 would do."""
MIN_SIDE_PX = 16


@torch.no_grad()
def restore(network: nn.Module, hazy: Tensor) -> Restoration:
    """The clamped restoration of B 3 H W in [0, 1], any size of at least 16 px; padded by reflection and cropped.

    Raises ValueError for smaller images.
    """
    height, width = hazy.shape[-2:]
    if min(height, width) < MIN_SIDE_PX:
        raise ValueError(f"an image of {width} x {height} px is too small to restore (at least {MIN_SIDE_PX} px)")
    padded = F.pad(hazy, (0, -width % PAD_MULTIPLE_PX, 0, -height % PAD_MULTIPLE_PX), mode="reflect")
    scene, transmission = network(padded)
    scene, transmission = scene[..., :height, :width].float(), transmission[..., :height, :width].float()
    return Restoration(scene.clamp(0, 1), transmission)


def to_tensor(image: np.ndarray) -> Tensor:
    """uint8 H W 3 → 1 3 H W float in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255


def to_image(scene: Tensor) -> np.ndarray:
    """1 C H W in [0, 1] → uint8 H W C, rounded."""
    return (scene[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
