"""MLflow: a run's params, metrics and pictures, and the registry of models. Only the driver talks to it."""

import contextlib
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from corun_ray.config import Job
from corun_ray.core.checkpoints import NETWORK_FILE, SPEC_FILE, read_spec
from corun_ray.core.networks import requirements
from corun_ray.service import usercode
from corun_ray.service.runs import flatten

MODEL_CODE = Path(__file__).with_name("pyfunc_model.py")
PACKAGE = Path(__file__).parents[1]
MODEL_REQUIREMENTS = ["torch", "numpy", "opencv-python-headless", "mlflow"]
MODEL_FOLDER = "checkpoint"
EXAMPLE_PX = 64
SQLITE = "sqlite:///"


class TrackingError(Exception):
    """MLflow cannot be reached or refuses; the message is one line."""


def tracking_uri(job: Job) -> str:
    """The MLflow server of a job: its own, or an SQLite file in its storage folder."""
    return job.tracking.uri or f"{SQLITE}{Path(job.storage).expanduser().absolute()}/mlflow.db"


def _mlflow(uri: str) -> Any:
    """MLflow, quiet and pointed at `uri`."""
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
        self.uri = tracking_uri(job)
        self._mlflow = _mlflow(self.uri)
        try:
            self._select_experiment(job)
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
            raise TrackingError(f"tracking.uri: {self.uri} does not answer as MLflow: {_first_line(error)}") from None

    def _select_experiment(self, job: Job) -> None:
        name = job.tracking.experiment
        if self._mlflow.get_experiment_by_name(name) is None:
            # A server has its own place for artifacts; with an SQLite file they go beside it.
            beside = None
            if self.uri.startswith(SQLITE):
                beside = Path(self.uri.removeprefix(SQLITE)).absolute().with_name("mlartifacts").as_uri()
            self._mlflow.create_experiment(name, artifact_location=beside)
        self._mlflow.set_experiment(name)

    @property
    def run_id(self) -> str:
        """MLflow's own id of the run."""
        return self._run.info.run_id

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs metrics after `step` steps; from any thread."""
        self._mlflow.log_metrics({k: float(v) for k, v in metrics.items()}, step=step, run_id=self.run_id)

    def file(self, name: str, content: bytes) -> None:
        """Logs an artifact under `name`, folders included; from any thread."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            parent = str(Path(name).parent) if "/" in name else None
            self._mlflow.log_artifact(str(path), artifact_path=parent, run_id=self.run_id)

    def tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the run."""
        self._mlflow.set_tags(dict(tags))

    def log_model(self, checkpoint: Path, code: usercode.Code, register: str | None) -> str:
        """Logs the network of a checkpoint folder, and the `code` of its class, as a pyfunc model; returns its URI.

        With `register`, it is also registered under that name.
        """
        signature, example = _signature(self._mlflow)
        # MLflow prints its own account of this; what goes wrong is raised.
        with contextlib.redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            model = folder / MODEL_FOLDER
            model.mkdir()
            for file in (NETWORK_FILE, SPEC_FILE):
                shutil.copy(checkpoint / file, model)
            info = self._mlflow.pyfunc.log_model(
                name="model",
                python_model=str(MODEL_CODE),
                artifacts={"checkpoint": str(model)},
                code_paths=[str(path) for path in (_model_code(folder), *usercode.write(code, folder / "user"))],
                signature=signature,
                input_example=example,
                pip_requirements=[*MODEL_REQUIREMENTS, *requirements(read_spec(model))],
            )
        return info.model_uri if register is None else self.register(info.model_uri, register)

    def register(self, model_uri: str, name: str) -> str:
        """Makes a logged model a new version with the alias `candidate`, the name's first also `champion`.

        Returns the version's URI.
        """
        client = self._mlflow.MlflowClient()
        with contextlib.redirect_stderr(io.StringIO()):
            version = str(self._mlflow.register_model(model_uri, name).version)
        client.set_registered_model_alias(name, "candidate", version)
        if version == "1":
            client.set_registered_model_alias(name, "champion", version)
        return f"models:/{name}/{version}"

    def end_other(self, run_id: str) -> None:
        """Closes another run, whose process was ended before it could."""
        self._mlflow.MlflowClient().set_terminated(run_id, "KILLED")

    def finish(self, succeeded: bool) -> None:
        """Closes the run."""
        self._mlflow.end_run(status="FINISHED" if succeeded else "FAILED")


def download_model(uri: str, source: str, folder: Path) -> Path:
    """Fetches a model (`models:/…`, `runs:/…`) from the MLflow at `uri`; returns its checkpoint folder.

    Raises `TrackingError`.
    """
    mlflow = _mlflow(uri)
    try:
        model = Path(mlflow.artifacts.download_artifacts(source, dst_path=str(folder)))
    except Exception as error:
        raise TrackingError(f"{source}: not to be had from {uri}: {_first_line(error)}") from None
    found = sorted(model.rglob(NETWORK_FILE))
    if not found:
        raise TrackingError(f"{source}: a model without {NETWORK_FILE}; not one of corun_ray's")
    return found[0].parent


def _model_code(folder: Path) -> Path:
    """A copy of the part of this package that the model needs to run."""
    code = folder / PACKAGE.name
    shutil.copytree(PACKAGE / "core", code / "core", ignore=shutil.ignore_patterns("__pycache__", "demo"))
    shutil.copy(PACKAGE / "__init__.py", code)
    return code


def _signature(mlflow: Any) -> tuple[Any, np.ndarray]:
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    images = Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))])
    level = np.linspace(60, 220, EXAMPLE_PX).astype(np.uint8)
    return ModelSignature(inputs=images, outputs=images), np.broadcast_to(
        level[:, None, None], (1, EXAMPLE_PX, EXAMPLE_PX, 3)
    ).copy()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
