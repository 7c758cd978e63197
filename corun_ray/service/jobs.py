"""Running the jobs of a file, one after the other."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corun_ray.config import EvaluateJob, Job, TrainingJob, TuneJob
from corun_ray.core.weights import WeightsError
from corun_ray.jobfile import dump_job
from corun_ray.jobtrials import example
from corun_ray.service import cluster
from corun_ray.service.console import Console, duration, table
from corun_ray.service.evaluate import Evaluation, evaluate
from corun_ray.service.manifest import build_manifest
from corun_ray.service.models import fetch_model
from corun_ray.service.scoring import missing_weights, needed_files
from corun_ray.service.storage import Location, locate
from corun_ray.service.tracking import Tracker, tracking_uri
from corun_ray.service.train import run_training

FOLDERS = (
    *("storage", "data.clear", "data.depth", "data.hazy", "data.paired.hazy", "data.paired.clear"),
    *("data.validation.hazy", "data.validation.clear"),
    *("data.validation_sets.*.hazy", "data.validation_sets.*.clear"),
    *("coherence.weights", "loss.weights", "evaluate.hazy", "evaluate.clear"),
)
"""The keys of a job file that name folders or URIs; `*` is every key at its place."""


def run_jobs(jobs: Sequence[Job], console: Console, folder: Path, resume: bool = False) -> None:
    """Runs a pipeline from a job file in `folder`; the first job that fails ends it.

    With `resume`, training jobs go on where their last runs stopped, and those that had ended are passed over.

    Raises what `run_training` and `run_evaluation` raise.
    """
    jobs = [with_absolute_paths(job) for job in jobs]
    for job in map(example, jobs):
        # What is wrong with any job's data or weights should be said before a cluster is asked for anything.
        if isinstance(job, TrainingJob):
            build_manifest(job)
            if lines := missing_weights(needed_files(job)):
                raise WeightsError("\n".join(f"{job.name}: {line}" for line in lines))
    cluster.connect(*(job.whole_cluster for job in jobs))
    for job in jobs:
        if isinstance(job, TuneJob):
            from corun_ray.service.tune import run_search  # Tune takes seconds to import

            run_search(job, console, folder, resume)
        elif isinstance(job, TrainingJob):
            run_training(job, console, folder, resume)
        elif isinstance(job, EvaluateJob):
            run_evaluation(job, console)


def with_absolute_paths(job: Job) -> Job:
    """The job with its folders absolute: workers do not run where the driver does."""
    tree = job.model_dump()
    for path in FOLDERS:
        *names, key = path.split(".")
        for section in _sections(tree, names):
            if section.get(key):
                section[key] = locate(section[key]).uri
    for path, choice in tree.get("tune", {}).get("search", {}).items():
        if path in FOLDERS and isinstance(choice, tuple):
            tree["tune"]["search"][path] = tuple(locate(value).uri for value in choice)
    return type(job).model_validate(tree)


def _sections(tree: dict[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """The sections at a path, none where the job leaves it out."""
    found = [tree]
    for name in names:
        below = [list(section.values()) if name == "*" else [section.get(name)] for section in found]
        found = [section for sections in below for section in sections if section]
    return found


def run_evaluation(job: EvaluateJob, console: Console) -> Evaluation:
    """Measures the job's models; leaves a table and a contact sheet. Raises the errors of `evaluate`."""
    started = time.monotonic()
    models = {name: fetch_model(source, tracking_uri(job)) for name, source in job.evaluate.models.items()}
    place = cluster.connect(job.cluster)
    run_id = f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    run, tracker = locate(job.storage).child(run_id), Tracker(job, run_id)
    facts = {
        "images": job.evaluate.hazy + (f" against {job.evaluate.clear}" if job.evaluate.clear else ", without a truth"),
        "models": ", ".join(f"{name} ({source})" for name, source in job.evaluate.models.items()) or "none",
        "on": place,
        "run": run.uri,
    }
    console.header(f"evaluate {job.name}", facts)
    succeeded = False
    try:
        found = evaluate(job.evaluate, models, lambda done, total: console.progress(done, total, "image"))
        _keep(job, found, run, tracker)
        succeeded = True
    finally:
        tracker.finish(succeeded)
    for line in table(found.means()):
        console.say(f"  {line}")
    for uri, reason in found.bad_files.items():
        console.say(f"  left out: {uri}: {reason}")
    results = {"table": run.child("metrics.csv").uri, "pictures": run.child("contact_sheet.png").uri}
    console.footer("done", {**results, "took": duration(time.monotonic() - started)})
    return found


def _keep(job: EvaluateJob, found: Evaluation, run: Location, tracker: Tracker) -> None:
    files = {
        "job.yaml": dump_job(job).encode(),
        "metrics.csv": found.csv(),
        "contact_sheet.png": found.contact_sheet,
    }
    for name, content in files.items():
        run.child(name).write(content)
        tracker.file(name, content)
    for model, metrics in found.means().items():
        prefix = model.replace(" ", "_")
        tracker.metrics(0, {f"{prefix}/{name}": value for name, value in metrics.items()})
