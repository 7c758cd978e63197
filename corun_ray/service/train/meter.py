"""The metrics of one training worker, told step by step from what is measured anyway."""

import contextlib
import time
from collections.abc import Iterator, Mapping

import torch

from corun_ray.service.data.sample_maker import Batch
from corun_ray.service.pool.client import PoolClient
from corun_ray.service.telemetry import prometheus as telemetry
from corun_ray.service.telemetry.prometheus import Recorder
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
        self._recorder = Recorder(labels, rank=str(rank))
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
