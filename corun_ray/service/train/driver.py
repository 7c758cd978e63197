"""A training job, seen from the driver: prepare, train on Ray, report, register the model."""

import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import ray
from ray.actor import ActorProxy
from ray.exceptions import RayError
from ray.train import Result

from corun_ray.config.jobs import ColabatorJob, TrainingJob
from corun_ray.config.loading import dump_job
from corun_ray.core.data.samples import SAMPLES_VERSION
from corun_ray.core.errors import explain_stop
from corun_ray.service.cluster.autoscaling import can_autoscale
from corun_ray.service.cluster.connect import connect
from corun_ray.service.cluster.join import join_cluster
from corun_ray.service.data.actors import start_lasting_actors
from corun_ray.service.data.cache import JobCaches
from corun_ray.service.data.inspection import describe_excess, prepare_data
from corun_ray.service.data.manifest import Manifest
from corun_ray.service.data.stream import plan_phases
from corun_ray.service.errors import JobFailed, format_reason
from corun_ray.service.models.card import describe_model
from corun_ray.service.models.registry import BEST, Registry, has_model, log_model, promote_best, register_model
from corun_ray.service.models.sources import Model, load_starting_model
from corun_ray.service.models.tracking import Tracker, TrackingError, get_tracking_uri, send_unsent
from corun_ray.service.pool import snapshots
from corun_ray.service.pool.client import PoolError
from corun_ray.service.pool.keeper import start_pool
from corun_ray.service.pool.review import read_decisions
from corun_ray.service.pool.shard import PoolShard
from corun_ray.service.report.page import REPORT_FILE
from corun_ray.service.runs.held_out import ValidationLog
from corun_ray.service.runs.lease import STALE_S, Lease, RunTaken, refuse_taken
from corun_ray.service.runs.record import (
    JOB_FILE,
    POOL_FOLDER,
    DataDigest,
    RunRecord,
    create_run_folder,
    describe_moved_data,
    find_run_to_resume,
    list_checkpoint_steps,
    list_step_size_changes,
    name_checkpoint,
    write_record,
)
from corun_ray.service.start_times import timing_phase
from corun_ray.service.storage import Location, StorageError, locate
from corun_ray.service.telemetry.console import Console, format_duration
from corun_ray.service.train.best import BestCheckpoint, find_best_checkpoint
from corun_ray.service.train.board import BoardState, start_board
from corun_ray.service.train.coherence import check_scoring
from corun_ray.service.train.failures import FailedForGood
from corun_ray.service.train.follower import BAD_FILES, Follower, Listener
from corun_ray.service.train.launch import fit
from corun_ray.service.train.plan import WorkerPlan
from corun_ray.service.train.recovery import find_last_step
from corun_ray.service.train.report import build_training_report
from corun_ray.service.train.session import Session
from corun_ray.service.train.stopping import TrainingStop
from corun_ray.service.train.validation import load_measures


def run_training(
    job: TrainingJob,
    console: Console,
    folder: Path,
    resume: bool = False,
    parent: str | None = None,
    listen: Listener | None = None,
    caches: JobCaches | None = None,
    manifest: Manifest | None = None,
) -> str:
    """Run the job to its end and return the URI of its model.

    `folder` is the job file's. With `resume`, the job's last run continues from its last checkpoint; a finished run is
    only reported, and without an earlier run a new one begins. `parent` is the id of the MLflow run above this one;
    `listen` is called with all metrics. `caches` are those of the jobs of its file. `manifest` is what `prepare_data`
    has just returned, if it was called.

    Raises the errors of `prepare`, `ClusterError`, `TrackingError`, `ResumeError` and `JobFailed`.
    """
    started_s = time.monotonic()

    # 1. Check everything that can be checked without a cluster.
    with timing_phase("data, metrics and network of the job"):
        manifest, model = prepare(job, folder, manifest)

    # 2. Find the run to resume, and stop if it has done all steps.
    earlier = find_run_to_resume(job, DataDigest(manifest.compute_digest(), manifest.files)) if resume else None
    if earlier is not None:
        model_uri = _find_finished_model(job, *earlier)
        if model_uri is not None:
            _report_finished_run(job, *earlier, model_uri, console)
            return model_uri

        # A review that cannot be read is found here, not by the workers.
        read_decisions(earlier[0].child(POOL_FOLDER))

    # 3. Connect to Ray and MLflow, and show the job's facts.
    changes = {} if earlier is None else _describe_changes(job, *earlier)
    with explain_stop(lambda: "no run has begun yet" if earlier is None else _describe_rest(earlier[0])):
        # A search has looked for its trials.
        cluster = join_cluster(job, console.say) if parent is None else connect(job.cluster)
    with timing_phase("the run's folder, the run in MLflow"):
        session = _open_session(job, manifest, model, earlier, parent, console, caches or JobCaches())
    facts = _describe_session(session, cluster) | changes
    if resume:
        facts["resume"] = "no earlier run: begins" if earlier is None else "resumes this run"
    console.header(f"{job.kind} {job.name}", facts)

    # 4. Train.
    model_uri, summary = _train_and_close(session, facts, console, listen)

    # 5. Show the result and the next command.
    results = {"model": model_uri, "run": session.run.uri, "report": session.run.child(REPORT_FILE).uri}
    results |= summary
    results["took"] = format_duration(time.monotonic() - started_s)
    next_command = f"corun-ray dehaze PHOTOS OUT --model {model_uri} --tracking {session.tracker.uri}"
    console.footer("done", results, [next_command])
    return model_uri


def prepare(job: TrainingJob, folder: Path, manifest: Manifest | None = None) -> tuple[Manifest, Model]:
    """Check data, weights and network before any worker starts.

    Returns the manifest and the model to start from. A network's own class may lie in `folder`. With a `manifest`, the
    data has been checked.

    Raises `StorageError`, `ManifestError`, `ModelSourceError` and `WeightsError`.
    """
    if manifest is None:
        manifest = prepare_data(job)

    # Metrics and scorers are only tried here; each worker loads its own.
    load_measures(job)
    check_scoring(job)

    return manifest, load_starting_model(job, folder)


def _find_finished_model(job: TrainingJob, run: Location, record: RunRecord) -> str | None:
    """Return a run's model if it has done all of the job's steps, and MLflow has the model.

    Raises `TrackingError`.
    """
    is_finished = job.train.steps <= max(list_checkpoint_steps(run), default=0)
    if not is_finished or record.model is None or not has_model(get_tracking_uri(job), record.model):
        return None
    return record.model


def _report_finished_run(job: TrainingJob, run: Location, record: RunRecord, model_uri: str, console: Console) -> None:
    """Tell that a run has ended before, and send to MLflow what it has kept.

    Raises `TrackingError`, `StorageError`, and `JobFailed` where MLflow does not take it now.
    """
    console.say(f"\n{job.kind} {job.name}: has ended before ({model_uri}, {run.uri})")
    lacking = send_unsent(job, run, record.mlflow_run, console.say)
    if lacking is not None:
        raise JobFailed(f"{lacking}; --resume sends it")


def _open_session(
    job: TrainingJob,
    manifest: Manifest,
    model: Model,
    earlier: tuple[Location, RunRecord] | None,
    parent: str | None,
    console: Console,
    caches: JobCaches,
) -> Session:
    """Open the earlier run, or a new one, in storage and in MLflow, as its driver.

    Raises `TrackingError`, `StorageError`, and `RunDriven` where another driver has the run.
    """
    if earlier is None:
        run, mlflow_run = create_run_folder(locate(job.storage), job.name), None
        lease = Lease.begin(run)
    else:
        run, mlflow_run = earlier[0], earlier[1].mlflow_run
        # A trial of a search begins again by itself, so it waits until the driver before it is known to be dead.
        lease = Lease.take(run, patience_s=0 if parent is None else STALE_S)

    try:
        tracker = Tracker(job, run.name, mlflow_run, parent, run, console.say)
    except BaseException:
        lease.release()
        # Nothing has begun.
        if earlier is None:
            run.delete()
        raise
    record = RunRecord(
        state="running",
        mlflow_run=tracker.run_id,
        data=manifest.compute_digest(),
        files=manifest.files,
        samples=SAMPLES_VERSION,
        precision=None if earlier is None else earlier[1].precision,
    )
    return Session(job, manifest, model, run, tracker, record, lease, caches)


def _train_and_close(
    session: Session, facts: Mapping[str, str], console: Console, listen: Listener | None
) -> tuple[str, dict[str, str]]:
    """Train, and close MLflow's run and the lease, however training ends.

    Returns the model's URI and lines of the footer. A failure says how to resume. A run that another driver has taken
    over is left as it is.

    Raises `JobFailed`.
    """
    succeeded = is_taken = False
    try:
        with explain_stop(lambda: _describe_rest(session.run)):
            model_uri, summary = _train(session, facts, console, listen)
            missing = session.tracker.list_missing()
        succeeded = True
    except RunTaken:
        is_taken = True
        raise
    except (JobFailed, PoolError, StorageError, TrackingError, RayError) as error:
        raise _explain_failure(session, error) from None
    finally:
        if is_taken:
            session.tracker.hand_over()
        else:
            session.tracker.finish(succeeded)
        session.lease.release()
    return model_uri, summary | ({"missing": missing[0]} if missing else {})


def _train(
    session: Session, facts: Mapping[str, str], console: Console, listen: Listener | None
) -> tuple[str, dict[str, str]]:
    """Run the workers to the last step; return model URI and footer lines."""
    # Record the job. The job file comes before the record: a run that has a record can be resumed.
    job_file = dump_job(session.job).encode()
    session.run.child(JOB_FILE).write(job_file)
    write_record(session.run, session.record)
    session.tracker.log_file(JOB_FILE, job_file)
    session.tracker.set_tags({"corun_ray.data": session.record.data, "corun_ray.kind": session.job.kind})

    # Start the actors, then train while the follower passes the board's events on.
    with timing_phase("board, label pool, cache"):
        plan = _start_actors(session)
    console.say("  starting the workers")
    stop = TrainingStop()
    session.lease.call_on_loss(stop.stop)
    try:
        with Follower(session, plan.board, console, listen, stop) as follower:
            result = fit(plan, session.run, console, stop)
    except RunTaken:
        raise
    except JobFailed:
        # Workers find out by themselves that another driver has the run, and fail.
        with suppress(StorageError):
            refuse_taken(session.lease.place)

        # A run that failed tells of its bad files too.
        with suppress(StorageError, RayError):
            _save_bad_files(session, plan.board)
        raise
    finally:
        session.caches.finish_job()

    # What follows writes to the run's folder and deletes there.
    refuse_taken(session.lease.place)

    # Clean up: list the bad files, and delete snapshots of checkpoints that are gone. Ray Train deletes old
    # checkpoints after the workers' last sweep.
    bad_files = _save_bad_files(session, plan.board)
    excess = describe_excess(session.job, session.manifest, bad_files)
    if excess is not None:
        raise FailedForGood(excess)
    if isinstance(session.job, ColabatorJob):
        kept = {snapshots.format_name(step) for step in list_checkpoint_steps(session.run)}
        snapshots.sweep(session.run.child(POOL_FOLDER), kept, ())

    # Publish, and only then mark the run as finished.
    facts = {**facts, "precision": follower.precision or session.job.optim.precision}
    model_uri, best = _publish_outcome(session, facts, result, follower.validation)
    update = {"state": "finished", "model": model_uri, "precision": follower.precision}
    finished = session.record.model_copy(update=update)
    write_record(session.run, finished)
    return model_uri, follower.summarise() | best


def _start_actors(session: Session) -> WorkerPlan:
    """Start board, label pool and cache; return the workers' plan."""
    job = session.job
    if can_autoscale():
        start_lasting_actors()
    board = start_board()
    board.report_bad.remote(session.manifest.skipped)

    shards: list[ActorProxy[PoolShard]] = []
    if isinstance(job, ColabatorJob):
        pool = session.run.child(POOL_FOLDER)
        shards = start_pool(job.pool.shards, pool, job.pool.memory_mib, session.labels)

    return WorkerPlan(
        job=job,
        run_uri=session.run.uri,
        manifest=ray.put(session.manifest),
        model=ray.put(session.model),
        board=board,
        shards=tuple(shards),
        cache=session.caches.start(job, session.manifest.versions, board),
        lease_uri=session.lease.place.uri,
    )


def _publish_outcome(
    session: Session, facts: Mapping[str, str], result: Result, log: ValidationLog
) -> tuple[str, dict[str, str]]:
    """Write the report, log and register the model; return its URI, and the footer's line on the best checkpoint.

    The model is registered only if the job gives a name.

    Raises `StorageError`, and `JobFailed` for a training without a checkpoint.
    """
    job, tracker = session.job, session.tracker
    best = find_best_checkpoint(job.train.best, session.run, log)
    if result.checkpoint is None:
        raise JobFailed("training ended without a checkpoint")
    checkpoint = Location(result.checkpoint.path, locate(job.storage).filesystem, result.checkpoint.path)

    with tempfile.TemporaryDirectory() as name:
        folder = checkpoint.download(Path(name))

        # The report needs the network for the pictures of its stages.
        report = build_training_report(job, session.run, folder, facts, tracker.read_curves(), log, best)
        session.save_file(REPORT_FILE, report)

        # The model is the last checkpoint's teacher, with its card and tags.
        description = describe_model(job, session.model.spec, session.record.data, session.run, log)
        model_uri = log_model(tracker.uri, tracker.run_id, folder, session.model.code, description)

    if job.tracking.register is not None:
        model_uri = register_model(tracker.uri, model_uri, job.tracking.register)
    if job.train.best is None:
        return model_uri, {}
    if best is None:
        # It was asked for: its absence is told.
        lack = "no image has a finite value at every validation of its checkpoints"
        return model_uri, {"best": f"none by {job.train.best}: {lack}"}
    return model_uri, {"best": _publish_best(session, best, model_uri, log)}


def _publish_best(session: Session, best: BestCheckpoint, last_model: str, log: ValidationLog) -> str:
    """Log and register the model of the best checkpoint; return the footer's line.

    `last_model` is the model of the last checkpoint, which may be the best. The alias `best` of the registered model
    moves where no version is better.

    Raises `StorageError`.
    """
    job, tracker = session.job, session.tracker
    tracker.set_tags({"corun_ray.best": best.describe()})

    # The model of the best checkpoint, described by the validations up to its step.
    model_uri = last_model
    if best.step < job.train.steps:
        with tempfile.TemporaryDirectory() as name:
            folder = session.run.child(name_checkpoint(best.step)).download(Path(name))
            description = describe_model(
                job, session.model.spec, session.record.data, session.run, log.until(best.step), best.step
            )
            code, label = session.model.code, f"best_{best.step}"
            model_uri = log_model(tracker.uri, tracker.run_id, folder, code, description, label)
        if job.tracking.register is not None:
            model_uri = register_model(tracker.uri, model_uri, job.tracking.register, is_candidate=False)

    text = f"{best.describe()}: {model_uri}"
    if job.tracking.register is None:
        return text
    registry = Registry(tracker.uri)
    version = registry.find_version(job.tracking.register, model_uri.rpartition("/")[2])
    decision = promote_best(registry, version, best.metric)
    outcome = f"has the alias {BEST}" if decision.moves else f"the alias {BEST} stays"
    return f"{text}, {outcome} ({decision.reason})"


def _explain_failure(session: Session, error: Exception) -> JobFailed:
    """Return the failure of a run: its reason, what MLflow lacks, and how to resume."""
    reason = f"Ray: {format_reason(error)}" if isinstance(error, RayError) else str(error)
    unsent = [f"{line}; --resume sends it" for line in session.tracker.list_missing()]
    rest = _describe_rest(session.run, isinstance(error, FailedForGood))
    return JobFailed("\n".join([reason, *unsent, rest]))


def _describe_rest(run: Location, is_for_good: bool = False) -> str:
    """Describe what is left of a failed run, and how to resume it.

    With `is_for_good`, the run would fail again.
    """
    try:
        step = find_last_step(run)
    except StorageError as error:
        return f"the run: {run.uri}, which cannot be read now ({error}); --resume continues it"

    if step is None:
        return f"the run: {run.uri}, no checkpoint yet"
    condition = "once the cause is mended, " if is_for_good else ""
    return f"the run: {run.uri}, its last checkpoint is of step {step}; {condition}--resume continues it"


# --- The header ---


def _describe_session(session: Session, cluster: str) -> dict[str, str]:
    """Return the facts of the header; `cluster` describes the Ray cluster."""
    job, size = session.job, session.job.cluster
    device = f"{size.gpus_per_worker:g} GPU" if size.gpus_per_worker else f"{size.cpus_per_worker:g} CPU"
    schedule = job.optim.describe_early_end(job.train.steps)
    return {
        "data": _describe_data(job, session.manifest),
        "network": _describe_network(job, session.model),
        "training": _describe_steps(job),
        **({} if schedule is None else {"schedule": schedule}),
        "precision": _describe_precision(job),
        "workers": f"{size.workers_text} x {device} on {cluster}",
        "run": session.run.uri,
        "mlflow": f"{session.tracker.uri} (experiment {job.tracking.experiment})",
    }


def _describe_changes(job: TrainingJob, run: Location, record: RunRecord) -> dict[str, str]:
    """Return the facts in which a resumed job differs from its run: the size of its steps, and where its data lies.

    Raises `StorageError` and `ResumeError`.
    """
    facts = {}
    changes = list_step_size_changes(run, job)
    if changes:
        facts["changed"] = ", ".join(changes)
    moved = describe_moved_data(job, run, record)
    if moved:
        facts["moved"] = moved
    return facts


def _describe_data(job: TrainingJob, manifest: Manifest) -> str:
    """Describe the images: `2061 clear with depth maps, 4322 real hazy, 2 skipped`."""
    if job.data.paired is not None:
        text = f"{len(manifest.clear)} degraded and clean pairs"
    else:
        depth = "procedural depth" if manifest.depth is None else "depth maps"
        text = f"{len(manifest.clear)} clear with {depth}"

    if manifest.hazy:
        text += f", {len(manifest.hazy)} real hazy"
    if manifest.skipped:
        text += f", {len(manifest.skipped)} skipped"
    if manifest.passed_over:
        text += f", passed over: {', '.join(manifest.passed_over.values())}"
    return text


def _describe_network(job: TrainingJob, model: Model) -> str:
    """Describe the network: `4 stages, width 64, from models:/corun@champion`."""
    if model.spec.type == "corun":
        text = f"{job.network.stages} stages, width {job.network.width}"
    else:
        arguments = [f"{name}={value}" for name, value in model.spec.args.items()]
        text = f"{model.spec.type} {' '.join(arguments)}"

    if job.network.init:
        text += f", from {job.network.init}"
    return text


def _describe_steps(job: TrainingJob) -> str:
    """Describe steps, batches and patches.

    `100 steps of 8 then 4 x 2 images at 64 then 128 px`.
    """
    spans = plan_phases(job)
    batches = " then ".join(str(phase.batch) for phase in spans)
    patches = " then ".join(str(phase.patch_px) for phase in spans)
    return f"{job.train.steps} steps of {batches} x {job.cluster.workers_text} images at {patches} px"


def _describe_precision(job: TrainingJob) -> str:
    """Describe what was asked for: only the workers know their processors."""
    text = "auto: the workers choose by their processors" if job.optim.precision == "auto" else job.optim.precision
    return f"{text}; compiled" if job.optim.compile else text


# --- Bad files ---


def _save_bad_files(session: Session, board: ActorProxy[BoardState]) -> dict[str, str]:
    """Save the list of bad files with the run; return URI → reason.

    Raises `StorageError`.
    """
    bad_files = ray.get(board.list_bad_files.remote())
    if bad_files:
        rows = [f"{uri}\t{reason}\n" for uri, reason in sorted(bad_files.items())]
        session.save_file(BAD_FILES, "".join(rows).encode())
    return bad_files
