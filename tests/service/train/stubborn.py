"""A network with a mistake that shows late."""

import torch
from torch import Tensor

from corun_ray.core.networks.corun import CORUN


class Stubborn(CORUN):
    """CORUN of two stages, whose training fails at every step from the `last_step`-th on that a process makes."""

    def __init__(self, last_step: int) -> None:
        super().__init__(stages=2, width=4)
        self.steps_left = last_step

    def forward(self, hazy: Tensor):
        if self.training and torch.is_grad_enabled():
            self.steps_left -= 1
            if self.steps_left <= 0:
                return super().forward(hazy + torch.zeros(1, 3, 5, 5))
        return super().forward(hazy)
