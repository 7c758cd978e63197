"""The metrics of one training worker, told step by step from what is measured anyway.

Metrics of the training loop, averaged over the steps between two log lines and over all workers."""

import contextlib
import time
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from corun_ray.core.training.steps import StepOutput
from corun_ray.service.data.sample_maker import Batch
from corun_ray.service.pool.client import PoolClient
from corun_ray.service.telemetry import prometheus as telemetry
from corun_ray.service.telemetry.prometheus import MetricRecorder
from corun_ray.service.train.coherence import TimedCoherence

GPU_MEMORY_EVERY_S = 5.0
"""Less than Ray's report interval; asking PyTorch costs more than all the rest."""


class WorkerTelemetry:
    """Watches one rank's loop."""

    def __init__(
        self,
        labels: Mapping[str, str],
        rank: int,
        device: torch.device,
        pool: PoolClient | None,
        coherence: TimedCoherence | None,
    ) -> None:
        self._recorder = MetricRecorder(labels, rank=str(rank))
        self._device, self._pool, self._coherence = device, pool, coherence
        self._looked_s = -GPU_MEMORY_EVERY_S

    def watched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, each taken to be one step, which ends when the next is asked for."""
        while True:
            started_s = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            waited_s = time.perf_counter() - started_s
            yield batch
            self._tell(len(batch["index"]), waited_s, time.perf_counter() - started_s)

    @contextlib.contextmanager
    def pause(self, cause: str) -> Iterator[None]:
        """While this lasts, no step goes on."""
        started_s = time.perf_counter()
        yield
        self._recorder.add(telemetry.PAUSES, time.perf_counter() - started_s, cause=cause)

    def _tell(self, num_images: int, waited_s: float, step_s: float) -> None:
        recorder = self._recorder
        recorder.add(telemetry.STEPS)
        recorder.add(telemetry.IMAGES, num_images)
        recorder.add(telemetry.DATA_WAIT, waited_s)
        recorder.observe(telemetry.STEP_SECONDS, step_s)
        if self._coherence is not None:
            for scope, watch in self._coherence.watches.items():
                recorder.advance(telemetry.SCORING, watch.total_s(), scope=scope)
        if self._pool is not None:
            waits = self._pool.waits
            recorder.advance(telemetry.LABEL_READS, waits.ready, ready="yes")
            recorder.advance(telemetry.LABEL_READS, waits.late, ready="no")
            recorder.advance(telemetry.LABEL_WAIT, waits.waited_s)
        now_s = time.monotonic()
        if self._device.type == "cuda" and now_s - self._looked_s >= GPU_MEMORY_EVERY_S:
            self._looked_s = now_s
            recorder.set(telemetry.GPU_MEMORY, torch.cuda.memory_reserved(self._device))


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
