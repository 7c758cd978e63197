"""A job's runs on storage: finding them, their record, and the checks before a run is resumed."""

import re
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from corun_ray.config.jobs import TrainingJob
from corun_ray.config.loading import JobFileError, load_jobs
from corun_ray.config.reference import flatten
from corun_ray.core.data.samples import SAMPLES_VERSION
from corun_ray.core.errors import UserError
from corun_ray.service.storage import Location, StorageError, locate

RUN_FILE = "run.json"
JOB_FILE = "job.yaml"
POOL_FOLDER = "pool"
CHECKPOINT_NAME = re.compile(r"checkpoint_(\d{8,})")

CHANGEABLE_KEYS = (
    "storage",
    "cluster.",
    "tracking.",
    "pool.shards",
    "pool.memory_mib",
    "train.steps",
    "train.batch_per_worker",
    "train.accumulate",
    "train.log_every",
    "train.checkpoint_every",
    "train.validate_every",
    "train.keep_checkpoints",
    "train.validation_images",
    "train.validation_metrics",
    "train.validation_weights",
    "train.best",
    "coherence.weights",
    "coherence.chunk_images",
    "coherence.share_blocks",
    "loss.weights",
    "network.init",
    "network.checkpoint_activations",
    "data.max_bad_fraction",
    "data.cache_mib",
    "data.validation",
)
"""Starts of the keys that a resumed run may change: hardware, storage and reporting, nothing that affects learning."""

STEP_SIZE_KEYS = ("optim.lr", "optim.min_lr", "optim.cycles", "optim.clip_norm", "optim.precision")
"""Starts of the keys that a resumed run may change and names: a training that has diverged needs smaller steps."""


class ResumeError(UserError):
    """A run that cannot be resumed; the message has one line for each reason."""


class RunRecord(BaseModel):
    """The content of a run's `run.json`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: int = Field(1, ge=1, le=1)
    state: Literal["running", "finished"]
    mlflow_run: str
    data: Annotated[str, Field(description="digest of the manifest")]
    samples: Annotated[int, Field(description="the way that samples are made; 1 where a run does not say")] = 1
    model: str | None = None


# --- Checkpoint folders ---


def name_checkpoint(step: int) -> str:
    """Return the name of a checkpoint's folder in its run."""
    return f"checkpoint_{step:08d}"


def parse_checkpoint_step(name: str) -> int | None:
    """Return the step of a checkpoint's folder, None for another folder."""
    match = CHECKPOINT_NAME.fullmatch(name)
    return int(match[1]) if match else None


def list_checkpoint_steps(run: Location) -> list[int]:
    """List the steps of the run's checkpoint folders, in order.

    Raises `StorageError`.
    """
    steps = []
    for name in run.list_folders():
        step = parse_checkpoint_step(name)
        if step is not None:
            steps.append(step)
    return sorted(steps)


# --- Run folders ---


def locate_new_run(job: TrainingJob) -> Location:
    """Return the folder for a run that begins now."""
    return locate(job.storage).child(f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}")


def find_last_run(job: TrainingJob) -> Location | None:
    """Find the folder of the job's latest run that has a record.

    Raises `StorageError`.
    """
    pattern = re.compile(re.escape(job.name) + r"-\d{8}-\d{6}")
    storage = locate(job.storage)

    # Names end in the time of the start, so the latest run comes first.
    for name in sorted(filter(pattern.fullmatch, storage.list_folders()), reverse=True):
        if storage.child(name).child(RUN_FILE).exists():
            return storage.child(name)
    return None


def find_run_to_resume(job: TrainingJob, digest: str) -> tuple[Location, RunRecord] | None:
    """Find the run that `--resume` continues, with its record.

    None without an earlier run. `digest` is that of the job's manifest.

    Raises `StorageError`, and `ResumeError` where job or data have changed.
    """
    run = find_last_run(job)
    if run is None:
        return None

    # A resumed run must continue to learn from the same data by the same settings.
    record = read_record(run)
    refuse_changes(job, run, record, digest)
    return run, record


def read_record(run: Location) -> RunRecord:
    """Read the record of a run.

    Raises `StorageError`.
    """
    place = run.child(RUN_FILE)
    try:
        return RunRecord.model_validate_json(place.read())
    except ValidationError as error:
        raise StorageError(f"{place.uri} is no run's record: {error.errors()[0]['msg']}") from None


def write_record(run: Location, record: RunRecord) -> None:
    """Replace the record of a run."""
    run.child(RUN_FILE).write(record.model_dump_json(indent=1).encode())


# --- Changes between a run and its resumption ---


def refuse_changes(job: TrainingJob, run: Location, record: RunRecord, digest: str) -> None:
    """Refuse to resume a run with other data or other settings of learning.

    Raises `ResumeError`.
    """
    # A run that has all its steps takes no more.
    before = _read_job(run, job)
    has_more = record.state == "running" or before.train.steps != job.train.steps

    # Settings of learning must be the same, but for the size of the steps to come.
    changeable = CHANGEABLE_KEYS + STEP_SIZE_KEYS if has_more else CHANGEABLE_KEYS
    reasons = []
    for key, (old, new) in _compare_keys(before, job).items():
        if not key.startswith(changeable):
            reasons.append(f"{key}: {new} now, {old} in the run to resume")

    # Workers and the batch of each may change as long as their product, the global batch, stays.
    if not _has_same_batch(before, job):
        now, then = _describe_batch(job), _describe_batch(before)
        reasons.append(f"train.batch_per_worker: {now} workers now, {then} in the run to resume")

    # The sample stream follows from the list of images.
    if record.data != digest:
        reasons.append("data: not the files that the run began with")

    # The same images and random numbers must give the same samples.
    if record.samples != SAMPLES_VERSION and has_more:
        reasons.append("samples: made in another way by the version of corun_ray that the run began with")

    if reasons:
        raise ResumeError("\n".join([f"--resume: {run.uri} cannot be resumed as this job:", *reasons]))


def list_step_size_changes(run: Location, job: TrainingJob) -> list[str]:
    """Describe each changed key of a resumed run that affects the size of its steps: `optim.lr 0.01 -> 0.001`.

    Raises `StorageError`, and `ResumeError` for a run whose job file is invalid now.
    """
    lines = []
    for key, (old, new) in _compare_keys(_read_job(run, job), job).items():
        if key.startswith(STEP_SIZE_KEYS):
            lines.append(f"{key} {old} -> {new}")
    return lines


def _read_job(run: Location, job: TrainingJob) -> TrainingJob:
    """Read the job file that the run began with.

    Raises `ResumeError` for a job file that is invalid now, or of another kind than `job`.
    """
    place = run.child(JOB_FILE)
    with tempfile.TemporaryDirectory() as folder:
        try:
            (before,) = load_jobs(place.download(Path(folder)), env={})
        except JobFileError as error:
            raise ResumeError(f"{place.uri}: {error}") from None

    if not isinstance(before, TrainingJob):
        raise ResumeError(f"{place.uri}: a {before.kind} job, not a {job.kind} job")
    return before


def _compare_keys(before: TrainingJob, job: TrainingJob) -> dict[str, tuple[Any, Any]]:
    """Return the old and the new value of each key that differs, by key."""
    old, new = flatten(before.model_dump(mode="json")), flatten(job.model_dump(mode="json"))
    changed = {}
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            changed[key] = old.get(key), new.get(key)
    return changed


def _has_same_batch(before: TrainingJob, job: TrainingJob) -> bool:
    """Compare the images of an optimizer step over all workers."""
    # With an elastic number of workers, only the batch of one worker can be compared.
    if before.cluster.is_elastic or job.cluster.is_elastic:
        return before.train.images_per_worker == job.train.images_per_worker

    old_images = before.train.images_per_worker * before.cluster.max_workers
    new_images = job.train.images_per_worker * job.cluster.max_workers
    return old_images == new_images


def _describe_batch(job: TrainingJob) -> str:
    """Describe a job's batch: `4 x train.accumulate 2 on 3`."""
    accumulated = f" x train.accumulate {job.train.accumulate}" if job.train.accumulate > 1 else ""
    return f"{job.train.batch_per_worker}{accumulated} on {job.cluster.workers_text}"
