"""A network that takes one training worker along, once."""

import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor

from corun_ray.core.networks.corun import CORUN

PATIENCE_S = 60.0


class Mortal(CORUN):
    """CORUN of two stages. At the start of step `last_step`, rank 1 waits until Ray Train has taken note of a
    checkpoint of the run in `storage`, and ends its own process by SIGKILL; it does so once for a `storage`.
    """

    def __init__(self, storage: str, last_step: int) -> None:
        super().__init__(stages=2, width=4)
        self.storage, self.steps_left = Path(storage), last_step

    def forward(self, hazy: Tensor):
        if self.training and torch.is_grad_enabled() and torch.distributed.is_initialized():
            self.steps_left -= 1
            if self.steps_left == 0 and torch.distributed.get_rank() == 1:
                self._die_once()
        return super().forward(hazy)

    def _die_once(self) -> None:
        has_died = self.storage / "has_died"
        if has_died.exists():
            return
        has_died.touch()
        deadline_s = time.monotonic() + PATIENCE_S
        while not any(self.storage.glob("*/checkpoint_manager_snapshot.json")) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
