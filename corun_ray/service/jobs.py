"""Run the jobs of a file, one after the other.

Ray's processes take seconds to start, and so do the imports of MLflow and torch. Neither waits for the other, so
nothing here imports these before Ray starts.
"""

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from corun_ray.config.jobs import DehazeJob, DepthJob, EvaluateJob, Job, ServeJob, TrainingJob, TuneJob
from corun_ray.config.trials import list_data_examples, list_example_trials
from corun_ray.core.errors import explain_stop
from corun_ray.core.weights import WeightsError
from corun_ray.service.cluster.compilers import refuse_impossible_compiling
from corun_ray.service.cluster.connect import connect, describe_start
from corun_ray.service.cluster.paths import make_paths_absolute
from corun_ray.service.cluster.room import refuse_misfits
from corun_ray.service.data.cache import JobCaches
from corun_ray.service.data.inspection import prepare_data
from corun_ray.service.data.manifest import Manifest
from corun_ray.service.models.tracking import check_tracking
from corun_ray.service.runs.lease import refuse_driven
from corun_ray.service.runs.record import find_last_run
from corun_ray.service.start_times import timing_phase
from corun_ray.service.storage import locate
from corun_ray.service.telemetry.console import Console
from corun_ray.service.waiting import Meanwhile, try_import
from corun_ray.service.weights.needed import describe_missing_weights, find_needed_files


def run_jobs(jobs: Sequence[Job], console: Console, folder: Path = Path(), resume: bool = False) -> None:
    """Run a pipeline from a job file in `folder`.

    The first job that fails ends the pipeline. With `resume`, each job resumes where its last run stopped, and work
    that is done is skipped.

    Raises the errors of `check_tracking`, `run_training`, `run_search`, `run_evaluation`, `run_dehazing`,
    `run_depth_estimation` and `run_serving`.
    """
    jobs = [make_paths_absolute(job) for job in jobs]

    # Report mistakes in the data or weights of any job before the first job starts, and before a cluster is needed.
    with timing_phase("data and weights of all jobs"):
        manifests = [_check_job(job) for job in jobs]

    # What another driver is at needs no second one.
    if resume:
        for job in jobs:
            _refuse_driven(job)

    # Connect once, with the needs of all jobs, where one trains. Jobs without training connect themselves once they
    # have their models: mistakes in these are found without Ray.
    look_at_mlflow = partial(check_tracking, jobs, console.say)
    if any(isinstance(job, TrainingJob) for job in jobs):
        console.say(f"  looking at MLflow; {describe_start()}")
        with Meanwhile(look_at_mlflow, _import_torch):
            with timing_phase("Ray starts"):
                connect(*(job.whole_cluster for job in jobs))
            # The other thread is at these imports, and nothing else is shown before the header.
            console.say("  loading torch and Ray Train")
        refuse_misfits(jobs)
    else:
        look_at_mlflow()

    with closing(JobCaches(jobs)) as caches:
        for number, job in enumerate(jobs):
            # The data of a later job may change until its turn.
            manifest = manifests[number] if number == 0 else None
            with explain_stop(lambda: f"job {job.name}: this call has added nothing"):  # noqa: B023  # called within the loop
                _run_job(job, console, folder, resume, caches, manifest)


def _import_torch() -> None:
    """Import torch."""
    with timing_phase("imports: torch"):
        try_import("torch")


def _check_job(job: Job) -> Manifest | None:
    """Check a job's data, weights and compiler; return the manifest of a job that trains once.

    Raises the errors of `prepare_data` and `refuse_impossible_compiling`, and `WeightsError`.
    """
    manifest = None
    for example in list_data_examples(job):
        if isinstance(example, TrainingJob):
            manifest = prepare_data(example)

    examples = list_example_trials(job, "coherence", "loss", "train") if isinstance(job, TuneJob) else [job]
    for example in examples:
        _check_weights(example)
    for example in list_example_trials(job, "optim") if isinstance(job, TuneJob) else [job]:
        refuse_impossible_compiling(example)
    return manifest


def _check_weights(job: Job) -> None:
    """Check a job's files of weights.

    Raises `WeightsError`.
    """
    missing = describe_missing_weights(find_needed_files(job))
    if missing:
        raise WeightsError("\n".join(f"{job.name}: {line}" for line in missing))


def _refuse_driven(job: Job) -> None:
    """Refuse to resume a job that another driver is at.

    Raises `RunDriven` and `StorageError`.
    """
    place = None
    if isinstance(job, TrainingJob):
        place = find_last_run(job)
    elif isinstance(job, DehazeJob):
        place = locate(job.dehaze.output)
    elif isinstance(job, DepthJob):
        place = locate(job.depth.output)
    if place is not None:
        refuse_driven(place)


def _run_job(
    job: Job, console: Console, folder: Path, resume: bool, caches: JobCaches, manifest: Manifest | None
) -> None:
    """Run a job by its kind.

    `manifest` is that of a training job whose data was checked a moment ago.

    Each kind is imported by its jobs alone: torch, Ray Data, Ray Tune and Ray Serve take seconds.
    """
    # A search is a training job too, so it comes first.
    if isinstance(job, TuneJob):
        from corun_ray.service.tune.search import run_search

        run_search(job, console, folder, resume)
    elif isinstance(job, TrainingJob):
        with timing_phase("imports: Ray Data, Ray Train"):
            from corun_ray.service.train.driver import run_training

        run_training(job, console, folder, resume, caches=caches, manifest=manifest)
    elif isinstance(job, EvaluateJob):
        from corun_ray.service.inference.evaluate import run_evaluation

        run_evaluation(job, console)
    elif isinstance(job, DehazeJob):
        from corun_ray.service.inference.dehaze import run_dehazing

        run_dehazing(job, console, resume)
    elif isinstance(job, DepthJob):
        from corun_ray.service.inference.depth import run_depth_estimation

        run_depth_estimation(job, console, resume)
    elif isinstance(job, ServeJob):
        from corun_ray.service.serve.deployment import run_serving

        run_serving(job, console)
