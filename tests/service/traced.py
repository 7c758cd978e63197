"""A network that writes down what it is trained on: a line a forward pass, a digest an image."""

import hashlib
import os

import torch
from torch import Tensor

from corun_ray.core.networks.corun import CORUN


class Traced(CORUN):
    """CORUN of two stages; appends `rank digest digest …` to `trace` whenever it learns from a batch."""

    def __init__(self, trace: str) -> None:
        super().__init__(stages=2, width=4)
        self.trace = trace

    def forward(self, hazy: Tensor):
        if self.training and torch.is_grad_enabled():
            digests = [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:12] for image in hazy.detach()]
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            line = f"{rank} {' '.join(digests)}\n"
            with open(self.trace, "ab", buffering=0) as file:
                os.write(file.fileno(), line.encode())
        return super().forward(hazy)
