"""Run the jobs of a file, one after the other."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from corun_ray.config.jobs import DehazeJob, DepthJob, EvaluateJob, Job, ServeJob, TrainingJob, TuneJob
from corun_ray.config.trials import list_data_examples, list_example_trials
from corun_ray.core.errors import explain_stop
from corun_ray.core.weights import WeightsError
from corun_ray.service.cluster.connect import connect
from corun_ray.service.cluster.paths import make_paths_absolute
from corun_ray.service.cluster.room import refuse_misfits
from corun_ray.service.data.cache import JobCaches
from corun_ray.service.data.inspection import prepare_data
from corun_ray.service.inference.dehaze import run_dehazing
from corun_ray.service.inference.depth import run_depth_estimation
from corun_ray.service.inference.evaluate import run_evaluation
from corun_ray.service.runs.lease import refuse_driven
from corun_ray.service.runs.record import find_last_run
from corun_ray.service.storage import locate
from corun_ray.service.telemetry.console import Console
from corun_ray.service.train.driver import run_training
from corun_ray.service.weights.needed import describe_missing_weights, find_needed_files


def run_jobs(jobs: Sequence[Job], console: Console, folder: Path = Path(), resume: bool = False) -> None:
    """Run a pipeline from a job file in `folder`.

    The first job that fails ends the pipeline. With `resume`, each job resumes where its last run stopped, and work
    that is done is skipped.

    Raises the errors of `run_training`, `run_search`, `run_evaluation`, `run_dehazing`, `run_depth_estimation` and
    `run_serving`.
    """
    jobs = [make_paths_absolute(job) for job in jobs]

    # Report mistakes in the data or weights of any job before the first job starts, and before a cluster is needed.
    for job in jobs:
        for example in list_data_examples(job):
            if isinstance(example, TrainingJob):
                prepare_data(example)
        examples = list_example_trials(job, "coherence", "loss", "train") if isinstance(job, TuneJob) else [job]
        for example in examples:
            _check_weights(example)

    # What another driver is at needs no second one.
    if resume:
        for job in jobs:
            _refuse_driven(job)

    # Connect once, with the needs of all jobs, where one trains. Jobs without training connect themselves once they
    # have their models: mistakes in these are found without Ray.
    if any(isinstance(job, TrainingJob) for job in jobs):
        connect(*(job.whole_cluster for job in jobs))
        refuse_misfits(jobs)

    with closing(JobCaches(jobs)) as caches:
        for job in jobs:
            with explain_stop(lambda: f"job {job.name}: this call has added nothing"):  # noqa: B023  # called within the loop
                _run_job(job, console, folder, resume, caches)


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


def _run_job(job: Job, console: Console, folder: Path, resume: bool, caches: JobCaches) -> None:
    """Run a job by its kind.

    Ray Tune and Ray Serve take seconds to import, so only their jobs do.
    """
    # A search is a training job too, so it comes first.
    if isinstance(job, TuneJob):
        from corun_ray.service.tune.search import run_search

        run_search(job, console, folder, resume)
    elif isinstance(job, TrainingJob):
        run_training(job, console, folder, resume, caches=caches)
    elif isinstance(job, EvaluateJob):
        run_evaluation(job, console)
    elif isinstance(job, DehazeJob):
        run_dehazing(job, console, resume)
    elif isinstance(job, DepthJob):
        run_depth_estimation(job, console, resume)
    elif isinstance(job, ServeJob):
        from corun_ray.service.serve.deployment import run_serving

        run_serving(job, console)
