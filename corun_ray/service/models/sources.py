"""Models: what a job starts from, and what a source names (an MLflow URI, a checkpoint folder or URI, a file).

A model as plain files: weights, configuration, and its card."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from corun_ray.config.jobs import TrainingJob
from corun_ray.core.errors import UserError
from corun_ray.core.networks.build import build_network, probe_network
from corun_ray.core.networks.spec import NetworkError, NetworkSpec
from corun_ray.core.training.checkpoints import (
    CheckpointError,
    LoadedNetwork,
    load_network,
    load_params,
    read_spec,
    save_model,
)
from corun_ray.service.models.flavor import ABOUT_FOLDER
from corun_ray.service.models.registry import download_model
from corun_ray.service.models.tracking import TrackingError, get_tracking_uri
from corun_ray.service.models.user_code import UserCode, collect_code, install_code, write_code
from corun_ray.service.storage import StorageError, locate

MLFLOW_SCHEMES = ("models:/", "runs:/")
RECOGNISED = "spandrel"
"""The network type of a job whose checkpoint says which architecture it is."""


class ModelSourceError(UserError):
    """A source that gives no model; the message is one line."""


@dataclass(frozen=True)
class Model:
    """A network as plain data, to be built in any process."""

    spec: NetworkSpec
    params: dict[str, Tensor] | None
    """None: freshly initialised."""
    code: UserCode

    def build(self) -> nn.Module:
        """The network, on the CPU."""
        install_code(self.code)
        network = build_network(self.spec)
        if self.params is not None:
            network.load_state_dict(self.params)
        return network


def fetch_model(source: str, tracking: str) -> Model:
    """The model that `source` names; `tracking` is the MLflow of `models:/` and `runs:/`.

    A class of a user's own is looked for in the registered model, whose code runs as it would under pyfunc, or in
    the current folder. Raises `ModelSourceError`.
    """
    with open_source(source, tracking) as path:
        loaded, code = load_source(source, path)
    return Model(loaded.spec, loaded.network.state_dict(), code)


def load_source(source: str, path: Path) -> tuple[LoadedNetwork, UserCode]:
    """The network of what `open_source` gives, and the code of a class of a user's own; raises `ModelSourceError`."""
    code_folder = path.parent.parent / "code" if source.startswith(MLFLOW_SCHEMES) else Path.cwd()
    try:
        code = collect_code(read_spec(path).type, code_folder) if path.is_dir() else {}
        install_code(code)
        return load_network(path), code
    except (CheckpointError, NetworkError) as error:
        raise ModelSourceError(f"{source}: {error}") from None


def load_starting_model(job: TrainingJob, folder: Path) -> Model:
    """What a job trains: its network with the parameters of `network.init`, if any; a class may lie in `folder`.

    Raises `ModelSourceError`, naming the key of the job file.
    """
    section = job.network
    if section.type == RECOGNISED:
        if section.init is None:
            raise ModelSourceError("network.init: missing (type spandrel takes the architecture from a checkpoint)")
        model = fetch_model(section.init, get_tracking_uri(job))
    else:
        model = Model(get_network_spec(job), None, collect_code(section.type, folder))
    try:
        network = model.build()
        if section.type != RECOGNISED and section.init is not None:
            model = replace(model, params=_initial_params(job, network))
        if section.type != "corun":
            probe_network(network, job.data.patch_px)
    except NetworkError as error:
        raise ModelSourceError(f"network: {error}") from None
    return model


def get_network_spec(job: TrainingJob) -> NetworkSpec:
    """The network that the job file asks for."""
    section = job.network
    if section.type == "corun":
        return NetworkSpec("corun", {"stages": section.stages, "width": section.width})
    return NetworkSpec(section.type, json.loads(json.dumps(section.args)))


def _initial_params(job: TrainingJob, network: nn.Module) -> dict[str, Tensor]:
    source = job.network.init
    assert source is not None
    with open_source(source, get_tracking_uri(job)) as path:
        try:
            if job.network.type == "corun":
                found = load_network(path)
                _refuse_other_sizes(job, found.spec)
                return found.network.state_dict()
            return load_params(path, network)
        except (CheckpointError, NetworkError) as error:
            raise ModelSourceError(f"network.init: {error}") from None


def _refuse_other_sizes(job: TrainingJob, found: NetworkSpec) -> None:
    if found.type != "corun":
        raise ModelSourceError(f"network.type: corun, but {job.network.init} is a {found.type}")
    for key in ("stages", "width"):
        wanted = getattr(job.network, key)
        if wanted != found.args[key]:
            raise ModelSourceError(f"network.{key}: {wanted}, but {job.network.init} has {found.args[key]}")


@contextmanager
def open_source(source: str, tracking: str) -> Iterator[Path]:
    """The file or checkpoint folder behind a source, on this machine for as long as the context lasts.

    Raises `ModelSourceError`.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            if source.startswith(MLFLOW_SCHEMES):
                yield download_model(tracking, source, Path(folder))
                return
            location = locate(source)
            if not location.exists():
                raise ModelSourceError(f"{source}: nothing there (expected a checkpoint folder or a .pth)")
            path = Path(location.path) if location.is_local else location.download(Path(folder))
        except (TrackingError, StorageError) as error:
            raise ModelSourceError(str(error)) from None
        yield path


def pull_model(source: str, folder: Path, tracking: str) -> list[Path]:
    """Writes the model that `source` names into a new or empty folder; returns the files.

    The code of a class of a user's own comes along. Raises `ModelSourceError`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelSourceError(f"{folder}: exists and is not empty (a new or empty folder was expected)")
    with open_source(source, tracking) as path:
        loaded, code = load_source(source, path)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(folder, loaded)
        write_code(code, folder)
        about = path.parent.parent / ABOUT_FOLDER
        if about.is_dir():
            shutil.copytree(about, folder, dirs_exist_ok=True)
    return sorted(path for path in folder.rglob("*") if path.is_file())
