"""One trial of a search, inside its Tune actor: a whole training job with its own workers, pool and MLflow run."""

import functools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from corun_ray.config.jobs import ColabatorJob, TuneJob
from corun_ray.config.trials import pretraining_of, trial_job
from corun_ray.service.models.tracking import get_tracking_uri, read_last_metrics
from corun_ray.service.models.user_code import UserCode, write_code
from corun_ray.service.runs.record import find_last_run, read_record
from corun_ray.service.storage import Location, locate
from corun_ray.service.telemetry.console import Console
from corun_ray.service.train.driver import run_training

TRIALS = "trials"
"""The folder of a search's run that holds its trials' runs."""


@dataclass(frozen=True)
class TrialPlan:
    """What all trials of a search have in common."""

    job: TuneJob
    run_uri: str
    mlflow_run: str
    """The search's own run, parent of the trials'."""
    code: UserCode


def run_trial(config: Mapping[str, Any], plan: TrialPlan) -> dict[str, Any]:
    """Trains with the values of `config`; returns its last metrics, `step`, and the URI of its `model`.

    A trial that is started again goes on with its run. Raises what `run_training` raises.
    """
    values = {key: value.item() if hasattr(value, "item") else value for key, value in config.items()}
    values |= build_overrides(plan.job, locate(plan.run_uri), tune.get_context().get_trial_name())
    job, steps = trial_job(plan.job, values), plan.job.tune.pretrain_steps
    latest: dict[str, Any] = {}

    def listen(step: int, metrics: Mapping[str, float]) -> None:
        latest.update(metrics, step=step)
        # The last result comes with the model: a trial that is so far must not be stopped any more.
        if plan.job.tune.metric in metrics and step < job.train.steps:
            tune.report(dict(latest))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_code(plan.code, folder)
        train = functools.partial(run_training, console=Console(), folder=folder, resume=True, parent=plan.mlflow_run)
        if steps:
            job = trial_job(plan.job, values | {"network.init": train(pretraining_of(job, steps))})
        model = train(job, listen=listen)
    return _last_metrics(job) | latest | {"step": job.train.steps, "model": model}


def _last_metrics(job: ColabatorJob) -> dict[str, float]:
    """Those of the trial's run: of one that had ended before Tune took note of it, nothing else is heard."""
    run = find_last_run(job)
    assert run is not None
    return read_last_metrics(get_tracking_uri(job), read_record(run).mlflow_run)


def build_overrides(job: TuneJob, run: Location, trial: str) -> dict[str, Any]:
    """Keys of a trial's job that the search decides: its place, and that only the best becomes a registered model."""
    place = run.child(TRIALS).child(trial)
    return {"storage": place.uri, "tracking.uri": get_tracking_uri(job), "tracking.register": None}
