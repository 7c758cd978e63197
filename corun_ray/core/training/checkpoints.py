"""Checkpoints: the format in circulation, in and out, the folder that a run saves, and plain model folders.

A published checkpoint is a `torch.save`d dict of two state dicts, `params` (student) and `params_ema` (its moving
average, the one to use). A run's checkpoint folder holds the same file and the network's description, so that any
checkpoint is also a model.

What the run goes on from is another file, in which there is no pickle: `training.safetensors`, with both networks and
the optimizer. So the weights are in the folder twice, which is the price of resuming without reading the first file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from corun_ray.core.errors import UserError
from corun_ray.core.networks.build import build_network
from corun_ray.core.networks.spandrel import recognise
from corun_ray.core.networks.spec import CORUN_TYPE, NetworkError, NetworkSpec
from corun_ray.core.training.state import TrainState
from corun_ray.core.weights import WeightsError, read_tensors, read_tensors_record, read_weights, write_tensors

T = TypeVar("T")

NETWORK_FILE = "network.pth"
SPEC_FILE = "network.json"
MODEL_FILE, CONFIG_FILE = "model.safetensors", "config.json"
"""The same two of a plain model folder, under the names that other tools expect."""
TRAINING_FILE = "training.safetensors"
EARLIER_TRAINING_FILE = "training.pt"
# Where other authors put the state dict; the moving average is the better one.
WRAPPINGS = ("params_ema", "params-ema", "params", "model_state_dict", "state_dict", "model", "net")
NAMES_SHOWN = 3
RECORD_TYPES = {"step": int, "num_images_seen": int, "param_groups": list, "extra": dict}


class CheckpointError(UserError):
    """A file that is no checkpoint or does not fit; the message says what was found and expected."""


@dataclass(frozen=True)
class LoadedNetwork:
    """A network with its weights, and what builds it without them."""

    network: nn.Module
    spec: NetworkSpec


def load_network(path: Path) -> LoadedNetwork:
    """The moving-average network, in eval mode, of a checkpoint folder, plain model folder or bare published file.

    A bare file (`.pth`, `.safetensors`) must hold CORUN or an architecture that spandrel recognises. Raises
    `CheckpointError`.
    """
    try:
        if path.is_dir():
            spec, file = read_spec(path), _network_file(path)
            params = _params(file)
        else:
            file, params = path, _params(path)
            spec, params = _corun(params) or recognise(params)
        network = build_network(spec)
    except NetworkError as error:
        raise CheckpointError(f"{path}: {error}") from None
    _refuse_misfit(params, network.state_dict(), f"{file}: does not fit {type(network).__name__}")
    network.load_state_dict(params)
    return LoadedNetwork(network.eval(), spec)


def load_params(path: Path, network: nn.Module) -> dict[str, Tensor]:
    """The moving-average (else the only) parameters of a checkpoint folder or file, checked to be `network`'s.

    Raises `CheckpointError`.
    """
    file = _network_file(path) if path.is_dir() else path
    params = _params(file)
    _refuse_misfit(params, network.state_dict(), f"{file}: does not fit {type(network).__name__}")
    return params


def read_spec(folder: Path) -> NetworkSpec:
    """The network of a checkpoint folder or plain model folder; raises `CheckpointError`."""
    file = folder / (CONFIG_FILE if (folder / CONFIG_FILE).exists() else SPEC_FILE)
    try:
        return NetworkSpec.from_json(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no checkpoint folder (no {SPEC_FILE} in it)") from None
    except NetworkError as error:
        raise CheckpointError(f"{file}: {error}") from None


def save_model(folder: Path, loaded: LoadedNetwork) -> None:
    """A plain model folder: the weights alone as safetensors, and what builds the network; no pickle in it."""
    record = {"type": loaded.spec.type, "args": loaded.spec.args}
    write_tensors(folder / MODEL_FILE, loaded.network.state_dict(), record)
    (folder / CONFIG_FILE).write_text(loaded.spec.to_json())


def _network_file(folder: Path) -> Path:
    """The weights in a checkpoint folder or plain model folder."""
    return folder / (MODEL_FILE if (folder / MODEL_FILE).exists() else NETWORK_FILE)


def save_network(path: Path, student: nn.Module, teacher: nn.Module) -> None:
    """Writes the published format; tensors are moved to the CPU."""
    parts = {"params": student, "params_ema": teacher}
    torch.save({name: {k: v.cpu() for k, v in net.state_dict().items()} for name, net in parts.items()}, path)


def save_run(folder: Path, state: TrainState, spec: NetworkSpec, extra: dict[str, Any]) -> None:
    """A checkpoint folder: the networks in the published format, and all that continuing the run needs.

    `extra` holds plain JSON values only (the id of the pool's snapshot, the seed), else it raises `TypeError` or
    `ValueError`.
    """
    save_network(folder / NETWORK_FILE, state.student, state.teacher)
    (folder / SPEC_FILE).write_text(spec.to_json())
    write_tensors(folder / TRAINING_FILE, state.collect_tensors(), state.collect_values() | {"extra": extra})


def load_run(folder: Path, state: TrainState, spec: NetworkSpec) -> dict[str, Any]:
    """Restores `state`, a run of `spec`, in place from a checkpoint folder and returns its `extra`.

    Raises `CheckpointError`, and then leaves `state` as it was.
    """
    found = read_spec(folder)
    if found != spec:
        raise CheckpointError(f"{folder}: a run of {found.type} {found.args}, not of {spec.type} {spec.args}")
    file = _training_file(folder)
    tensors, record = _read(file, read_tensors)
    _refuse_other_record(record, file)
    _refuse_misfit(
        tensors, state.list_expected_tensors(tensors.keys()), f"{file}: does not fit this run", same_dtypes=True
    )
    groups = state.collect_values()["param_groups"]
    if not _is_like(record["param_groups"], groups):
        raise CheckpointError(f"{file}: its param_groups are not those of this run's AdamW, like {groups}")
    state.restore(tensors, record)
    return record["extra"]


def read_record(folder: Path) -> dict[str, Any]:
    """The `step`, `num_images_seen` and `extra` of a checkpoint folder, plain values; raises `CheckpointError`."""
    file = _training_file(folder)
    record = _read(file, read_tensors_record)
    _refuse_other_record(record, file)
    return {name: record[name] for name in ("step", "num_images_seen", "extra")}


def _training_file(folder: Path) -> Path:
    file = folder / TRAINING_FILE
    if not file.exists() and (folder / EARLIER_TRAINING_FILE).exists():
        raise CheckpointError(
            f"{folder}: a checkpoint of an earlier version ({EARLIER_TRAINING_FILE} instead of {TRAINING_FILE}), "
            f"from which no run goes on; its {NETWORK_FILE} is still a model"
        )
    return file


def _refuse_other_record(record: dict[str, Any], file: Path) -> None:
    """Refuses what lacks one of the entries of `RECORD_TYPES`, has another, or one of another type."""
    if {name: type(value) for name, value in record.items()} != RECORD_TYPES:
        expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in RECORD_TYPES.items())
        raise CheckpointError(f"{file}: its record is not that of a run, which is exactly {expected}")
    if record["step"] < 0 or record["num_images_seen"] < 0:
        raise CheckpointError(f"{file}: its step and num_images_seen are not both 0 or more")


def _is_like(value: Any, example: Any) -> bool:
    """Whether a JSON value has the keys, lengths and types of an example; ints pass for floats, lists for tuples."""
    if isinstance(example, dict):
        return (
            isinstance(value, dict)
            and value.keys() == example.keys()
            and all(_is_like(value[key], example[key]) for key in example)
        )
    if isinstance(example, list | tuple):
        return isinstance(value, list) and len(value) == len(example) and all(map(_is_like, value, example))
    return type(value) in ((int, float) if isinstance(example, float) else (type(example),))


def _read(path: Path, reader: Callable[[Path], T]) -> T:
    try:
        return reader(path)
    except WeightsError as error:
        raise CheckpointError(str(error)) from None


def _params(path: Path) -> dict[str, Tensor]:
    """The state dict of a file, out of its wrapping and without the prefix of data-parallel training."""
    content: Any = _read(path, read_weights)
    if isinstance(content, dict):
        content = next((content[name] for name in WRAPPINGS if isinstance(content.get(name), dict)), content)
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: no state dict in it (plain, or under {', '.join(WRAPPINGS)})")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: no state dict in it ({name} is {type(value).__name__}, not a tensor)")
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return content


def _corun(params: dict[str, Tensor]) -> tuple[NetworkSpec, dict[str, Tensor]] | None:
    """CORUN's stages and width follow from the names and shapes; None for another network's."""
    embedding = params.get("first.trans_net.embedding.weight")
    if embedding is None or embedding.ndim != 4:
        return None
    stages = 2 + len({name.split(".")[1] for name in params if name.startswith("basic.")})
    return NetworkSpec(CORUN_TYPE, {"stages": stages, "width": embedding.shape[0]}), params


def _refuse_misfit(
    params: dict[str, Tensor], expected: dict[str, Tensor], what: str, same_dtypes: bool = False
) -> None:
    """Raises `CheckpointError`, starting with `what`, unless names and shapes (and dtypes) are those expected."""
    shared = [name for name in expected if name in params]
    kinds = {
        "missing": [name for name in expected if name not in params],
        "unexpected": [name for name in params if name not in expected],
        "of another shape": [
            f"{name} {tuple(params[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in shared
            if params[name].shape != expected[name].shape
        ],
        "of another dtype": [
            f"{name} {params[name].dtype} instead of {expected[name].dtype}"
            for name in shared
            if same_dtypes and params[name].dtype != expected[name].dtype
        ],
    }
    faults = [f"{len(found)} tensors {kind} ({_first(found)})" for kind, found in kinds.items() if found]
    if faults:
        raise CheckpointError(f"{what}: {', '.join(faults)}")


def _first(names: list[str]) -> str:
    # A file's names may be anything, line breaks included.
    shown = " ".join(", ".join(names[:NAMES_SHOWN]).split())[:300]
    return shown + (", ..." if len(names) > NAMES_SHOWN else "")
