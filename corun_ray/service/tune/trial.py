"""One trial of a search, in its Tune actor: a whole training job with its own workers, label pool and MLflow run."""

import functools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from corun_ray.config.jobs import ColabatorJob, TuneJob
from corun_ray.config.trials import build_pretraining_job, build_trial_job
from corun_ray.service.models.tracking import get_tracking_uri, read_last_metrics
from corun_ray.service.models.user_code import UserCode, write_code
from corun_ray.service.runs.record import find_last_run, read_record
from corun_ray.service.storage import Location, locate
from corun_ray.service.telemetry.console import Console
from corun_ray.service.train.driver import run_training

TRIALS_FOLDER = "trials"
"""The folder of a search's run that holds the runs of its trials."""


@dataclass(frozen=True)
class TrialPlan:
    """Everything that the trials of a search share."""

    job: TuneJob
    run_uri: str
    mlflow_run: str
    """The search's own MLflow run, parent of those of the trials."""
    code: UserCode


def run_trial(config: Mapping[str, Any], plan: TrialPlan) -> dict[str, Any]:
    """Train with the values that Tune chose.

    `config` maps keys of the job file to values. Returns the last metrics, `step`, and the URI of the `model`. A trial
    that is started again resumes its run. Raises the errors of `run_training`.
    """
    # Samples of ranges are NumPy scalars; the job file takes plain numbers.
    values = {}
    for key, value in config.items():
        values[key] = value.item() if hasattr(value, "item") else value
    values |= build_overrides(plan.job, locate(plan.run_uri), tune.get_context().get_trial_name())
    job = build_trial_job(plan.job, values)

    latest: dict[str, Any] = {}

    def report(step: int, metrics: Mapping[str, float]) -> None:
        """Pass the metrics of a validation on to Tune."""
        latest.update(metrics, step=step)
        # Not at the last step: its metrics come with the model, and until then Tune could stop the trial.
        if plan.job.tune.metric in metrics and step < job.train.steps:
            tune.report(dict(latest))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_code(plan.code, folder)
        train = functools.partial(run_training, console=Console(), folder=folder, resume=True, parent=plan.mlflow_run)

        # Pre-train where the search asks for it, and start the trial from the result.
        if plan.job.tune.pretrain_steps:
            pretrained = train(build_pretraining_job(job, plan.job.tune.pretrain_steps))
            job = build_trial_job(plan.job, {**values, "network.init": pretrained})

        model = train(job, listen=report)

    # A run that had ended before Tune knew of it reports nothing: read its metrics from MLflow.
    return {**_read_last_metrics(job), **latest, "step": job.train.steps, "model": model}


def build_overrides(job: TuneJob, run: Location, trial: str) -> dict[str, Any]:
    """Build the keys that the search sets itself.

    A trial has its own folder, the search's MLflow, and registers no model: only the best model of the search is
    registered.
    """
    folder = run.child(TRIALS_FOLDER).child(trial)
    return {"storage": folder.uri, "tracking.uri": get_tracking_uri(job), "tracking.register": None}


def _read_last_metrics(job: ColabatorJob) -> dict[str, float]:
    """Return the last metrics of a trial's run, from MLflow."""
    run = find_last_run(job)
    assert run is not None
    return read_last_metrics(get_tracking_uri(job), read_record(run).mlflow_run)
