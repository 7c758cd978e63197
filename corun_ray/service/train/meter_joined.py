"""Metrics of the training loop, averaged over the steps between two log lines and over all workers."""

import time

import torch
import torch.distributed as dist
from torch import Tensor

from corun_ray.core.training.steps import StepOutput

COUNTED = ("coherence/block_ratings", "coherence/block_ratings_saved")
"""Metrics that count over all workers and steps since they started, where the others are means."""


class Meter:
    """Sums on the device, so that a step never waits for a number to reach the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counts = dict.fromkeys(COUNTED, 0.0)
        self._start()

    def _start(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._batches = 0
        self._steps = 0
        self._lr = 0.0
        self._since_s = time.perf_counter()

    def end_step(self, lr: float) -> None:
        """Counts one step, which was made at `lr` of the batches added since the last."""
        self._steps += 1
        self._lr = lr

    def add(self, output: StepOutput) -> None:
        """Counts one batch."""
        values = {f"loss/{name}": loss.detach().float() for name, loss in output.losses.items()}
        values["loss/total"] = torch.stack(list(values.values())).sum()
        if output.labels is not None:
            fresh = output.labels.from_teacher
            values["pool/win_rate"] = torch.tensor(sum(fresh) / len(fresh), device=self._device)
            values["pool/trust"] = output.labels.trust.mean()
            for name, count in zip(
                COUNTED, (output.labels.block_ratings, output.labels.block_ratings_saved), strict=True
            ):
                values[name] = torch.tensor(float(count), device=self._device)
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=self._device)) + value
        self._batches += 1

    def reduce(self) -> dict[str, float]:
        """Means since the last call, over all workers, and totals of what is counted; every rank calls it at once."""
        num_workers = dist.get_world_size() if dist.is_initialized() else 1
        totals = torch.stack(list(self._sums.values())) / self._batches
        if num_workers > 1:
            dist.all_reduce(totals)
            totals /= num_workers
        metrics = dict(zip(self._sums, totals.tolist(), strict=True))
        for name in self._counts.keys() & metrics.keys():
            self._counts[name] += round(metrics[name] * self._batches * num_workers)
            metrics[name] = self._counts[name]
        metrics["optim/lr"] = self._lr
        metrics["rate/steps_per_s"] = self._steps / (time.perf_counter() - self._since_s)
        self._start()
        return metrics
