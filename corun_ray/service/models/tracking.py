"""MLflow: a run's params, metrics and pictures. Only the driver talks to it."""

import logging
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corun_ray.config.credentials import REFUSED, holds_credentials, without_credentials
from corun_ray.config.jobs import Job
from corun_ray.config.reference import flatten
from corun_ray.core.errors import UserError
from corun_ray.service.errors import get_first_line

SQLITE = "sqlite:///"


class TrackingError(UserError):
    """MLflow cannot be reached or refuses; the message is one line."""


def get_tracking_uri(job: Job) -> str:
    """The MLflow server of a job: its own, or an SQLite file in its storage folder."""
    return job.tracking.uri or f"{SQLITE}{Path(job.storage).expanduser().absolute()}/mlflow.db"


def connect_to_mlflow(uri: str) -> Any:
    """MLflow, quiet and pointed at `uri`; raises `TrackingError` for one with credentials."""
    if holds_credentials(uri):
        said = without_credentials(uri)
        raise TrackingError(f"{said} {REFUSED} (MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN)")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # A server that is not there should be an error in seconds, not after MLflow's own four minutes of retries.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mlflow")
    if uri.startswith(SQLITE):
        Path(uri.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(uri)
    return mlflow


class Tracker:
    """One MLflow run, from `start` to `finish`."""

    def __init__(self, job: Job, name: str, earlier: str | None = None, parent: str | None = None) -> None:
        """Opens a run called `name`, below the run `parent`, or again the one of MLflow's id `earlier`.

        Raises `TrackingError`.
        """
        self.uri = get_tracking_uri(job)
        self._mlflow = connect_to_mlflow(self.uri)
        try:
            self._mlflow.set_experiment(
                experiment_id=get_or_create_experiment(self._mlflow, self.uri, job.tracking.experiment)
            )
            self._run = self._mlflow.start_run(
                earlier,
                run_name=name,
                tags=None if parent is None else {"mlflow.parentRunId": parent},
                log_system_metrics=False,
            )
            if earlier is None:  # MLflow's params stay what the run began with
                params = flatten(job.model_dump(mode="json"))
                self._mlflow.log_params({key: str(value)[:500] for key, value in params.items()})
        except Exception as error:
            raise TrackingError(
                f"tracking.uri: {self.uri} does not answer as MLflow: {get_first_line(error)}"
            ) from None

    @property
    def run_id(self) -> str:
        """MLflow's own id of the run."""
        return self._run.info.run_id

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs metrics after `step` steps; from any thread."""
        self._mlflow.log_metrics({k: float(v) for k, v in metrics.items()}, step=step, run_id=self.run_id)

    def log_file(self, name: str, content: bytes) -> None:
        """Logs an artifact under `name`, folders included; from any thread."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            parent = str(Path(name).parent) if "/" in name else None
            self._mlflow.log_artifact(str(path), artifact_path=parent, run_id=self.run_id)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the run."""
        self._mlflow.set_tags(dict(tags))

    def read_curves(self) -> dict[str, list[tuple[float, float]]]:
        """Every metric over the steps, as far as it has been logged; a step that was repeated counts as it was last."""
        client = self._mlflow.MlflowClient()
        found = {}
        for name in client.get_run(self.run_id).data.metrics:
            history = sorted(client.get_metric_history(self.run_id, name), key=lambda one: one.timestamp)
            found[name] = sorted({one.step: one.value for one in history}.items())
        return found

    def end_run(self, run_id: str) -> None:
        """Closes another run, whose process was ended before it could."""
        self._mlflow.MlflowClient().set_terminated(run_id, "KILLED")

    def finish(self, succeeded: bool) -> None:
        """Closes the run."""
        self._mlflow.end_run(status="FINISHED" if succeeded else "FAILED")


def get_or_create_experiment(mlflow: Any, uri: str, name: str) -> str:
    """The id of an experiment of the MLflow at `uri`, made where there is none."""
    experiment = mlflow.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    # A server has its own place for artifacts; with an SQLite file they go beside it.
    beside = None
    if uri.startswith(SQLITE):
        beside = Path(uri.removeprefix(SQLITE)).absolute().with_name("mlartifacts").as_uri()
    return mlflow.create_experiment(name, artifact_location=beside)


def read_last_metrics(uri: str, run_id: str) -> dict[str, float]:
    """What a run of the MLflow at `uri` logged last, by metric."""
    return dict(connect_to_mlflow(uri).MlflowClient().get_run(run_id).data.metrics)
