"""The numbers of one training worker: Prometheus metrics of every step, and means for MLflow."""

import contextlib
import time
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from corun_ray.core.training.steps import StepOutput
from corun_ray.core.training.streams import Columns
from corun_ray.service.pool.client import PoolClient
from corun_ray.service.telemetry import prometheus
from corun_ray.service.telemetry.prometheus import MetricRecorder
from corun_ray.service.train.coherence import TimedCoherence

GPU_MEMORY_EVERY_S = 5.0
"""Shorter than Ray's report interval. Asking PyTorch costs more than all the other metrics."""

COUNTED = ("coherence/block_ratings", "coherence/block_ratings_saved")
"""Metrics that are totals over all workers and steps since their start. All others are means."""


class WorkerTelemetry:
    """Records the Prometheus metrics of one rank's loop, from numbers that are measured anyway."""

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
        self._last_gpu_look_s = -GPU_MEMORY_EVERY_S

    def watch(self, batches: Iterator[Columns]) -> Iterator[Columns]:
        """Yield the batches, and record each as a step.

        A step ends when the next batch is asked for.
        """
        while True:
            # Wait for the batch.
            started_s = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            waited_s = time.perf_counter() - started_s

            # The loop takes the step, then comes back.
            yield batch
            self._record_step(len(batch["index"]), waited_s, time.perf_counter() - started_s)

    @contextlib.contextmanager
    def pause(self, cause: str) -> Iterator[None]:
        """Record the time within as a pause of the steps."""
        started_s = time.perf_counter()
        yield
        self._recorder.add(prometheus.PAUSES, time.perf_counter() - started_s, cause=cause)

    def _record_step(self, num_images: int, waited_s: float, step_s: float) -> None:
        """Record one step and the totals of scorers and pool."""
        recorder = self._recorder
        recorder.add(prometheus.STEPS)
        recorder.add(prometheus.IMAGES, num_images)
        recorder.add(prometheus.DATA_WAIT, waited_s)
        recorder.observe(prometheus.STEP_SECONDS, step_s)

        # Totals that are kept elsewhere.
        if self._coherence is not None:
            for scope, timer in self._coherence.timers.items():
                recorder.advance(prometheus.SCORING, timer.total_s(), scope=scope)
        if self._pool is not None:
            waits = self._pool.waits
            recorder.advance(prometheus.LABEL_READS, waits.ready, ready="yes")
            recorder.advance(prometheus.LABEL_READS, waits.late, ready="no")
            recorder.advance(prometheus.LABEL_WAIT, waits.waited_s)

        # GPU memory, every few seconds.
        now_s = time.monotonic()
        if self._device.type == "cuda" and now_s - self._last_gpu_look_s >= GPU_MEMORY_EVERY_S:
            self._last_gpu_look_s = now_s
            recorder.set(prometheus.GPU_MEMORY, torch.cuda.memory_reserved(self._device))


class Meter:
    """Averages losses and other metrics over the steps between two log lines, and over all workers.

    Sums stay on the device, so that no step waits for a number to reach the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counts = dict.fromkeys(COUNTED, 0.0)
        self._start()

    def _start(self) -> None:
        """Begin a new interval."""
        self._sums: dict[str, Tensor] = {}
        self._num_batches = 0
        self._num_steps = 0
        self._lr = 0.0
        self._since_s = time.perf_counter()

    def end_step(self, lr: float) -> None:
        """Count an optimizer step on the batches added since the last."""
        self._num_steps += 1
        self._lr = lr

    def add(self, output: StepOutput) -> None:
        """Add the losses and label statistics of one batch."""
        values = {f"loss/{name}": loss.detach().float() for name, loss in output.losses.items()}
        values["loss/total"] = torch.stack(list(values.values())).sum()

        # Colabator: the share of candidates that won, mean trust, and block ratings done or saved.
        labels = output.labels
        if labels is not None:
            num_won = sum(labels.from_teacher)
            values["pool/win_rate"] = torch.tensor(num_won / len(labels.from_teacher), device=self._device)
            values["pool/trust"] = labels.trust.mean()
            values[COUNTED[0]] = torch.tensor(float(labels.block_ratings), device=self._device)
            values[COUNTED[1]] = torch.tensor(float(labels.block_ratings_saved), device=self._device)

        for name, value in values.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=self._device)) + value
        self._num_batches += 1

    def reduce(self) -> dict[str, float]:
        """Return means since the last call, and the totals of `COUNTED`.

        They are of all workers. All ranks must call this at once.
        """
        num_workers = dist.get_world_size() if dist.is_initialized() else 1

        # One exchange for all metrics.
        means = torch.stack(list(self._sums.values())) / self._num_batches
        if num_workers > 1:
            dist.all_reduce(means)
            means /= num_workers
        metrics = dict(zip(self._sums, means.tolist(), strict=True))

        # Turn the means of counts back into sums, and add those to the totals.
        for name in self._counts.keys() & metrics.keys():
            self._counts[name] += round(metrics[name] * self._num_batches * num_workers)
            metrics[name] = self._counts[name]

        metrics["optim/lr"] = self._lr
        metrics["rate/steps_per_s"] = self._num_steps / (time.perf_counter() - self._since_s)
        self._start()
        return metrics
