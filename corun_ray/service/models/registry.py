"""MLflow's model registry: logging a model, its versions and their descriptions, downloading one.

Also when a version becomes the champion: with `--if-better`, only where the images of the validation set show it.
"""

import contextlib
import io
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from corun_ray.core.metrics.catalog import choose_mode, list_validation_metrics
from corun_ray.core.training.checkpoint_record import NETWORK_FILE
from corun_ray.service.models import flavor
from corun_ray.service.models.flavor import ABOUT_FOLDER
from corun_ray.service.models.tracking import ABSENT_CODES, TrackingError, asking_mlflow, connect_to_mlflow
from corun_ray.service.models.user_code import UserCode
from corun_ray.service.report.statistics import compare
from corun_ray.service.runs.held_out import VALIDATION_FILE, ValidationLog

OUR_TAGS = ("corun_ray.", "val/")
"""The names of our tags begin with these."""
SUMMARY_TAG = "corun_ray.summary"
VALIDATION_SETS_TAG = "corun_ray.held_out"
"""The tag that tells on which images a version was measured: `SET=DIGEST` for each set, separated by spaces."""
CANDIDATE, CHAMPION, BEST = "candidate", "champion", "best"
"""Aliases of a registered model: the last training's result, the version in use, and the best by `train.best`."""
MAX_NAMED_VERSIONS = 10


@dataclass(frozen=True)
class ModelDescription:
    """The description of a trained model: everything but its weights."""

    tags: Mapping[str, str]
    """Tags of the logged model, and of every version made of it."""
    files: Mapping[str, bytes]
    """Files of the model's folder `about`, by name; `README.md` is the model card."""


@dataclass(frozen=True)
class ModelVersion:
    """One version of a registered model."""

    name: str
    number: str
    tags: dict[str, str]

    def __str__(self) -> str:
        return f"version {self.number}"


@dataclass(frozen=True)
class Decision:
    """Whether the champion changes, and why."""

    moves: bool
    reason: str


@dataclass(frozen=True)
class VersionScores:
    """The values of a version at its last validation."""

    label: str
    values: Mapping[str, Mapping[str, float]]
    """Metric such as `val/fade` → image → value."""
    set_digests: Mapping[str, str]
    """Validation set (`val`, `val/NAME`) → digest of its list of images."""


# --- Logging and registering a model ---


def log_model(
    uri: str, run_id: str, checkpoint: Path, code: UserCode, description: ModelDescription, name: str = "model"
) -> str:
    """Log a checkpoint's network with the MLflow run `run_id`, as `name`.

    Returns the model's URI.
    `uri` is the MLflow server; `code` is that of the network's class where it is a user's own.

    Raises `TrackingError`.
    """
    connect_to_mlflow(uri)
    from mlflow.models import Model

    # MLflow prints messages of its own here; failures are raised.
    problem = f"the model cannot be logged to {uri}"
    with asking_mlflow(uri, problem), contextlib.redirect_stderr(io.StringIO()):
        info = Model.log(
            run_id=run_id,
            artifact_path=None,
            name=name,
            flavor=flavor,
            tags=dict(description.tags),
            checkpoint=checkpoint,
            code=code,
            about=description.files,
        )
    return info.model_uri


def register_model(uri: str, model_uri: str, name: str, is_candidate: bool = True) -> str:
    """Register a logged model as a new version of `name`.

    Returns the version's URI.
    The version gets the model's tags and, if `is_candidate`, the alias `candidate`. The first version of a name also
    becomes `champion`.

    Raises `TrackingError`.
    """
    with asking_mlflow(uri, f"{model_uri} cannot be registered as {name} in {uri}"):
        return _register_model(uri, model_uri, name, is_candidate)


def _register_model(uri: str, model_uri: str, name: str, is_candidate: bool) -> str:
    """Register a logged model; raises MLflow's own errors."""
    mlflow = connect_to_mlflow(uri)
    client = mlflow.MlflowClient()

    # MLflow sets tags of its own on a logged model: pass on only ours.
    logged = client.get_logged_model(model_uri.removeprefix("models:/"))
    tags = {tag: value for tag, value in logged.tags.items() if tag.startswith(OUR_TAGS)}

    with contextlib.redirect_stderr(io.StringIO()):
        version = str(mlflow.register_model(model_uri, name, tags=tags).version)
    client.update_model_version(name, version, description=tags.get(SUMMARY_TAG, ""))

    if is_candidate:
        client.set_registered_model_alias(name, CANDIDATE, version)
    if version == "1":
        client.set_registered_model_alias(name, CHAMPION, version)
    return f"models:/{name}/{version}"


def has_model(uri: str, model_uri: str) -> bool:
    """Tell whether MLflow has a model: `models:/m-ID` or `models:/NAME/VERSION`.

    Raises `TrackingError`.
    """
    client = connect_to_mlflow(uri).MlflowClient()
    from mlflow.exceptions import MlflowException

    name, _, version = model_uri.removeprefix("models:/").partition("/")
    with asking_mlflow(uri, f"{model_uri}: cannot be looked for in {uri}"):
        try:
            client.get_model_version(name, version) if version else client.get_logged_model(name)
        except MlflowException as error:
            if error.error_code in ABSENT_CODES:
                return False
            raise
    return True


# --- Versions ---


class Registry:
    """The registered models of one MLflow server."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._mlflow = connect_to_mlflow(uri)
        self._client = self._mlflow.MlflowClient()

    def find_version(self, name: str, version_or_alias: str) -> ModelVersion:
        """Return a version by its number or alias.

        Raises `TrackingError` where there is none, naming the versions that exist.
        """
        version = self._find(name, version_or_alias)
        if version is None:
            known = self._name_versions(name)
            raise TrackingError(f"{name}: no version or alias {version_or_alias} in {self.uri}{known}")
        return version

    def find_alias(self, name: str, alias: str) -> ModelVersion | None:
        """Return the version that has an alias, None without one.

        Raises `TrackingError`.
        """
        return self._find(name, alias)

    def find_champion(self, name: str) -> ModelVersion | None:
        """Return the version in use, None without one.

        Raises `TrackingError`.
        """
        return self.find_alias(name, CHAMPION)

    def set_alias(self, version: ModelVersion, alias: str) -> None:
        """Give a version an alias, which any other version loses.

        Raises `TrackingError`.
        """
        with self._asking(f"{version.name}: cannot set the alias {alias}"):
            self._client.set_registered_model_alias(version.name, alias, version.number)

    def set_champion(self, version: ModelVersion) -> None:
        """Make a version the champion of its name.

        Raises `TrackingError`.
        """
        self.set_alias(version, CHAMPION)

    def read_validation(self, version: ModelVersion) -> ValidationLog:
        """Return the validation values of every image.

        The log is empty for a version without validation.

        Raises `TrackingError`.
        """
        about = f"models:/{version.name}/{version.number}/{ABOUT_FOLDER}"
        with self._asking(f"{about}: cannot be read"), tempfile.TemporaryDirectory() as folder:
            # A version without the file is not an error, so look before downloading.
            listed = self._mlflow.artifacts.list_artifacts(artifact_uri=about)
            if not any(file.path.endswith(VALIDATION_FILE) for file in listed):
                return ValidationLog()

            path = self._mlflow.artifacts.download_artifacts(f"{about}/{VALIDATION_FILE}", dst_path=folder)
            return ValidationLog.from_csv(Path(path).read_bytes())

    def _asking(self, problem: str) -> contextlib.AbstractContextManager[None]:
        """Ask MLflow; errors become a `TrackingError` about `problem`."""
        return asking_mlflow(self.uri, f"{problem} ({self.uri})")

    def _find(self, name: str, version_or_alias: str) -> ModelVersion | None:
        """Return a version by number or alias, else None."""
        from mlflow.exceptions import MlflowException

        # MLflow has one call for numbers and one for aliases.
        is_number = version_or_alias.isdecimal()
        get = self._client.get_model_version if is_number else self._client.get_model_version_by_alias
        with self._asking(f"{name}: cannot be read"):
            try:
                found = get(name, version_or_alias)
            except MlflowException as error:
                if error.error_code in ABSENT_CODES:
                    return None
                raise
        return ModelVersion(name, str(found.version), dict(found.tags))

    def _name_versions(self, name: str) -> str:
        """Name the newest versions for an error message.

        Returns text in parentheses, or nothing where no version exists.
        """
        with self._asking(f"{name}: cannot be read"):
            known = self._client.search_model_versions(f"name = '{name}'")

        numbers = sorted((int(version.version) for version in known), reverse=True)
        if not numbers:
            return ""
        return f" (versions {', '.join(map(str, numbers[:MAX_NAMED_VERSIONS]))})"


def download_model(uri: str, source: str, folder: Path) -> Path:
    """Download a model into `folder`; return its checkpoint folder.

    `source` is `models:/…` or `runs:/…`. Raises `TrackingError`.
    """
    try:
        mlflow = connect_to_mlflow(uri)
    except TrackingError as error:
        raise TrackingError(f"{source}: {error}") from None
    with asking_mlflow(uri, f"{source}: cannot be read from {uri}"):
        model = Path(mlflow.artifacts.download_artifacts(source, dst_path=str(folder)))

    networks = sorted(model.rglob(NETWORK_FILE))
    if not networks:
        raise TrackingError(f"{source}: holds no {NETWORK_FILE}, so it is not a model of corun_ray")
    return networks[0].parent


# --- Promotion ---


def promote(registry: Registry, name: str, version_or_alias: str, if_better: str | None) -> Decision:
    """Make a version the champion.

    With a metric `if_better`, only where that metric shows the version to be better than the champion.
    Raises `TrackingError`, also where `if_better` is not a known metric.
    """
    version, champion = registry.find_version(name, version_or_alias), registry.find_champion(name)
    if if_better is not None and if_better.rpartition("/")[2] not in list_validation_metrics():
        raise TrackingError(f"--if-better {if_better}: not a metric of images (val/fade, val/psnr, ...)")

    if champion is not None and champion.number == version.number:
        return Decision(False, f"{version} is the champion already")

    # Without a champion, or without a metric, there is nothing to compare.
    if champion is None:
        decision = Decision(True, "there was none before")
    elif if_better is None:
        decision = Decision(True, f"it was {champion}")
    else:
        decision = decide(_read_scores(registry, version), _read_scores(registry, champion), if_better)

    if decision.moves:
        registry.set_champion(version)
    return decision


def decide(new: VersionScores, old: VersionScores, metric: str) -> Decision:
    """Decide by a metric whether `new` replaces the champion `old`."""
    for scores in (new, old):
        if metric not in scores.values:
            known = ", ".join(scores.values) or "nothing"
            return Decision(False, f"{scores.label} was not measured by {metric} (it has {known})")

    # Values of different images cannot be compared image by image.
    prefix, _, name = metric.rpartition("/")
    if new.set_digests.get(prefix) != old.set_digests.get(prefix):
        return Decision(False, f"{new.label} and {old.label} were measured on different images ({prefix})")

    # Both need a finite value of the same image.
    new_values, old_values = _select_common(new, old, metric)
    if not len(new_values):
        return Decision(False, f"{new.label} and {old.label} have no image in common with a finite {metric}")

    # The sign-flip test over the common images decides; the mean alone could be noise.
    comparison = compare(new_values, old_values, list_validation_metrics()[name].lower_better)

    reason = (
        f"{metric} {new_values.mean():.4f} against {old_values.mean():.4f} of {old.label}, "
        f"better on {comparison.better} of {comparison.difference.count} images "
        f"(p {comparison.p_value:.3f}): {comparison.verdict}{_describe_gaps(new, old, metric, len(new_values))}"
    )
    return Decision(comparison.verdict == "better", reason)


def promote_best(registry: Registry, version: ModelVersion, metric: str) -> Decision:
    """Give a version the alias `best` unless the version that has it is as good.

    The means of a metric such as `val/psnr` decide, over the images that both have. A version that was not measured by
    the metric on the same images cannot stay the best by it.

    Raises `TrackingError`.
    """
    old_version = registry.find_alias(version.name, BEST)
    if old_version is None or old_version.number == version.number:
        decision = Decision(True, "there was none before" if old_version is None else "it had it before")
    else:
        decision = compare_means(_read_scores(registry, version), _read_scores(registry, old_version), metric)

    if decision.moves:
        registry.set_alias(version, BEST)
    return decision


def compare_means(new: VersionScores, old: VersionScores, metric: str) -> Decision:
    """Decide by the mean of a metric whether `new` replaces the best version `old`."""
    if metric not in old.values:
        return Decision(True, f"{old.label}, the best before, was not measured by {metric}")

    prefix = metric.rpartition("/")[0]
    new_values, old_values = _select_common(new, old, metric)
    if new.set_digests.get(prefix) != old.set_digests.get(prefix) or not len(new_values):
        return Decision(True, f"{old.label}, the best before, was measured on other images ({prefix})")

    gain = float(new_values.mean() - old_values.mean())
    if choose_mode(metric) == "min":
        gain = -gain
    reason = f"{metric} {new_values.mean():.4f} against {old_values.mean():.4f} of {old.label}"
    reason += _describe_gaps(new, old, metric, len(new_values))
    return Decision(gain > 0, reason)


def _select_common(
    new: VersionScores, old: VersionScores, metric: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return one metric's values of both versions, over the images with a finite value of both, in one order."""
    images = sorted(new.values[metric].keys() & old.values[metric].keys())
    new_values = np.array([new.values[metric][image] for image in images])
    old_values = np.array([old.values[metric][image] for image in images])
    common = np.isfinite(new_values) & np.isfinite(old_values)
    return new_values[common], old_values[common]


def _describe_gaps(new: VersionScores, old: VersionScores, metric: str, num_common: int) -> str:
    """Tell how many images the comparison leaves out, such as those with an infinite PSNR; empty for none."""
    left_out = len(new.values[metric].keys() | old.values[metric].keys()) - num_common
    return f" ({left_out} images left out, without a finite value of both)" if left_out else ""


def _read_scores(registry: Registry, version: ModelVersion) -> VersionScores:
    """Return the values of a version's last validation.

    Raises `TrackingError`.
    """
    log = registry.read_validation(version)
    last_values = {} if log.last_step is None else log.at(log.last_step)
    values = {f"{prefix}/{metric}": images for (prefix, metric), images in last_values.items()}

    set_digests = {}
    for entry in version.tags.get(VALIDATION_SETS_TAG, "").split():
        prefix, _, digest = entry.partition("=")
        set_digests[prefix] = digest

    return VersionScores(str(version), values, set_digests)
