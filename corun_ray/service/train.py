"""A pre-training or Colabator job, seen from the driver: prepare, train on Ray, register."""

import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from corun_ray.config import ColabatorJob, TrainingJob
from corun_ray.jobfile import dump_job
from corun_ray.service import cluster
from corun_ray.service.board import start_board
from corun_ray.service.console import Console, duration
from corun_ray.service.follower import Follower
from corun_ray.service.manifest import Manifest, build_manifest, held_out_sets
from corun_ray.service.models import Model, starting_model
from corun_ray.service.phases import phases
from corun_ray.service.pool import start_pool
from corun_ray.service.scoring import check_scoring
from corun_ray.service.storage import Location, locate
from corun_ray.service.tracking import Tracker
from corun_ray.service.worker import WorkerPlan, train_worker

NAMED_BAD_FILES = 10


class JobFailed(Exception):
    """The job ended without its result; the message says why, for a person."""


def prepare(job: TrainingJob, folder: Path) -> tuple[Manifest, Model]:
    """What must be right before any worker starts: data, network and weights. A network's class may lie in `folder`.

    Raises `StorageError`, `ManifestError`, `ModelSourceError`, `WeightsError` and `JobFailed`.
    """
    manifest = build_manifest(job)
    _refuse_too_many(job, manifest, manifest.set_aside)
    held_out_sets(job)
    check_scoring(job)
    return manifest, starting_model(job, folder)


def run_training(job: TrainingJob, console: Console, folder: Path) -> str:
    """Runs the job to its end and returns the URI of its model; `folder` is the job file's.

    Raises the errors of `prepare`, `ClusterError`, `TrackingError` and `JobFailed`.
    """
    started = time.monotonic()
    manifest, model = prepare(job, folder)
    place = cluster.connect(job.cluster)
    run_id = f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = locate(job.storage).child(run_id)
    tracker = Tracker(job, run_id)
    console.header(f"{job.kind} {job.name}", _header(job, manifest, model, place, run, tracker))
    succeeded = False
    try:
        run.child("job.yaml").write(dump_job(job).encode())
        tracker.file("job.yaml", dump_job(job).encode())
        tracker.tags({"corun_ray.data": manifest.digest(), "corun_ray.kind": job.kind})
        board = start_board()
        ray.get(board.report_bad.remote(manifest.set_aside))
        plan = WorkerPlan(
            job=job,
            run_uri=run.uri,
            manifest=ray.put(manifest),
            model=ray.put(model),
            board=board,
            pool=start_pool() if isinstance(job, ColabatorJob) else None,
        )
        with Follower(job, board, tracker, console, run) as follower:
            result = _fit(plan, run_id)
        _list_bad_files(job, manifest, board, tracker, run)
        model_uri = _register(job, model, result, tracker)
        succeeded = True
    finally:
        tracker.finish(succeeded)
    facts = {
        "model": model_uri,
        "run": run.uri,
        **follower.summary(),
        "took": duration(time.monotonic() - started),
    }
    console.footer("done", facts, [f"corun-ray dehaze PHOTOS OUT --model {model_uri} --tracking {tracker.uri}"])
    return model_uri


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
    if manifest.set_aside:
        data += f", {len(manifest.set_aside)} set aside"
    size = job.cluster
    device = f"{size.gpus_per_worker:g} GPU" if size.gpus_per_worker else f"{size.cpus_per_worker:g} CPU"
    spans = phases(job)
    steps = f"{job.train.steps} steps of {' then '.join(str(phase.batch) for phase in spans)} x {size.workers} images"
    network = f"{job.network.stages} stages, width {job.network.width}"
    if model.spec.type != "corun":
        network = f"{model.spec.type} " + " ".join(f"{name}={value}" for name, value in model.spec.args.items())
    if job.network.init:
        network += f", from {job.network.init}"
    return {
        "data": data,
        "network": network,
        "training": f"{steps} at {' then '.join(str(phase.patch_px) for phase in spans)} px",
        "workers": f"{size.workers} x {device} on {place}",
        "run": run.uri,
        "mlflow": f"{tracker.uri} (experiment {job.tracking.experiment})",
    }


def _fit(plan: WorkerPlan, run_id: str) -> Result:
    job, storage = plan.job, locate(plan.job.storage)
    trainer = TorchTrainer(
        functools.partial(train_worker, plan),
        scaling_config=ScalingConfig(
            num_workers=job.cluster.workers,
            use_gpu=job.cluster.gpus_per_worker > 0,
            resources_per_worker={
                "CPU": job.cluster.cpus_per_worker,
                **({"GPU": job.cluster.gpus_per_worker} if job.cluster.gpus_per_worker else {}),
            },
        ),
        run_config=RunConfig(
            name=run_id,
            storage_path=storage.path,
            storage_filesystem=storage.filesystem,
            failure_config=FailureConfig(max_failures=job.cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=job.train.keep_checkpoints),
        ),
    )
    try:
        return trainer.fit()
    except TrainingFailedError as error:
        raise JobFailed(f"training failed; restarts allowed: {job.cluster.max_failures}\n{error}") from None


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
    bad_files: dict[str, str] = ray.get(board.all_bad_files.remote())
    if bad_files:
        listing = "".join(f"{uri}\t{reason}\n" for uri, reason in sorted(bad_files.items())).encode()
        run.child("bad_files.tsv").write(listing)
        tracker.file("bad_files.tsv", listing)
    _refuse_too_many(job, manifest, bad_files)


def _register(job: TrainingJob, model: Model, result: Result, tracker: Tracker) -> str:
    if result.checkpoint is None:
        raise JobFailed("training ended without a checkpoint")
    location = locate(job.storage)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Location(result.checkpoint.path, location.filesystem, result.checkpoint.path)
        return tracker.log_model(checkpoint.download(Path(folder)), model.code, job.tracking.register)
