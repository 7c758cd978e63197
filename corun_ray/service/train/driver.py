"""A pre-training or Colabator job, seen from the driver: prepare, train on Ray, register.

What a training leaves when its last step is done: a report, a model, and a version in the registry."""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.train import Result

from corun_ray.config.jobs import ColabatorJob, TrainingJob
from corun_ray.config.loading import dump_job
from corun_ray.service.cluster import connect as cluster
from corun_ray.service.data.cache import start_cache
from corun_ray.service.data.manifest import Manifest, build_manifest, list_validation_sets
from corun_ray.service.data.stream import plan_phases
from corun_ray.service.errors import JobFailed
from corun_ray.service.models.card import describe_model
from corun_ray.service.models.registry import log_model, register_model
from corun_ray.service.models.sources import Model, load_starting_model
from corun_ray.service.models.tracking import Tracker
from corun_ray.service.pool import snapshots
from corun_ray.service.pool.client import PoolError
from corun_ray.service.pool.keeper import start_pool
from corun_ray.service.report.page import REPORT_FILE
from corun_ray.service.runs.held_out import ValidationLog
from corun_ray.service.runs.record import (
    JOB_FILE,
    POOL_FOLDER,
    RunRecord,
    find_run_to_resume,
    list_checkpoint_steps,
    locate_new_run,
    write_record,
)
from corun_ray.service.storage import Location, StorageError, locate
from corun_ray.service.telemetry.console import Console, duration
from corun_ray.service.telemetry.prometheus import make_job_labels
from corun_ray.service.train.board import start_board
from corun_ray.service.train.coherence import check_scoring
from corun_ray.service.train.follower import Follower, Listener
from corun_ray.service.train.launch import fit
from corun_ray.service.train.plan import WorkerPlan
from corun_ray.service.train.recovery import find_last_step
from corun_ray.service.train.report import build_training_report


@dataclass(frozen=True)
class Session:
    """What a training job has in hand once all that it needs is there."""

    job: TrainingJob
    manifest: Manifest
    model: Model
    """What it starts from."""
    run: Location
    record: RunRecord
    tracker: Tracker
    facts: Mapping[str, str]
    """What it tells at its begin."""


def publish_outcome(session: Session, result: Result, log: ValidationLog) -> str:
    """Writes the report, logs the model and registers it where the job gives a name; returns its URI.

    Raises `StorageError`, and `JobFailed` for a training without a checkpoint.
    """
    job, run, tracker = session.job, session.run, session.tracker
    if result.checkpoint is None:
        raise JobFailed("training ended without a checkpoint")
    saved = Location(result.checkpoint.path, locate(job.storage).filesystem, result.checkpoint.path)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = saved.download(Path(folder))
        report = build_training_report(job, run, checkpoint, session.facts, tracker.read_curves(), log)
        run.child(REPORT_FILE).write(report)
        tracker.log_file(REPORT_FILE, report)
        about = describe_model(job, session.model.spec, session.record.data, run, log)
        model_uri = log_model(tracker.uri, checkpoint, session.model.code, about)
    return model_uri if job.tracking.register is None else register_model(tracker.uri, model_uri, job.tracking.register)


NAMED_BAD_FILES = 10


def prepare(job: TrainingJob, folder: Path) -> tuple[Manifest, Model]:
    """What must be right before any worker starts: data, network and weights. A network's class may lie in `folder`.

    Raises `StorageError`, `ManifestError`, `ModelSourceError`, `WeightsError` and `JobFailed`.
    """
    manifest = build_manifest(job)
    _refuse_too_many(job, manifest, manifest.skipped)
    list_validation_sets(job)
    check_scoring(job)
    return manifest, load_starting_model(job, folder)


def run_training(
    job: TrainingJob,
    console: Console,
    folder: Path,
    resume: bool = False,
    parent: str | None = None,
    listen: Listener | None = None,
) -> str:
    """Runs the job to its end and returns the URI of its model; `folder` is the job file's.

    With `resume`, goes on with the job's last run where its last checkpoint stands; one that has ended is left as it
    is, and without one the job begins. The MLflow run goes below that of id `parent`; `listen` hears of all metrics.

    Raises the errors of `prepare`, `ClusterError`, `TrackingError`,
    `ResumeError` and `JobFailed`.
    """
    started = time.monotonic()
    manifest, model = prepare(job, folder)
    earlier = find_run_to_resume(job, manifest.compute_digest()) if resume else None
    if earlier is not None and (model_uri := _ended(job, *earlier)):
        console.say(f"\n{job.kind} {job.name}: has ended before ({model_uri}, {earlier[0].uri})")
        return model_uri
    place = cluster.connect(job.cluster)
    run = locate_new_run(job) if earlier is None else earlier[0]
    tracker = Tracker(job, run.name, None if earlier is None else earlier[1].mlflow_run, parent)
    record = RunRecord(state="running", mlflow_run=tracker.run_id, data=manifest.compute_digest())
    facts = _header(job, manifest, model, place, run, tracker)
    if resume:
        facts["resume"] = "no earlier run: begins" if earlier is None else "goes on with this run"
    console.header(f"{job.kind} {job.name}", facts)
    succeeded = False
    try:
        model_uri, learnt = _train(Session(job, manifest, model, run, record, tracker, facts), console, listen)
        succeeded = True
    except (JobFailed, PoolError, StorageError) as error:
        raise JobFailed(f"{error}\n{_way_on(run)}") from None
    finally:
        tracker.finish(succeeded)
    places = {"model": model_uri, "run": run.uri, "report": run.child(REPORT_FILE).uri}
    took = duration(time.monotonic() - started)
    next_command = f"corun-ray dehaze PHOTOS OUT --model {model_uri} --tracking {tracker.uri}"
    console.footer("done", {**places, **learnt, "took": took}, [next_command])
    return model_uri


def _train(session: Session, console: Console, listen: Listener | None) -> tuple[str, dict[str, str]]:
    """Runs the workers to the last step; returns the model's URI, and what was learnt on the way."""
    job, run, tracker, record = session.job, session.run, session.tracker, session.record
    run.child(JOB_FILE).write(dump_job(job).encode())
    write_record(run, record)
    tracker.log_file(JOB_FILE, dump_job(job).encode())
    tracker.set_tags({"corun_ray.data": record.data, "corun_ray.kind": job.kind})
    plan = _plan(job, session.manifest, session.model, run)
    try:
        with Follower(job, plan.board, tracker, console, run, listen) as follower:
            result = fit(plan, run, console)
    finally:
        if isinstance(plan.cache, ActorHandle):
            ray.kill(plan.cache)  # processes that wait for other work would hold on to it
    _list_bad_files(job, session.manifest, plan.board, tracker, run)
    if isinstance(job, ColabatorJob):
        # Ray Train deletes old checkpoints after the workers' last sweep.
        snapshots.sweep(
            run.child(POOL_FOLDER), {snapshots.format_name(step) for step in list_checkpoint_steps(run)}, ()
        )
    model_uri = publish_outcome(session, result, follower.validation)
    write_record(run, record.model_copy(update={"state": "finished", "model": model_uri}))
    return model_uri, follower.summary()


def _ended(job: TrainingJob, run: Location, record: RunRecord) -> str | None:
    """The model of a run that has taken all of the job's steps; None where there are some to take."""
    return record.model if job.train.steps <= max(list_checkpoint_steps(run), default=0) else None


def _way_on(run: Location) -> str:
    """What is left of a run that has failed, and how to go on with it."""
    try:
        step = find_last_step(run)
    except StorageError as error:
        return f"the run: {run.uri}, which cannot be looked at now ({error}); --resume goes on with it"
    done = "no checkpoint yet" if step is None else f"its last checkpoint is of step {step}"
    return f"the run: {run.uri}, {done}; --resume goes on with it"


def _plan(job: TrainingJob, manifest: Manifest, model: Model, run: Location) -> WorkerPlan:
    board = start_board()
    board.report_bad.remote(manifest.skipped)
    shards: list[Any] = []
    if isinstance(job, ColabatorJob):
        labels = make_job_labels(job, run.name)
        shards = start_pool(job.pool.shards, run.child(POOL_FOLDER), job.pool.memory_mib, labels)
    return WorkerPlan(
        job=job,
        run_uri=run.uri,
        manifest=ray.put(manifest),
        model=ray.put(model),
        board=board,
        shards=tuple(shards),
        cache=start_cache(job.data.cache_mib, board),
    )


def _header(
    job: TrainingJob, manifest: Manifest, model: Model, place: str, run: Location, tracker: Tracker
) -> dict[str, str]:
    if job.data.paired is not None:
        data = f"{len(manifest.clear)} degraded and clean pairs"
    else:
        depth = "procedural depth" if manifest.depth is None else "depth maps"
        data = f"{len(manifest.clear)} clear with {depth}"
    if manifest.hazy:
        data += f", {len(manifest.hazy)} real hazy"
    if manifest.skipped:
        data += f", {len(manifest.skipped)} set aside"
    size = job.cluster
    device = f"{size.gpus_per_worker:g} GPU" if size.gpus_per_worker else f"{size.cpus_per_worker:g} CPU"
    spans = plan_phases(job)
    batches = " then ".join(str(phase.batch) for phase in spans)
    steps = f"{job.train.steps} steps of {batches} x {size.workers_text} images"
    network = f"{job.network.stages} stages, width {job.network.width}"
    if model.spec.type != "corun":
        network = f"{model.spec.type} " + " ".join(f"{name}={value}" for name, value in model.spec.args.items())
    if job.network.init:
        network += f", from {job.network.init}"
    return {
        "data": data,
        "network": network,
        "training": f"{steps} at {' then '.join(str(phase.patch_px) for phase in spans)} px",
        "workers": f"{size.workers_text} x {device} on {place}",
        "run": run.uri,
        "mlflow": f"{tracker.uri} (experiment {job.tracking.experiment})",
    }


def _refuse_too_many(job: TrainingJob, manifest: Manifest, bad_files: dict[str, str]) -> None:
    """Raises `JobFailed`, naming the first ten, where more images are bad than `data.max_bad_fraction` allows."""
    if len(bad_files) <= job.data.max_bad_fraction * manifest.num_images:
        return
    named = [f"  {uri}: {reason}" for uri, reason in list(bad_files.items())[:NAMED_BAD_FILES]]
    raise JobFailed(
        f"{len(bad_files)} of {manifest.num_images} images cannot be used, more than "
        f"data.max_bad_fraction ({job.data.max_bad_fraction:g}) allows; the first:\n" + "\n".join(named)
    )


def _list_bad_files(job: TrainingJob, manifest: Manifest, board: Any, tracker: Tracker, run: Location) -> None:
    """Keeps the list of unusable files with the run; fails the job where it is too long."""
    bad_files: dict[str, str] = ray.get(board.list_bad_files.remote())
    if bad_files:
        listing = "".join(f"{uri}\t{reason}\n" for uri, reason in sorted(bad_files.items())).encode()
        run.child("bad_files.tsv").write(listing)
        tracker.log_file("bad_files.tsv", listing)
    _refuse_too_many(job, manifest, bad_files)
