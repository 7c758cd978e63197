"""A user's own network, from the folder of the job file."""

from torch import Tensor, nn


class Curve(nn.Module):
    """Brightness, contrast and a 3 x 3 filter: an image to a scene, without a transmission."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.into = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.out = nn.Conv2d(channels, 3, 1)
        self.unused = nn.Linear(2, 2)

    def forward(self, image: Tensor) -> Tensor:
        return image + self.out(self.norm(self.into(image)).relu())
