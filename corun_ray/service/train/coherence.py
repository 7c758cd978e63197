"""How long work on a device takes, measured without ever waiting for the device."""

import time
from collections import deque

import torch
from torch import Tensor

from corun_ray.core.scoring.coherence import BlockScores, Coherence, GlobalScores


class Stopwatch:
    """Adds up the seconds between entering and leaving it.

    On CUDA, kernels run later than they are called: the device notes both moments itself, in its own time.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._total_s = 0.0
        self._since_s = 0.0
        self._under_way: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __enter__(self) -> None:
        if self._on_cuda:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._under_way.append(pair)
            pair[0].record()
        else:
            self._since_s = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if self._on_cuda:
            self._under_way[-1][1].record()
        else:
            self._total_s += time.perf_counter() - self._since_s

    def total_s(self) -> float:
        """As far as the device has come."""
        while self._under_way and self._under_way[0][1].query():
            begun, ended = self._under_way.popleft()
            self._total_s += begun.elapsed_time(ended) / 1000
        return self._total_s


class TimedCoherence(Coherence):
    """Scores as another does, and says how long that took, waiting for others included."""

    def __init__(self, plain: Coherence, device: torch.device) -> None:
        super().__init__(plain.clarity, plain.quality, plain.block_px, plain.combine)
        self.plain = plain
        self.watches = {"global": Stopwatch(device), "blocks": Stopwatch(device)}

    def global_scores(self, images: Tensor) -> GlobalScores:
        """See `Coherence`."""
        with self.watches["global"]:
            return self.plain.global_scores(images)

    def block_scores(self, images: Tensor) -> BlockScores:
        """See `Coherence`."""
        with self.watches["blocks"]:
            return self.plain.block_scores(images)
