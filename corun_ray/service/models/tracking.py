"""MLflow tracking: a run's params, metrics and pictures. Only the driver talks to MLflow."""

import contextlib
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from corun_ray.config.credentials import REFUSED, holds_credentials, mask_credentials
from corun_ray.config.jobs import EvaluateJob, Job, TrainingJob
from corun_ray.config.reference import flatten
from corun_ray.core.errors import UserError
from corun_ray.service.environment import drop_variables
from corun_ray.service.models.mlflow_database import set_up_database
from corun_ray.service.models.mlflow_errors import explain_error
from corun_ray.service.models.mlflow_server import probe_server
from corun_ray.service.models.outbox import UNSENT_FOLDER, Entry, Outbox
from corun_ray.service.proxies import reach_loopback_directly
from corun_ray.service.s3 import share_s3_endpoint
from corun_ray.service.start_times import timing_phase
from corun_ray.service.storage import Location, MissingFile, expand_home
from corun_ray.service.trust import share_ca_file
from corun_ray.service.waiting import Say, announce_wait, print_line

SQLITE = "sqlite:///"
MLFLOW_SCHEMES = ("models:/", "runs:/")
"""Models that MLflow holds begin with these."""
URI_VARIABLE = "MLFLOW_TRACKING_URI"
MAX_PARAM_CHARACTERS = 500
"""Longer values of params are cut: older MLflow servers refuse them."""
ENVIRONMENT = {
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # An absent server becomes an error after seconds, a silent one after a minute; by MLflow's own defaults, after
    # four minutes and after sixteen.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
"""Read by MLflow at import. A user's own values have precedence."""
ABSENT_CODES = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's error codes for a run, a model, a version or an alias that does not exist."""
EXISTS_CODE = "RESOURCE_ALREADY_EXISTS"
DELETED = "deleted"
"""MLflow's life cycle stage of what was deleted, and can be restored."""
FINAL_PATIENCE_S = 60.0
"""How long the end of a run waits for an MLflow that is away."""

_reached: set[str] = set()
"""URIs that have answered to this process."""


class TrackingError(UserError):
    """MLflow cannot be reached or refuses a request; the message is one line."""


def get_tracking_uri(job: Job) -> str:
    """Return the URI of the job's MLflow.

    The default is an SQLite file in the job's storage folder.
    """
    if job.tracking.uri:
        return job.tracking.uri
    return f"{SQLITE}{expand_home(job.storage).absolute()}/mlflow.db"


def connect_to_mlflow(uri: str, say: Say = print_line) -> Any:
    """Import MLflow and point it at `uri`; return the module.

    The first call of a process asks the server, or sets an SQLite file up. `say` tells of a wait.

    Raises `TrackingError` where the URI holds credentials, or MLflow does not answer there.
    """
    if holds_credentials(uri):
        shown = mask_credentials(uri)
        raise TrackingError(f"{shown} {REFUSED} (MLFLOW_TRACKING_USERNAME and _PASSWORD, or MLFLOW_TRACKING_TOKEN)")

    reach_loopback_directly()

    # Later, the variables are MLflow's own: it sets some for the processes that it starts.
    if not _reached:
        for line in drop_variables("MLFLOW_"):
            say(line)
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    share_ca_file()
    share_s3_endpoint()
    with timing_phase("imports: MLflow"):
        import mlflow

    # Failures are raised as errors; warnings would only clutter the job's output.
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="mlflow")

    if uri not in _reached:
        with translating_errors(uri, _describe_silence(uri)), timing_phase("MLflow's database or server"):
            _reach(mlflow, uri, say)
        _reached.add(uri)
    mlflow.set_tracking_uri(uri)
    return mlflow


def _describe_silence(uri: str) -> str:
    """Return what is wrong where an MLflow cannot be used."""
    return f"MLflow's {uri} cannot be used" if uri.startswith(SQLITE) else f"{uri} does not answer as MLflow"


def _reach(mlflow: Any, uri: str, say: Say) -> None:
    """Ask an MLflow for the first time; an SQLite file is set up.

    Raises many kinds of errors.
    """
    if uri.startswith(SQLITE):
        set_up_database(Path(uri.removeprefix(SQLITE)).absolute(), mlflow.MlflowClient, say)
        # MLflow compares the database's schema with its own.
        mlflow.MlflowClient(uri)
    elif uri.startswith("http"):
        # As long as one request with its repetitions may take.
        tries = 1 + mlflow.environment_variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES.get()
        limit_s = mlflow.environment_variables.MLFLOW_HTTP_REQUEST_TIMEOUT.get()
        probe_server(uri, min(FINAL_PATIENCE_S, limit_s * tries), say)


@contextlib.contextmanager
def translating_errors(uri: str, problem: str) -> Iterator[None]:
    """Raise errors of MLflow as `TrackingError`: the problem, and what the error means."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        raise TrackingError(f"{problem}: {explain_error(error, uri)}") from None


@contextlib.contextmanager
def asking_mlflow(uri: str, problem: str, say: Say = print_line) -> Iterator[None]:
    """Ask MLflow for something; a long wait is told.

    Raises errors as `TrackingError`: the problem, and what the error means.
    """
    with announce_wait(f"MLflow at {uri}", say), translating_errors(uri, problem):
        yield


def check_tracking(jobs: Sequence[Job], say: Say = print_line) -> None:
    """Check that MLflow takes the records of jobs, and has models to start from.

    Nothing is created but an SQLite file. Torch and Ray are not imported for this: what is wrong is told soon.

    Raises `TrackingError`.
    """
    # Compare before connecting, which sets the variable.
    recorded = [job for job in jobs if isinstance(job, TrainingJob | EvaluateJob)]
    named = os.environ.get(URI_VARIABLE, "")
    for one in recorded:
        used = get_tracking_uri(one)
        if named and named != used and not holds_credentials(named):
            say(f"environment: {URI_VARIABLE}={named} is not used: tracking.uri of {one.name} is {used}")

    for job in jobs:
        values = flatten(job.model_dump(mode="json")).values()
        has_source = any(isinstance(value, str) and value.startswith(MLFLOW_SCHEMES) for value in values)
        if job not in recorded and not has_source:
            continue
        uri = get_tracking_uri(job)
        with _asking_for_job(job):
            mlflow = connect_to_mlflow(uri, say)
            if job in recorded:
                find_experiment(mlflow, uri, job.tracking.experiment)


@contextlib.contextmanager
def _asking_for_job(job: Job) -> Iterator[None]:
    """Ask the MLflow of a job; errors name the key that leads there.

    Raises `TrackingError`.
    """
    uri = get_tracking_uri(job)
    try:
        with translating_errors(uri, _describe_silence(uri)):
            yield
    except TrackingError as error:
        raise TrackingError(f"{'tracking.uri' if job.tracking.uri else 'storage'}: {error}") from None


class Tracker:
    """One MLflow run: the constructor opens the run, `finish` closes it.

    What is logged goes through an outbox, so that an MLflow that is away for a while stops nothing.
    """

    def __init__(
        self,
        job: Job,
        name: str,
        earlier: str | None = None,
        parent: str | None = None,
        run: Location | None = None,
        say: Say = print_line,
    ) -> None:
        """Open a new run, or reopen the run `earlier`.

        A new run is called `name` and lies below the run `parent`. Where MLflow has no run `earlier`, a new one begins.
        `earlier` and `parent` are MLflow's run ids. `run` is the folder that keeps what MLflow does not take; `say`
        tells a person of that. Raises `TrackingError` and `StorageError`.
        """
        self.uri, self._run, self._say = get_tracking_uri(job), run, say
        self._curves: dict[str, dict[float, float]] = {}
        """Metrics that this process has logged: name → step → value."""

        with _asking_for_job(job):
            self._mlflow = connect_to_mlflow(self.uri, say)
            self._client = self._mlflow.MlflowClient()
            found = None if earlier is None else self._find_run(earlier)
            self.run_id = self._create_run(job, name, parent) if found is None else self._reopen_run(found, name)

        self._outbox = Outbox(self.uri, run, self._send, say)
        num_kept = self._outbox.load() if earlier is not None else 0
        if num_kept:
            say(f"  sends to MLflow what an earlier start has kept: {self._outbox.describe()}")

    # --- The run in MLflow ---

    def _find_run(self, run_id: str) -> Any | None:
        """Return an earlier run, None where this MLflow does not have it."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in ABSENT_CODES:
                raise
            run = None

        if run is not None and run.info.lifecycle_stage != DELETED:
            return run
        state = "has no run" if run is None else "has deleted the run"
        self._say(f"  mlflow: {self.uri} {state} {run_id}: a new one begins, without what that one holds")
        return None

    def _create_run(self, job: Job, name: str, parent: str | None) -> str:
        """Create a run with its params; return its id."""
        from mlflow.tracking.context.registry import resolve_tags

        experiment_id = get_or_create_experiment(self._mlflow, self.uri, job.tracking.experiment)
        # The experiment of the models that will be logged.
        self._mlflow.set_experiment(experiment_id=experiment_id)

        # MLflow's own tags tell who has started what. Not `mlflow.start_run`, which would ask an MLflow that is away
        # once more when the process ends.
        tags = resolve_tags({} if parent is None else {"mlflow.parentRunId": parent})
        run_id = self._client.create_run(experiment_id, tags=tags, run_name=name).info.run_id

        # MLflow refuses to change a param: a resumed run keeps the params of its first start.
        self._log_params(run_id, job)
        return run_id

    def _reopen_run(self, run: Any, name: str) -> str:
        """Open an earlier run again; return its id."""
        # The run stays in its experiment, whatever the job says now.
        self._mlflow.set_experiment(experiment_id=run.info.experiment_id)
        self._client.update_run(run.info.run_id, status="RUNNING", name=name)
        return run.info.run_id

    def _log_params(self, run_id: str, job: Job) -> None:
        """Log every key of the job file as a param."""
        from mlflow.entities import Param

        params = flatten(job.model_dump(mode="json"))
        entries = [Param(key, str(value)[:MAX_PARAM_CHARACTERS]) for key, value in params.items()]
        self._client.log_batch(run_id, params=entries, synchronous=True)

    # --- Logging ---

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics after `step` steps, from any thread."""
        values = {name: float(value) for name, value in metrics.items()}
        for name, value in values.items():
            self._curves.setdefault(name, {})[step] = value
        self._outbox.put(Entry(_read_clock_ms(), step, metrics=values))

    def log_file(self, name: str, content: bytes) -> None:
        """Log an artifact under the path `name`, from any thread.

        A file of the same name and content lies in the run's folder.
        """
        self._outbox.put(Entry(_read_clock_ms(), file=name, content=content))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._outbox.put(Entry(_read_clock_ms(), tags=dict(tags)))

    def _send(self, entries: Sequence[Entry]) -> None:
        """Send entries of one kind to MLflow (in the outbox's thread)."""
        from mlflow.entities import Metric, RunTag

        metrics, tags = [], []
        for entry in entries:
            for name, value in (entry.metrics or {}).items():
                metrics.append(Metric(name, value, entry.time_ms, entry.step))
            for name, text in (entry.tags or {}).items():
                tags.append(RunTag(name, text))
            if entry.file is not None:
                self._send_file(entry.file, entry.content)
        if metrics or tags:
            self._client.log_batch(self.run_id, metrics=metrics, tags=tags, synchronous=True)

    def _send_file(self, name: str, content: bytes | None) -> None:
        """Send an artifact; without its content, it is read from the run's folder."""
        if content is None and self._run is not None:
            try:
                content = self._run.child(name).read()
            except MissingFile:
                self._say(f"  mlflow: {name} is no longer in the run's folder, and not sent")
        if content is None:
            return

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

            parent = str(Path(name).parent) if "/" in name else None
            self._client.log_artifact(self.run_id, str(path), parent)

    # --- Reading and closing ---

    def read_curves(self) -> dict[str, list[tuple[float, float]]]:
        """Return every logged metric as (step, value) pairs.

        After a restart a step may have been logged twice: the latest value counts. Where MLflow is away, these are the
        metrics of this process alone.
        """
        curves = {}
        if self._outbox.wait(FINAL_PATIENCE_S):
            with contextlib.suppress(TrackingError), asking_mlflow(self.uri, "curves", self._say):
                curves = self._read_logged_curves()
        for name, values in self._curves.items():
            curves[name] = curves.get(name, {}) | values
        return {name: sorted(values.items()) for name, values in curves.items()}

    def _read_logged_curves(self) -> dict[str, dict[float, float]]:
        """Read MLflow's metrics: name → step → value."""
        curves = {}
        for name in self._client.get_run(self.run_id).data.metrics:
            history = sorted(self._client.get_metric_history(self.run_id, name), key=lambda entry: entry.timestamp)
            curves[name] = {entry.step: entry.value for entry in history}
        return curves

    def list_missing(self) -> list[str]:
        """List what MLflow lacks of this run, and why, in a line; none where it has all.

        Waits for an MLflow that is away.
        """
        if self._outbox.wait(FINAL_PATIENCE_S):
            return []
        reason = self._outbox.failure or "not in time"
        return [f"MLflow at {self.uri} lacks {self._outbox.describe()} ({reason})"]

    def end_run(self, run_id: str, status: str = "KILLED") -> None:
        """Close another run whose process has ended without closing it."""
        with contextlib.suppress(TrackingError), asking_mlflow(self.uri, run_id, self._say):
            self._client.set_terminated(run_id, status)

    def hand_over(self) -> None:
        """Leave the run to another process, which has it open."""
        self._outbox.abandon()

    def finish(self, succeeded: bool) -> None:
        """Close the run. An MLflow that is away is told of, and stops nothing."""
        self._outbox.close()
        if self._outbox.failure is not None:
            self._say(f"  mlflow: the run {self.run_id} stays open there: {self._outbox.failure}")
            return
        try:
            with asking_mlflow(self.uri, f"mlflow: the run {self.run_id} stays open there", self._say):
                self._client.set_terminated(self.run_id, "FINISHED" if succeeded else "FAILED")
        except TrackingError as error:
            self._say(f"  {error}")


def send_unsent(job: Job, run: Location, run_id: str, say: Say) -> str | None:
    """Send to MLflow what a finished run has kept in its folder.

    `run_id` is that of the run in MLflow. Returns what MLflow still lacks, None where it has all.

    Raises `TrackingError` and `StorageError`.
    """
    if not run.child(UNSENT_FOLDER).is_folder():
        return None
    tracker = Tracker(job, run.name, run_id, run=run, say=say)
    missing = tracker.list_missing()
    tracker.finish(True)
    return missing[0] if missing else None


def _read_clock_ms() -> int:
    """Return the time as MLflow counts it."""
    return int(time.time() * 1000)


def find_experiment(mlflow: Any, uri: str, name: str) -> Any | None:
    """Return an experiment, None where there is none.

    Raises `TrackingError` for one that was deleted, whose name stays taken.
    """
    experiment = mlflow.get_experiment_by_name(name)
    if experiment is not None and experiment.lifecycle_stage == DELETED:
        number = experiment.experiment_id
        raise TrackingError(
            f"the experiment {name} was deleted in {uri}; restore it: MLFLOW_TRACKING_URI={uri} mlflow experiments "
            f"restore -x {number} (or choose another tracking.experiment, or end it for good by mlflow gc)"
        )
    return experiment


def get_or_create_experiment(mlflow: Any, uri: str, name: str) -> str:
    """Return an experiment's id; create a missing one.

    `uri` is that of the MLflow. Raises `TrackingError` for one that was deleted.
    """
    from mlflow.exceptions import MlflowException

    experiment = find_experiment(mlflow, uri, name)
    if experiment is not None:
        return experiment.experiment_id

    # A server decides where artifacts go. With an SQLite file, they go into a folder beside the file.
    artifact_location = None
    if uri.startswith(SQLITE):
        artifact_location = Path(uri.removeprefix(SQLITE)).absolute().with_name("mlartifacts").as_uri()
    try:
        return mlflow.create_experiment(name, artifact_location=artifact_location)
    except MlflowException as error:
        # Another job of this experiment has begun at the same moment.
        found = mlflow.get_experiment_by_name(name) if error.error_code == EXISTS_CODE else None
        if found is None:
            raise
        return found.experiment_id


def read_last_metrics(uri: str, run_id: str) -> dict[str, float]:
    """Return the last value of every metric of a run.

    `uri` is that of the MLflow. Raises `TrackingError`.
    """
    mlflow = connect_to_mlflow(uri)
    with asking_mlflow(uri, f"the metrics of the run {run_id} cannot be read from {uri}"):
        return dict(mlflow.MlflowClient().get_run(run_id).data.metrics)
