"""A job's runs on storage: which there are, what `--resume` goes on with, and what must not change meanwhile."""

import re
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from corun_ray.config.jobs import TrainingJob
from corun_ray.config.loading import JobFileError, load_jobs
from corun_ray.config.reference import flatten
from corun_ray.core.errors import UserError
from corun_ray.service.storage import Location, StorageError, locate

RUN_FILE = "run.json"
JOB_FILE = "job.yaml"
POOL_FOLDER = "pool"
_CHECKPOINT = re.compile(r"checkpoint_(\d{8,})")

FREE = (
    *("storage", "cluster.", "tracking.", "pool.shards", "pool.memory_mib", "train.steps"),
    *("train.batch_per_worker", "train.accumulate"),
    *("train.log_every", "train.checkpoint_every", "train.validate_every", "train.keep_checkpoints"),
    *("train.validation_images", "coherence.weights", "coherence.chunk_images", "coherence.share_blocks"),
    *("loss.weights", "network.init", "network.checkpoint_activations", "data.max_bad_fraction", "data.cache_mib"),
    "data.validation",
)
"""Keys that a resumed run may change: where and on what it runs and what it shows, not what it learns from."""


class ResumeError(UserError):
    """A run that cannot be gone on with; one line a reason."""


class RunRecord(BaseModel):
    """What a run's folder says of the run."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: int = Field(1, ge=1, le=1)
    state: Literal["running", "finished"]
    mlflow_run: str
    data: Annotated[str, Field(description="digest of the manifest")]
    model: str | None = None


def name_checkpoint(step: int) -> str:
    """The folder of a checkpoint in its run's."""
    return f"checkpoint_{step:08d}"


def parse_checkpoint_step(name: str) -> int | None:
    """The inverse of `name_checkpoint`; None for other folders."""
    match = _CHECKPOINT.fullmatch(name)
    return int(match[1]) if match else None


def list_checkpoint_steps(run: Location) -> list[int]:
    """The steps after which the run has a checkpoint's folder, in order; raises `StorageError`."""
    return sorted(step for name in run.list_folders() if (step := parse_checkpoint_step(name)) is not None)


def locate_new_run(job: TrainingJob) -> Location:
    """The folder of a run that begins now."""
    return locate(job.storage).child(f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}")


def find_last_run(job: TrainingJob) -> Location | None:
    """The folder of the job's latest run that got so far as to say what it is; None if there is none.

    Raises `StorageError`.
    """
    pattern = re.compile(re.escape(job.name) + r"-\d{8}-\d{6}")
    storage = locate(job.storage)
    for name in sorted(filter(pattern.fullmatch, storage.list_folders()), reverse=True):
        if storage.child(name).child(RUN_FILE).exists():
            return storage.child(name)
    return None


def find_run_to_resume(job: TrainingJob, digest: str) -> tuple[Location, RunRecord] | None:
    """The run that `--resume` goes on with, and its record; None where there is none.

    Raises `StorageError`, and `ResumeError` where going on would not continue it.
    """
    run = find_last_run(job)
    if run is None:
        return None
    record = read_record(run)
    refuse_changes(job, run, record, digest)
    return run, record


def read_record(run: Location) -> RunRecord:
    """The record of a run; raises `StorageError`."""
    place = run.child(RUN_FILE)
    try:
        return RunRecord.model_validate_json(place.read())
    except ValidationError as error:
        raise StorageError(f"{place.uri} is no run's record: {error.errors()[0]['msg']}") from None


def write_record(run: Location, record: RunRecord) -> None:
    """Replaces the record of a run."""
    run.child(RUN_FILE).write(record.model_dump_json(indent=1).encode())


def refuse_changes(job: TrainingJob, run: Location, record: RunRecord, digest: str) -> None:
    """Raises `ResumeError` where going on would not continue what the run did so far: other data, other settings."""
    place = run.child(JOB_FILE)
    with tempfile.TemporaryDirectory() as folder:
        try:
            (before,) = load_jobs(place.download(Path(folder)), env={})
        except JobFileError as error:
            raise ResumeError(f"{place.uri}: {error}") from None
    if not isinstance(before, TrainingJob):
        raise ResumeError(f"{place.uri}: a {before.kind} job, not a {job.kind} job")
    old, new = flatten(before.model_dump(mode="json")), flatten(job.model_dump(mode="json"))
    lines = [
        f"{key}: {new.get(key)} now, {old.get(key)} in the run to go on with"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(FREE)
    ]
    if not _same_global_batch(before, job):
        lines.append(
            f"train.batch_per_worker: {_batch_text(job)} workers now, {_batch_text(before)} in the run to go on with"
        )
    if record.data != digest:
        lines.append("data: other files than those that the run began with")
    if lines:
        raise ResumeError("\n".join([f"--resume: {run.uri} cannot go on as this job:", *lines]))


def _same_global_batch(before: TrainingJob, job: TrainingJob) -> bool:
    """Where the number of workers may vary, only the batch of one worker can be compared."""
    if before.cluster.is_elastic or job.cluster.is_elastic:
        return before.train.images_per_worker == job.train.images_per_worker
    sizes = {one.train.images_per_worker * one.cluster.max_workers for one in (before, job)}
    return len(sizes) == 1


def _batch_text(job: TrainingJob) -> str:
    accumulated = f" x train.accumulate {job.train.accumulate}" if job.train.accumulate > 1 else ""
    return f"{job.train.batch_per_worker}{accumulated} on {job.cluster.workers_text}"
