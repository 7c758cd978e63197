"""Metrics of the training loop, averaged over the steps between two log lines and over all workers."""

import time

import torch
import torch.distributed as dist
from torch import Tensor

from corun_ray.core.steps import StepOutput


class Meter:
    """Sums on the device, so that a step never waits for a number to reach the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start()

    def _start(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._lr = 0.0
        self._since_s = time.perf_counter()

    def add(self, output: StepOutput, lr: float) -> None:
        """Counts one step."""
        values = {f"loss/{name}": loss.detach().float() for name, loss in output.losses.items()}
        values["loss/total"] = torch.stack(list(values.values())).sum()
        if output.labels is not None:
            fresh = output.labels.from_teacher
            values["pool/win_rate"] = torch.tensor(sum(fresh) / len(fresh), device=self._device)
            values["pool/trust"] = output.labels.trust.mean()
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=self._device)) + value
        self._steps += 1
        self._lr = lr

    def reduce(self) -> dict[str, float]:
        """Means since the last call, over all workers; every rank calls it at the same step."""
        totals = torch.stack(list(self._sums.values())) / self._steps
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(totals)
            totals /= dist.get_world_size()
        metrics = dict(zip(self._sums, totals.tolist(), strict=True))
        metrics["optim/lr"] = self._lr
        metrics["rate/steps_per_s"] = self._steps / (time.perf_counter() - self._since_s)
        self._start()
        return metrics
