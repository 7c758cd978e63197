"""The metrics of corun_ray, all declared here, on the Prometheus endpoint that Ray has on every node.

Prometheus shows each as `ray_` and its name here. Ray adds labels of its own (`WorkerId`, `NodeAddress`, `SessionName`
...). Two properties of Ray (2.60) matter to whoever sets a metric:

- a gauge disappears after two report intervals (20 s) unless its process sets it again;
- a counter does not exist before something is added to it. So a value that may stay at zero is a gauge.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.util import metrics

from corun_ray.config.jobs import Job

TRAINING = ("job_name", "kind", "run")
"""Labels of a training. `job_name`, since Prometheus uses the label `job` for its targets and would rename ours."""
RANK = (*TRAINING, "rank")
SHARD = (*TRAINING, "shard")
DEHAZING = ("job_name",)
NO_JOB = dict.fromkeys(TRAINING, "")
"""Values of `TRAINING` for work outside of a job: benchmarks."""
STEP_BOUNDS_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 120.0)
"""Upper bounds of the buckets of `corun_step_seconds`."""


@dataclass(frozen=True)
class Metric:
    """A declared metric and the labels that each of its values has."""

    make: Callable[..., Any]
    name: str
    meaning: str
    labels: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    needs_gpu: bool = False

    @functools.cached_property
    def ray_metric(self) -> Any:
        """Ray's object for the metric, made on first use; one a process."""
        return self.make(self.name, description=self.meaning, tag_keys=self.labels, **self.options)


DECLARED: dict[str, Metric] = {}
"""Every metric by name."""


def _declare(make: Callable[..., Any], name: str, meaning: str, labels: tuple[str, ...], **more: Any) -> Metric:
    """Add a metric to `DECLARED`."""
    DECLARED[name] = Metric(make, name, meaning, labels, **more)
    return DECLARED[name]


_counter = functools.partial(_declare, metrics.Counter)
_gauge = functools.partial(_declare, metrics.Gauge)
_histogram = functools.partial(_declare, metrics.Histogram)

# --- A training worker ---
STEPS = _counter("corun_steps_total", "Optimizer steps that a worker has done.", RANK)
IMAGES = _counter("corun_images_total", "Images of each kind that a worker has trained on.", RANK)
STEP_SECONDS = _histogram(
    "corun_step_seconds",
    "Time of a step, from the wait for its batch to the end of what follows the step, pauses included.",
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
    "Reads of the label pool; ready is yes where the prefetched labels had arrived before the step needed them.",
    (*RANK, "ready"),
)
LABEL_WAIT = _counter("corun_label_wait_seconds_total", "Time that steps waited for prefetched labels.", RANK)
PAUSES = _counter(
    "corun_pause_seconds_total",
    "Time that a worker paused its steps for a validation or for the start of a checkpoint (cause).",
    (*RANK, "cause"),
)
GPU_MEMORY = _gauge(
    "corun_gpu_memory_bytes", "GPU memory that a worker's PyTorch holds; none without a GPU.", RANK, needs_gpu=True
)

# --- Decoding tasks ---
SAMPLES = _counter("corun_samples_total", "Samples that were read, decoded and made.", TRAINING)
SAMPLE_SECONDS = _counter("corun_sample_seconds_total", "Wall time of making samples, one CPU core each.", TRAINING)

# --- A shard of the label pool ---
POOL_LABELS = _gauge("corun_pool_labels", "Labels that a shard has.", SHARD)
POOL_BYTES = _gauge("corun_pool_bytes", "Size of a shard's labels in memory, or spilled by Ray.", SHARD)
POOL_OFFERS = _counter("corun_pool_offers_total", "Candidates offered to a shard.", SHARD)
POOL_WINS = _counter("corun_pool_wins_total", "Candidates that won and became a shard's labels.", SHARD)
POOL_READS = _counter("corun_pool_reads_total", "Labels asked of a shard.", SHARD)
POOL_HITS = _counter("corun_pool_hits_total", "Labels asked of a shard that it had.", SHARD)
POOL_RESTORES = _counter(
    "corun_pool_restores_total", "Restores of a shard: one at each start of the workers and of the shard itself.", SHARD
)

# --- The driver of a training job ---
STEP = _gauge("corun_step", "Steps that the run has done.", TRAINING)
STEPS_PLANNED = _gauge("corun_steps_planned", "Steps that the run is to do in all.", TRAINING)
CHECKPOINT_STEP = _gauge("corun_checkpoint_step", "The step that a crash now would go back to.", TRAINING)
WORKERS = _gauge("corun_workers", "Training workers of the current attempt.", TRAINING)
RESTARTS = _gauge("corun_restarts", "Restarts of the workers since the driver started.", TRAINING)
BAD_IMAGES = _gauge("corun_bad_images", "Images skipped as unusable.", TRAINING)
FAILED_WRITES = _gauge(
    "corun_failed_writes", "Files of the run that could not be written since the driver started.", TRAINING
)
LOSS = _gauge("corun_loss", "Mean of a loss over steps and workers since the last log line.", (*TRAINING, "term"))
LEARNING_RATE = _gauge("corun_learning_rate", "Learning rate of the last step.", TRAINING)
WIN_RATIO = _gauge("corun_win_ratio", "Share of the teacher's candidates that beat the pool's labels.", TRAINING)
TRUST_RATIO = _gauge("corun_trust_ratio", "Mean of the trust maps that weight the losses on real images.", TRAINING)
VALIDATION = _gauge("corun_validation", "Mean of a metric over a validation set.", (*TRAINING, "set", "metric"))

# --- The driver of a dehazing job ---
DEHAZED = _counter(
    "corun_dehazed_images_total", "Images that are done; outcome is written or left_out.", (*DEHAZING, "outcome")
)
DEHAZED_PIXELS = _counter("corun_dehazed_pixels_total", "Pixels of the images that were written.", DEHAZING)


def make_job_labels(job: Job, run: str) -> dict[str, str]:
    """Return the values of `TRAINING` for a job and a run's name."""
    return {"job_name": job.name, "kind": job.kind, "run": run}


class MetricRecorder:
    """Records metrics that share some labels. A call costs some microseconds."""

    def __init__(self, labels: Mapping[str, str], **more: str) -> None:
        self.labels = {**labels, **more}
        self._totals: dict[tuple[str, ...], float] = {}
        """The totals last passed to `advance` or `skip`, by metric and labels."""

    def add(self, metric: Metric, amount: float = 1.0, /, **labels: str) -> None:
        """Add to a counter; an amount of 0 or less adds nothing."""
        if amount > 0:
            metric.ray_metric.inc(amount, {**self.labels, **labels})

    def advance(self, metric: Metric, total: float, /, **labels: str) -> None:
        """Add the growth of a total that is kept elsewhere and starts at 0.

        A total that has shrunk started again: its growth counts from its new value on.
        """
        # Each combination of labels has a total of its own.
        key = (metric.name, *labels.values())
        self.add(metric, total - self._totals.get(key, 0.0), **labels)
        self._totals[key] = total

    def skip(self, metric: Metric, total: float) -> None:
        """Take a total as already counted, by an earlier process."""
        self._totals[metric.name,] = total

    def set(self, metric: Metric, value: float, /, **labels: str) -> None:
        """Set a gauge."""
        metric.ray_metric.set(value, {**self.labels, **labels})

    def observe(self, metric: Metric, value: float, /, **labels: str) -> None:
        """Add a value to a histogram."""
        metric.ray_metric.observe(value, {**self.labels, **labels})
