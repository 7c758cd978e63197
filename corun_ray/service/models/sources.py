"""Where a network comes from: an MLflow URI, a checkpoint folder or URI, a weights file, or a job's own section.

Some models come with this package. Also writes a model as plain files: weights, configuration and card.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from corun_ray.config.jobs import TrainingJob
from corun_ray.core.choices import SHIPPED_MODELS, PulledFormat
from corun_ray.core.errors import UserError
from corun_ray.core.networks.build import build_network, probe_network
from corun_ray.core.networks.corun import CORUN, start_as_published
from corun_ray.core.networks.spec import NetworkError, NetworkSpec
from corun_ray.core.training.checkpoint_record import CheckpointError
from corun_ray.core.training.checkpoints import LoadedNetwork, load_network, load_params, read_spec, save_model
from corun_ray.service.models.flavor import ABOUT_FOLDER, CODE_FOLDER
from corun_ray.service.models.onnx_files import OnnxError, check_packages, save_onnx
from corun_ray.service.models.registry import download_model
from corun_ray.service.models.tracking import MLFLOW_SCHEMES, TrackingError, get_tracking_uri
from corun_ray.service.models.user_code import UserCode, collect_code, install_code, write_code
from corun_ray.service.storage import StorageError, locate

SHIPPED_FOLDER = Path(__file__).with_name("shipped")
"""The models that come with this package: a plain model folder for each, with its card."""
RECOGNISED_TYPE = "spandrel"
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
        """Build the network on the CPU."""
        install_code(self.code)
        network = build_network(self.spec)
        if self.params is not None:
            network.load_state_dict(self.params)
        return network


# --- A model from a source ---


def fetch_model(source: str, tracking: str) -> Model:
    """Return the model that `source` names.

    `tracking` is the MLflow server of `models:/` and `runs:/`.
    The class of a user's own network comes from the registered model, whose code runs as it would under pyfunc, or
    else from the current folder. Raises `ModelSourceError`.
    """
    with open_source(source, tracking) as path:
        loaded, code = load_source(source, path)
    return Model(loaded.spec, loaded.network.state_dict(), code)


@contextmanager
def open_source(source: str, tracking: str) -> Iterator[Path]:
    """Yield the local file or checkpoint folder of a source.

    A download is deleted when the context ends.
    Raises `ModelSourceError`.
    """
    # The name of a shipped model comes before a folder of that name, which `./NAME` still means.
    if source in SHIPPED_MODELS:
        yield SHIPPED_FOLDER / source
        return

    with tempfile.TemporaryDirectory() as folder:
        try:
            if source.startswith(MLFLOW_SCHEMES):
                yield download_model(tracking, source, Path(folder))
                return

            location = locate(source)
            if not location.exists():
                shipped = " or ".join(SHIPPED_MODELS)
                raise ModelSourceError(f"{source}: nothing there (expected a checkpoint folder, a .pth or {shipped})")
            # Local files are used in place.
            path = Path(location.path) if location.is_local else location.download(Path(folder))
        except (TrackingError, StorageError) as error:
            raise ModelSourceError(str(error)) from None
        yield path


def load_source(source: str, path: Path) -> tuple[LoadedNetwork, UserCode]:
    """Load a source's network, and the code of its class.

    `path` is that of `open_source`. The code is empty unless the class is a user's own.
    Raises `ModelSourceError`.
    """
    # A registered model holds its checkpoint in artifacts/checkpoint, and its code beside artifacts.
    code_folder = path.parent.parent / CODE_FOLDER if source.startswith(MLFLOW_SCHEMES) else Path.cwd()
    try:
        # Only a folder has a specification that may name a user's own class.
        code = collect_code(read_spec(path).type, code_folder) if path.is_dir() else {}
        install_code(code)
        return load_network(path), code
    except (CheckpointError, NetworkError) as error:
        # Errors of a file begin with its name, which may be the source itself.
        text = str(error)
        raise ModelSourceError(text if text.startswith(f"{source}: ") else f"{source}: {text}") from None


# --- The model that a training job starts from ---


def load_starting_model(job: TrainingJob, folder: Path) -> Model:
    """Return the network that a job trains.

    The parameters come from `network.init` where the job names one.
    The class of a user's own network may be in `folder`. Raises `ModelSourceError`, naming the key of the job file.
    """
    section = job.network

    # With the type spandrel, the checkpoint decides the architecture; otherwise the job file does.
    if section.type == RECOGNISED_TYPE:
        if section.init is None:
            raise ModelSourceError("network.init: missing (type spandrel takes the architecture from a checkpoint)")
        model = fetch_model(section.init, get_tracking_uri(job))
    else:
        model = Model(get_network_spec(job), None, collect_code(section.type, folder))

    # Build the network once here: a mistake should be told before any worker starts.
    try:
        network = model.build()
        if section.type != RECOGNISED_TYPE and section.init is not None:
            params = _load_initial_params(job, section.init, network)
            model = replace(model, params=params)
        elif section.start == "published":
            model = replace(model, params=_draw_published_start(network, job.seed))
        if section.type != "corun":
            restoration = probe_network(network, job.data.patch_px)
            if restoration.transmission is None:
                _refuse_without_transmission(job)
    except NetworkError as error:
        raise ModelSourceError(f"network: {error}") from None
    return model


def _draw_published_start(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """Draw the random weights of the published code for CORUN, without touching torch's own random numbers."""
    assert isinstance(network, CORUN)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start_as_published(network)
    return network.state_dict()


def _refuse_without_transmission(job: TrainingJob) -> None:
    """Refuse keys that need a network which gives a transmission.

    Raises `ModelSourceError`.
    """
    keys = ["loss.transmission"] if job.loss.transmission else []
    for key, section in job.data.list_validation_sections().items():
        if section.transmission is not None:
            keys.append(f"{key}.transmission")
    if keys:
        raise ModelSourceError(f"{keys[0]}: {job.network.type} gives no transmission")


def get_network_spec(job: TrainingJob) -> NetworkSpec:
    """Return the network that the job file describes."""
    section = job.network
    if section.type == "corun":
        return NetworkSpec("corun", {"stages": section.stages, "width": section.width})
    # A checkpoint stores the arguments as JSON: lists, not tuples.
    return NetworkSpec(section.type, json.loads(json.dumps(section.args)))


def _load_initial_params(job: TrainingJob, source: str, network: nn.Module) -> dict[str, Tensor]:
    """Load the parameters of `network.init` for the job's network.

    Raises `ModelSourceError`.
    """
    with open_source(source, get_tracking_uri(job)) as path:
        try:
            if job.network.type != "corun":
                return load_params(path, network)
            loaded = load_network(path)
            _check_corun_size(job, loaded.spec)
            return loaded.network.state_dict()
        except (CheckpointError, NetworkError) as error:
            raise ModelSourceError(f"network.init: {error}") from None


def _check_corun_size(job: TrainingJob, found: NetworkSpec) -> None:
    """Refuse a checkpoint that is not the job's CORUN.

    Raises `ModelSourceError`.
    """
    if found.type != "corun":
        raise ModelSourceError(f"network.type: corun, but {job.network.init} is a {found.type}")

    for key in ("stages", "width"):
        wanted = getattr(job.network, key)
        if wanted != found.args[key]:
            raise ModelSourceError(f"network.{key}: {wanted}, but {job.network.init} has {found.args[key]}")


# --- A model as plain files ---


def pull_model(
    source: str, folder: Path, tracking: str, half: bool = False, file_format: PulledFormat = "safetensors"
) -> list[Path]:
    """Write a source's model as plain files; return them.

    `folder` must be new or empty. With `half`, the weights are rounded to float16; ONNX has float32 alone.
    The code of a user's own class is written too, but for ONNX, which needs none. Raises `ModelSourceError`.
    """
    if file_format == "onnx":
        check_packages()
        if half:
            raise ModelSourceError("--half: not with --format onnx, whose weights are float32")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelSourceError(f"{folder}: exists and is not empty (a new or empty folder was expected)")

    with open_source(source, tracking) as path:
        # Load before the folder is made: a source that fails leaves nothing behind.
        loaded, code = load_source(source, path)
        if half:
            _round_to_half(loaded.network, source)

        # Write beside first: an export that fails leaves nothing behind either.
        with tempfile.TemporaryDirectory() as name:
            finished = Path(name) / "model"
            finished.mkdir()
            _save_files(finished, source, loaded, code, file_format)
            shutil.copytree(finished, folder, dirs_exist_ok=True)

        # A registered model has its description two levels above the checkpoint.
        about = path.parent.parent / ABOUT_FOLDER
        if about.is_dir():
            shutil.copytree(about, folder, dirs_exist_ok=True)

    return sorted(path for path in folder.rglob("*") if path.is_file())


def _save_files(folder: Path, source: str, loaded: LoadedNetwork, code: UserCode, file_format: PulledFormat) -> None:
    """Write a loaded model's files into a folder.

    Raises `ModelSourceError` for a network that has no ONNX.
    """
    if file_format == "safetensors":
        save_model(folder, loaded)
        write_code(code, folder)
        return

    try:
        save_onnx(folder, loaded.network, loaded.spec)
    except OnnxError as error:
        raise ModelSourceError(f"{source}: {error}") from None


def _round_to_half(network: nn.Module, source: str) -> None:
    """Round a network's weights to float16.

    Raises `ModelSourceError` for weights beyond the range of float16.
    """
    # Masks of attention are infinite already.
    was_finite = {name: tensor.isfinite() for name, tensor in network.state_dict().items()}
    network.half()
    for name, tensor in network.state_dict().items():
        if (was_finite[name] & ~tensor.isfinite()).any():
            raise ModelSourceError(f"{source}: {name} does not fit into half precision (numbers up to 65504)")
