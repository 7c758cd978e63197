"""VGG-19 as a measure of how alike two images look: the features that the losses compare.

Source: Simonyan and Zisserman, ICLR 2015; layers and weights as published with CORUN (arXiv 2406.07966).
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from corun_ray.core.weights import WeightsError, read_weights

VGG_FILE = "vgg19-dcbb9e9d.pth"
"""torchvision's published ImageNet weights, under the name at which it offers them."""

LAYER_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
"""What relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1 count for."""

_BLOCKS = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 1))  # width and convolutions; relu5_1 is the last one used


class Vgg19Features(nn.Module):
    """VGG-19 as far as relu5_1, its layers numbered as torchvision numbers those of `features`."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, taps = 3, []
        for block, (width, count) in enumerate(_BLOCKS):
            if block:
                layers.append(nn.MaxPool2d(2))
            taps.append(len(layers) + 1)
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)
        self._taps = frozenset(taps)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The five features of `B 3 H W` images in [0, 1], sides of 16 px and more; as published, not normalised."""
        found = []
        for index, layer in enumerate(self.features):
            images = layer(images)
            if index in self._taps:
                found.append(images)
        return found


def load_vgg19(path: Path) -> Vgg19Features:
    """The frozen network with the weights of torchvision's file (its classifier is left out); raises `WeightsError`."""
    content = read_weights(path)
    # On the meta device no time goes into a random start.
    with torch.device("meta"):
        network = Vgg19Features()
    weights = {}
    for name, expected in network.state_dict().items():
        found = content.get(name) if isinstance(content, dict) else None
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            raise WeightsError(f"{path}: not the weights of VGG-19 (no {name} of shape {tuple(expected.shape)})")
        weights[name] = found.float()
    network.load_state_dict(weights, assign=True)
    return network.requires_grad_(False).eval()
