"""Our own metrics, all of them declared here, on the Prometheus endpoint that Ray has on every node.

Prometheus shows each as `ray_` and its name here, with labels of Ray's (`WorkerId`, `NodeAddress`, `SessionName` ...)
beside its own. Two habits of Ray's (2.60) matter to whoever sets one: a gauge that its process does not set again is
gone after two of Ray's report intervals (20 s), and a counter that nothing was added to does not exist. So what may
stay at zero is a gauge.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.util import metrics

from corun_ray.config.jobs import Job

TRAINING = ("job_name", "kind", "run")
"""A job, its kind, and its run's name. Plain `job` would be renamed: Prometheus calls its targets by that."""
RANK = (*TRAINING, "rank")
SHARD = (*TRAINING, "shard")
DEHAZING = ("job_name",)
NO_JOB = dict.fromkeys(TRAINING, "")
"""The labels of what runs for no job: benchmarks."""
STEP_BOUNDS_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 120.0)


@dataclass(frozen=True)
class Metric:
    """A declared metric and the labels that every value of it has."""

    make: Callable[..., Any]
    name: str
    meaning: str
    labels: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    needs_gpu: bool = False

    @functools.cached_property
    def recorded(self) -> Any:
        """Ray's own object, one a process."""
        return self.make(self.name, description=self.meaning, tag_keys=self.labels, **self.options)


DECLARED: dict[str, Metric] = {}
"""Every metric by its name."""


def _declare(make: Callable[..., Any], name: str, meaning: str, labels: tuple[str, ...], **more: Any) -> Metric:
    DECLARED[name] = Metric(make, name, meaning, labels, **more)
    return DECLARED[name]


_counter = functools.partial(_declare, metrics.Counter)
_gauge = functools.partial(_declare, metrics.Gauge)
_histogram = functools.partial(_declare, metrics.Histogram)

# A training worker.
STEPS = _counter("corun_steps_total", "Training steps that a worker has done.", RANK)
IMAGES = _counter("corun_images_total", "Images of each kind that a worker has trained on.", RANK)
STEP_SECONDS = _histogram(
    "corun_step_seconds",
    "From the wait for a step's batch to the end of what followed the step, pauses included.",
    RANK,
    options={"boundaries": STEP_BOUNDS_S},
)
DATA_WAIT = _counter("corun_data_wait_seconds_total", "Time that a worker waited for its next batch.", RANK)
SCORING = _counter(
    "corun_scoring_seconds_total",
    "Time that rating the teacher's candidates took on the device; scope is global (whole images) or blocks.",
    (*RANK, "scope"),
)
LABEL_READS = _counter(
    "corun_label_reads_total",
    "Reads of the label pool; ready is yes where the prefetched labels were there when the step asked for them.",
    (*RANK, "ready"),
)
LABEL_WAIT = _counter("corun_label_wait_seconds_total", "Time that steps waited for prefetched labels.", RANK)
PAUSES = _counter(
    "corun_pause_seconds_total",
    "Time that a worker's steps stood still for a validation or for the beginning of a checkpoint (cause).",
    (*RANK, "cause"),
)
GPU_MEMORY = _gauge(
    "corun_gpu_memory_bytes", "GPU memory that a worker's PyTorch holds; none without a GPU.", RANK, needs_gpu=True
)

# Decoding tasks.
SAMPLES = _counter("corun_samples_total", "Samples that were read, decoded and made.", TRAINING)
SAMPLE_SECONDS = _counter("corun_sample_seconds_total", "Processor core time, by the clock, of making them.", TRAINING)

# A shard of the label pool.
POOL_LABELS = _gauge("corun_pool_labels", "Labels that a shard has.", SHARD)
POOL_BYTES = _gauge("corun_pool_bytes", "Labels that a shard has in memory (or spilled by Ray).", SHARD)
POOL_OFFERS = _counter("corun_pool_offers_total", "Labels that were offered to a shard.", SHARD)
POOL_WINS = _counter("corun_pool_wins_total", "Offers that a shard took.", SHARD)
POOL_READS = _counter("corun_pool_reads_total", "Labels that a shard was asked for.", SHARD)
POOL_HITS = _counter("corun_pool_hits_total", "Labels that a shard was asked for and had.", SHARD)
POOL_RESTORES = _counter(
    "corun_pool_restores_total", "Times that a shard was restored: at each start of the workers, or of itself.", SHARD
)

# The driver of a training job.
STEP = _gauge("corun_step", "Steps that the run has done.", TRAINING)
STEPS_PLANNED = _gauge("corun_steps_planned", "Steps that the run will have done at its end.", TRAINING)
CHECKPOINT_STEP = _gauge("corun_checkpoint_step", "The step that a crash now would go back to.", TRAINING)
WORKERS = _gauge("corun_workers", "Training workers of the present start.", TRAINING)
RESTARTS = _gauge("corun_restarts", "Times that the workers began again since the driver started.", TRAINING)
BAD_IMAGES = _gauge("corun_bad_images", "Images set aside as unusable.", TRAINING)
FAILED_WRITES = _gauge(
    "corun_failed_writes", "Files of the run that could not be written since the driver started.", TRAINING
)
LOSS = _gauge("corun_loss", "Mean of a loss over steps and workers since the last log line.", (*TRAINING, "term"))
LEARNING_RATE = _gauge("corun_learning_rate", "Learning rate of the last step.", TRAINING)
WIN_RATIO = _gauge("corun_win_ratio", "Share of the teacher's candidates that beat the pool's labels.", TRAINING)
TRUST_RATIO = _gauge("corun_trust_ratio", "Mean of the trust maps that weight the losses on real images.", TRAINING)
VALIDATION = _gauge("corun_validation", "Mean of a metric over a set of held-out images.", (*TRAINING, "set", "metric"))

# The driver of a dehazing job.
DEHAZED = _counter(
    "corun_dehazed_images_total", "Images that are done; outcome is written or left_out.", (*DEHAZING, "outcome")
)
DEHAZED_PIXELS = _counter("corun_dehazed_pixels_total", "Pixels of the images that were written.", DEHAZING)


def make_job_labels(job: Job, run: str) -> dict[str, str]:
    """The values of `TRAINING` for a job and the name of its run."""
    return {"job_name": job.name, "kind": job.kind, "run": run}


class MetricRecorder:
    """Records metrics with the labels that all of them share here; a call costs some microseconds."""

    def __init__(self, labels: Mapping[str, str], **more: str) -> None:
        self.labels = {**labels, **more}
        self._totals: dict[tuple[str, ...], float] = {}

    def add(self, metric: Metric, amount: float = 1.0, /, **labels: str) -> None:
        """Adds to a counter; nothing to do for nothing."""
        if amount > 0:
            metric.recorded.inc(amount, {**self.labels, **labels})

    def advance(self, metric: Metric, total: float, /, **labels: str) -> None:
        """Adds to a counter what a total, kept elsewhere from 0, has grown by; one that has shrunk begins anew."""
        key = (metric.name, *labels.values())
        self.add(metric, total - self._totals.get(key, 0.0), **labels)
        self._totals[key] = total

    def skip(self, metric: Metric, total: float) -> None:
        """Takes a total as counted: it comes from an earlier process."""
        self._totals[metric.name,] = total

    def set(self, metric: Metric, value: float, /, **labels: str) -> None:
        """Sets a gauge."""
        metric.recorded.set(value, {**self.labels, **labels})

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        """Adds a value to a histogram."""
        metric.recorded.observe(value, {**self.labels, **labels})
