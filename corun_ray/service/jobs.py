"""Running the jobs of a file, one after the other."""

from collections.abc import Sequence
from pathlib import Path

from corun_ray.config.jobs import DehazeJob, EvaluateJob, Job, ServeJob, TrainingJob, TuneJob
from corun_ray.config.trials import example
from corun_ray.core.weights import WeightsError
from corun_ray.service.cluster import connect as cluster
from corun_ray.service.cluster.paths import make_paths_absolute
from corun_ray.service.data.manifest import build_manifest
from corun_ray.service.inference.dehaze import run_dehazing
from corun_ray.service.inference.evaluate import run_evaluation
from corun_ray.service.telemetry.console import Console
from corun_ray.service.train.driver import run_training
from corun_ray.service.weights.needed import describe_missing_weights, find_needed_files


def run_jobs(jobs: Sequence[Job], console: Console, folder: Path = Path(), resume: bool = False) -> None:
    """Runs a pipeline from a job file in `folder`; the first job that fails ends it.

    With `resume`, jobs go on where their last runs stopped, and what had been done is passed over.

    Raises what `run_training`, `run_search`, `run_evaluation`, `run_dehazing` and `run_serving` raise.
    """
    jobs = [make_paths_absolute(job) for job in jobs]
    for job in map(example, jobs):
        # What is wrong with any job's data or weights should be said before a cluster is asked for anything.
        if isinstance(job, TrainingJob):
            build_manifest(job)
        if lines := describe_missing_weights(find_needed_files(job)):
            raise WeightsError("\n".join(f"{job.name}: {line}" for line in lines))
    if any(isinstance(job, TrainingJob) for job in jobs):
        # The others ask for a cluster when they have their models: what is wrong with those takes no Ray to find out.
        cluster.connect(*(job.whole_cluster for job in jobs))
    for job in jobs:
        if isinstance(job, TuneJob):
            from corun_ray.service.tune.search import run_search  # Tune takes seconds to import

            run_search(job, console, folder, resume)
        elif isinstance(job, TrainingJob):
            run_training(job, console, folder, resume)
        elif isinstance(job, EvaluateJob):
            run_evaluation(job, console)
        elif isinstance(job, DehazeJob):
            run_dehazing(job, console, resume)
        elif isinstance(job, ServeJob):
            from corun_ray.service.serve.deployment import run_serving  # Ray Serve takes seconds to import

            run_serving(job, console)
