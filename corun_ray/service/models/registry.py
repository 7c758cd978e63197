"""MLflow's registry: models with what is known of them, their versions, and taking one out.

When a version becomes the champion: only if held-out images show that it is better."""

import contextlib
import io
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from corun_ray.core.metrics.catalog import all_metrics
from corun_ray.core.training.checkpoints import NETWORK_FILE
from corun_ray.service.errors import get_first_line
from corun_ray.service.models import flavor
from corun_ray.service.models.flavor import ABOUT_FOLDER
from corun_ray.service.models.tracking import TrackingError, connect_to_mlflow
from corun_ray.service.models.user_code import UserCode
from corun_ray.service.report.statistics import compare
from corun_ray.service.runs.held_out import VALIDATION_FILE, ValidationLog

OURS = ("corun_ray.", "val/")
"""What the names of our tags begin with."""
SUMMARY_TAG = "corun_ray.summary"
CANDIDATE, CHAMPION = "candidate", "champion"


@dataclass(frozen=True)
class ModelDescription:
    """What is known of a trained model beside its weights; see `model_card`."""

    tags: Mapping[str, str]
    """Of the logged model, and of every version made of it."""
    files: Mapping[str, bytes]
    """Kept in the model's folder `about`; `README.md` is its card."""


def log_model(uri: str, checkpoint: Path, code: UserCode, about: ModelDescription) -> str:
    """Logs the network of a checkpoint folder with the active run of the MLflow at `uri`; returns the model's URI."""
    connect_to_mlflow(uri)
    from mlflow.models import Model

    with contextlib.redirect_stderr(io.StringIO()):  # MLflow prints its own account; what goes wrong is raised
        info = Model.log(
            artifact_path=None,
            name="model",
            flavor=flavor,
            tags=dict(about.tags),
            checkpoint=checkpoint,
            code=code,
            about=about.files,
        )
    return info.model_uri


def register_model(uri: str, model_uri: str, name: str) -> str:
    """Makes a logged model a new version, with its tags and the alias `candidate`; a name's first is also `champion`.

    Returns the version's URI.
    """
    mlflow = connect_to_mlflow(uri)
    client = mlflow.MlflowClient()
    logged = client.get_logged_model(model_uri.removeprefix("models:/"))
    tags = {name: value for name, value in logged.tags.items() if name.startswith(OURS)}
    with contextlib.redirect_stderr(io.StringIO()):
        version = str(mlflow.register_model(model_uri, name, tags=tags).version)
    client.update_model_version(name, version, description=tags.get(SUMMARY_TAG, ""))
    client.set_registered_model_alias(name, CANDIDATE, version)
    if version == "1":
        client.set_registered_model_alias(name, CHAMPION, version)
    return f"models:/{name}/{version}"


@dataclass(frozen=True)
class ModelVersion:
    """One version of a registered model."""

    name: str
    number: str
    tags: dict[str, str]

    def __str__(self) -> str:
        return f"version {self.number}"


class Registry:
    """The registered models of an MLflow."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._mlflow = connect_to_mlflow(uri)
        self._client = self._mlflow.MlflowClient()

    def find_version(self, name: str, version_or_alias: str) -> ModelVersion:
        """A version by its number or alias; raises `TrackingError`."""
        found = self._find(name, version_or_alias)
        if found is None:
            raise TrackingError(
                f"{name}: no version or alias {version_or_alias} in {self.uri}{self._name_versions(name)}"
            )
        return found

    def find_champion(self, name: str) -> ModelVersion | None:
        """The version that is used; None where none has been chosen. Raises `TrackingError`."""
        return self._find(name, CHAMPION)

    def set_champion(self, version: ModelVersion) -> None:
        """Makes a version its name's champion."""
        with self._translate_errors(f"{version.name}: {CHAMPION} not moved"):
            self._client.set_registered_model_alias(version.name, CHAMPION, version.number)

    def read_validation(self, version: ModelVersion) -> ValidationLog:
        """Every held-out image's values, empty for a version that came without; raises `TrackingError`."""
        about = f"models:/{version.name}/{version.number}/{ABOUT_FOLDER}"
        with self._translate_errors(f"{about}: not to be had"), tempfile.TemporaryDirectory() as folder:
            listed = self._mlflow.artifacts.list_artifacts(artifact_uri=about)
            if not any(file.path.endswith(VALIDATION_FILE) for file in listed):
                return ValidationLog()
            path = self._mlflow.artifacts.download_artifacts(f"{about}/{VALIDATION_FILE}", dst_path=folder)
            return ValidationLog.from_csv(Path(path).read_bytes())

    def _find(self, name: str, version_or_alias: str) -> ModelVersion | None:
        from mlflow.exceptions import MlflowException

        is_number = version_or_alias.isdecimal()
        get = self._client.get_model_version if is_number else self._client.get_model_version_by_alias
        with self._translate_errors(f"{name}: not to be had"):
            try:
                found = get(name, version_or_alias)
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return None
                raise
        return ModelVersion(name, str(found.version), dict(found.tags))

    def _name_versions(self, name: str) -> str:
        with self._translate_errors(f"{name}: not to be had"):
            known = self._client.search_model_versions(f"name = '{name}'")
        numbers = sorted((int(version.version) for version in known), reverse=True)
        return f" (versions {', '.join(map(str, numbers[:10]))})" if numbers else ""

    @contextlib.contextmanager
    def _translate_errors(self, what: str) -> Any:
        try:
            yield
        except TrackingError:
            raise
        except Exception as error:
            raise TrackingError(f"{what} in {self.uri}: {get_first_line(error)}") from None


def download_model(uri: str, source: str, folder: Path) -> Path:
    """Fetches a model (`models:/…`, `runs:/…`) from the MLflow at `uri`; returns its checkpoint folder.

    Raises `TrackingError`.
    """
    mlflow = connect_to_mlflow(uri)
    try:
        model = Path(mlflow.artifacts.download_artifacts(source, dst_path=str(folder)))
    except Exception as error:
        raise TrackingError(f"{source}: not to be had from {uri}: {get_first_line(error)}") from None
    found = sorted(model.rglob(NETWORK_FILE))
    if not found:
        raise TrackingError(f"{source}: a model without {NETWORK_FILE}; not one of corun_ray's")
    return found[0].parent


HELD_OUT_TAG = "corun_ray.held_out"
"""The tag of a version that tells on which images it was measured: a digest of each set, `SET=DIGEST` by spaces."""


@dataclass(frozen=True)
class Decision:
    """Whether the champion moves, and why."""

    moves: bool
    reason: str


@dataclass(frozen=True)
class VersionScores:
    """What one version was measured at in the end."""

    label: str
    values: Mapping[str, Mapping[str, float]]
    """Metric such as `val/fade` → image → value."""
    held_out: Mapping[str, str]
    """Set → digest of what is in it."""


def promote(registry: Registry, name: str, version_or_alias: str, if_better: str | None) -> Decision:
    """Makes a version the champion, with `if_better` only where that metric shows it to be better.

    Raises `TrackingError`, also for a metric that nobody measures.
    """
    version, champion = registry.find_version(name, version_or_alias), registry.find_champion(name)
    if if_better is not None and if_better.rpartition("/")[2] not in all_metrics():
        raise TrackingError(f"--if-better {if_better}: no metric of pictures (val/fade, val/psnr, ...)")
    if champion is not None and champion.number == version.number:
        return Decision(False, f"{version} is the champion already")
    if if_better is None or champion is None:
        old = "there was none before" if champion is None else f"it was {champion}"
        decision = Decision(True, old)
    else:
        decision = decide(_record(registry, version), _record(registry, champion), if_better)
    if decision.moves:
        registry.set_champion(version)
    return decision


def decide(new: VersionScores, old: VersionScores, metric: str) -> Decision:
    """Whether `new` takes the place of `old`."""
    for record in (new, old):
        if metric not in record.values:
            known = ", ".join(record.values) or "nothing"
            return Decision(False, f"{record.label} was not measured by {metric} (it has {known})")
    prefix, _, name = metric.rpartition("/")
    if new.held_out.get(prefix) != old.held_out.get(prefix):
        return Decision(False, f"{new.label} and {old.label} were measured on different images ({prefix})")
    images = sorted(new.values[metric].keys() & old.values[metric].keys())
    mine, theirs = (np.array([record.values[metric][image] for image in images]) for record in (new, old))
    found = compare(mine, theirs, all_metrics()[name].lower_better)
    account = (
        f"{metric} {mine.mean():.4f} against {theirs.mean():.4f} of {old.label}, "
        f"better on {found.better} of {found.difference.count} images (p {found.p_value:.3f}): {found.verdict}"
    )
    return Decision(found.verdict == "better", account)


def _record(registry: Registry, version: ModelVersion) -> VersionScores:
    log: ValidationLog = registry.read_validation(version)
    last = {} if log.last_step is None else log.at(log.last_step)
    pairs = (part.partition("=") for part in version.tags.get(HELD_OUT_TAG, "").split())
    return VersionScores(
        str(version),
        {f"{prefix}/{metric}": images for (prefix, metric), images in last.items()},
        {prefix: digest for prefix, _, digest in pairs},
    )
