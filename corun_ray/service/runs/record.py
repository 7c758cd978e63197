"""A job's runs on storage: finding them, their record, and the checks before a run is resumed."""

import itertools
import re
import secrets
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

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
    "coherence.gpu",
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
DATA_KEYS = ("data.clear", "data.depth", "data.hazy", "data.paired.hazy", "data.paired.clear")
"""Where the files lie that a run learns from. They may move: what counts is which files they are."""
RUN_NAME = re.compile(r"-(?P<time>\d{8}-\d{6})(?P<utc>Z?)(?P<rest>(-[0-9a-f]+)?)")
"""What follows the job's name in the name of a run. Names without Z, of earlier versions, are in local time."""
TIME_FORMAT = "%Y%m%d-%H%M%S"


class ResumeError(UserError):
    """A run that cannot be resumed; the message has one line for each reason."""


class DataDigest(NamedTuple):
    """Which files a job learns from, wherever they lie."""

    names: str
    """Digest of the names and their pairs."""
    files: str | None = None
    """Digest of the images' names and sizes, and of the names of their depth maps without suffix: a pack holds depth
    maps in another format."""


class RunRecord(BaseModel):
    """The content of a run's `run.json`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: int = Field(1, ge=1, le=1)
    state: Literal["running", "finished"]
    mlflow_run: str
    data: Annotated[str, Field(description="digest of the manifest")]
    samples: Annotated[int, Field(description="the way that samples are made; 1 where a run does not say")] = 1
    files: Annotated[str | None, Field(description="digest of names and sizes; None where a run does not say")] = None
    model: str | None = None
    precision: Annotated[str | None, Field(description="what the workers last chose; None where none did")] = None

    def encode(self) -> bytes:
        """Return the content of the file."""
        return self.model_dump_json(indent=1).encode()


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


def create_run_folder(storage: Location, name: str, now: datetime | None = None) -> Location:
    """Create the folder of a run that begins now, which no other run has or will have.

    Its name ends in the time in UTC. Raises `StorageError`.
    """
    stamp = f"{name}-{now or datetime.now(UTC):{TIME_FORMAT}}Z"

    # An object store knows no folders that only one of two processes can create: chance keeps names apart.
    if not storage.is_local:
        return storage.child(f"{stamp}-{secrets.token_hex(3)}")

    for number in itertools.count(1):
        folder = storage.child(stamp if number == 1 else f"{stamp}-{number}")
        if folder.create_folder():
            return folder
    raise AssertionError("unreachable")


def find_last_run(job: TrainingJob) -> Location | None:
    """Find the folder of the job's latest run that has a record.

    Raises `StorageError`.
    """
    storage = locate(job.storage)
    begun = []
    for name in storage.list_folders():
        time = parse_begin(job.name, name)
        if time is not None:
            begun.append((time, name))

    for _, name in sorted(begun, reverse=True):
        if storage.child(name).child(RUN_FILE).exists():
            return storage.child(name)
    return None


def parse_begin(job_name: str, run_name: str) -> datetime | None:
    """Return when a run of a job began, as the name of its folder tells; None for the name of no such run."""
    match = RUN_NAME.fullmatch(run_name.removeprefix(job_name))
    if not run_name.startswith(job_name) or match is None:
        return None
    try:
        time = datetime.strptime(match["time"], TIME_FORMAT)
    except ValueError:
        return None
    return time.replace(tzinfo=UTC) if match["utc"] else time.astimezone(UTC)


def find_run_to_resume(job: TrainingJob, data: DataDigest) -> tuple[Location, RunRecord] | None:
    """Find the run that `--resume` continues, with its record.

    None without an earlier run. `data` is that of the job's manifest.

    Raises `StorageError`, and `ResumeError` where job or data have changed.
    """
    run = find_last_run(job)
    if run is None:
        return None

    # A resumed run must continue to learn from the same data by the same settings.
    record = read_record(run)
    refuse_changes(job, run, record, data)
    return run, record


def describe_moved_data(job: TrainingJob, run: Location, record: RunRecord) -> str:
    """Describe the data that a resumed run takes from another place now; empty where it takes all from where it did.

    Raises `ResumeError` and `StorageError`.
    """
    moved = list_moved_data(_read_job(run, job), job)
    if not moved:
        return ""
    places = "; ".join(f"{key} was {place}" for key, place in moved.items())
    compared = "names and sizes" if record.files is not None else "names"
    return f"taken from another place, where {compared} are the same: {places}"


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
    run.child(RUN_FILE).write(record.encode())


# --- Changes between a run and its resumption ---


def refuse_changes(job: TrainingJob, run: Location, record: RunRecord, data: DataDigest) -> None:
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
        # `auto` takes any precision, that of a finished run too.
        if key == "optim.precision" and new == "auto":
            continue
        if not key.startswith(changeable) and key not in DATA_KEYS:
            reasons.append(f"{key}: {new} now, {old} in the run to resume")

    # Workers and the batch of each may change as long as their product, the global batch, stays.
    if not _has_same_batch(before, job):
        now, then = _describe_batch(job), _describe_batch(before)
        reasons.append(f"train.batch_per_worker: {now} workers now, {then} in the run to resume")

    # The sample stream follows from the list of images. Elsewhere, files of these names could be other images.
    moved = list_moved_data(before, job)
    has_same_files = record.files is not None and record.files == data.files
    if record.data != data.names and not has_same_files:
        reasons.append("data: not the files that the run began with")
    elif moved and record.files is not None and not has_same_files:
        places = ", ".join(moved)
        reasons.append(f"data: other images of the same names than the run began with ({places} from another place)")

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
    changed: dict[str, tuple[Any, Any]] = {}
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            changed[key] = old.get(key), new.get(key)
    return changed


def list_moved_data(before: TrainingJob, job: TrainingJob) -> dict[str, str]:
    """List the data keys that name another place now, with the place of before."""
    old, new = flatten(before.model_dump(mode="json")), flatten(job.model_dump(mode="json"))
    return {key: str(old[key]) for key in DATA_KEYS if old.get(key) and new.get(key) and old[key] != new[key]}


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
