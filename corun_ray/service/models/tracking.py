"""MLflow tracking: a run's params, metrics and pictures. Only the driver talks to MLflow."""

import logging
import os
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from corun_ray.config.credentials import REFUSED, holds_credentials, mask_credentials
from corun_ray.config.jobs import Job
from corun_ray.config.reference import flatten
from corun_ray.core.errors import UserError
from corun_ray.service.errors import format_reason
from corun_ray.service.proxies import reach_loopback_directly
from corun_ray.service.storage import expand_home
from corun_ray.service.trust import share_ca_file

SQLITE = "sqlite:///"
MAX_PARAM_CHARACTERS = 500
"""Longer values of params are cut: older MLflow servers refuse them."""
ENVIRONMENT = {
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # An absent server becomes an error after seconds; MLflow's default retries for four minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
}
"""Read by MLflow at import. A user's own values have precedence."""


class TrackingError(UserError):
    """MLflow cannot be reached or refuses a request; the message is one line."""


def get_tracking_uri(job: Job) -> str:
    """Return the URI of the job's MLflow.

    The default is an SQLite file in the job's storage folder.
    """
    if job.tracking.uri:
        return job.tracking.uri
    return f"{SQLITE}{expand_home(job.storage).absolute()}/mlflow.db"


def connect_to_mlflow(uri: str) -> Any:
    """Import MLflow and point it at `uri`; return the module.

    Raises `TrackingError` where the URI holds credentials.
    """
    if holds_credentials(uri):
        shown = mask_credentials(uri)
        raise TrackingError(f"{shown} {REFUSED} (MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN)")

    reach_loopback_directly()
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    share_ca_file()
    import mlflow

    # Failures are raised as errors; warnings would only clutter the job's output.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mlflow")

    # SQLite makes the file, but not its folder.
    if uri.startswith(SQLITE):
        _make_folder(Path(uri.removeprefix(SQLITE)).parent)
    mlflow.set_tracking_uri(uri)
    return mlflow


def _make_folder(folder: Path) -> None:
    """Make the folder of an SQLite file.

    Raises `TrackingError`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise TrackingError(
            f"cannot make {folder.absolute()} for MLflow's database: {reason}; give another place "
            "(tracking.uri, --tracking or MLFLOW_TRACKING_URI)"
        ) from None


class Tracker:
    """One MLflow run: the constructor opens the run, `finish` closes it."""

    def __init__(self, job: Job, name: str, earlier: str | None = None, parent: str | None = None) -> None:
        """Open a new run, or reopen the run `earlier`.

        A new run is called `name` and lies below the run `parent`.
        `earlier` and `parent` are MLflow's run ids. Raises `TrackingError`.
        """
        self.uri = get_tracking_uri(job)
        self._mlflow = connect_to_mlflow(self.uri)

        try:
            experiment_id = get_or_create_experiment(self._mlflow, self.uri, job.tracking.experiment)
            self._mlflow.set_experiment(experiment_id=experiment_id)
            self._run = self._mlflow.start_run(
                earlier,
                run_name=name,
                tags=None if parent is None else {"mlflow.parentRunId": parent},
                log_system_metrics=False,
            )
            # MLflow refuses to change a param: a resumed run keeps the params of its first start.
            if earlier is None:
                self._log_params(job)
        except Exception as error:
            raise TrackingError(
                f"tracking.uri: {self.uri} does not answer as MLflow: {format_reason(error, self.uri)}"
            ) from None

    def _log_params(self, job: Job) -> None:
        """Log every key of the job file as a param."""
        params = flatten(job.model_dump(mode="json"))
        self._mlflow.log_params({key: str(value)[:MAX_PARAM_CHARACTERS] for key, value in params.items()})

    @property
    def run_id(self) -> str:
        """MLflow's own id of the run."""
        return self._run.info.run_id

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics after `step` steps, from any thread."""
        values = {name: float(value) for name, value in metrics.items()}
        self._mlflow.log_metrics(values, step=step, run_id=self.run_id)

    def log_file(self, name: str, content: bytes) -> None:
        """Log an artifact under the path `name`, from any thread."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

            parent = str(Path(name).parent) if "/" in name else None
            self._mlflow.log_artifact(str(path), artifact_path=parent, run_id=self.run_id)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._mlflow.set_tags(dict(tags))

    def read_curves(self) -> dict[str, list[tuple[float, float]]]:
        """Return every logged metric as (step, value) pairs.

        After a restart a step may have been logged twice: the latest value counts.
        """
        client = self._mlflow.MlflowClient()
        curves = {}
        for name in client.get_run(self.run_id).data.metrics:
            history = sorted(client.get_metric_history(self.run_id, name), key=lambda entry: entry.timestamp)
            latest = {entry.step: entry.value for entry in history}
            curves[name] = sorted(latest.items())
        return curves

    def end_run(self, run_id: str) -> None:
        """Close another run whose process was killed."""
        self._mlflow.MlflowClient().set_terminated(run_id, "KILLED")

    def hand_over(self) -> None:
        """Leave the run to another process, which has it open."""
        # What MLflow says of a run that is no longer ours must not hide why this process ends.
        with suppress(Exception):
            self._mlflow.end_run()
            self._mlflow.MlflowClient().update_run(self.run_id, status="RUNNING")

    def finish(self, succeeded: bool) -> None:
        """Close the run."""
        self._mlflow.end_run(status="FINISHED" if succeeded else "FAILED")


def get_or_create_experiment(mlflow: Any, uri: str, name: str) -> str:
    """Return an experiment's id; create a missing one.

    `uri` is that of the MLflow.
    """
    experiment = mlflow.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id

    # A server decides where artifacts go. With an SQLite file, they go into a folder beside the file.
    artifact_location = None
    if uri.startswith(SQLITE):
        artifact_location = Path(uri.removeprefix(SQLITE)).absolute().with_name("mlartifacts").as_uri()
    return mlflow.create_experiment(name, artifact_location=artifact_location)


def read_last_metrics(uri: str, run_id: str) -> dict[str, float]:
    """Return the last value of every metric of a run.

    `uri` is that of the MLflow.
    """
    return dict(connect_to_mlflow(uri).MlflowClient().get_run(run_id).data.metrics)
