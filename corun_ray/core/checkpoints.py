"""Checkpoints: the format in circulation, in and out, and the folder that a run saves.

A published checkpoint is a `torch.save`d dict of two state dicts, `params` (student) and `params_ema` (its moving
average, the one to use). A run's checkpoint folder holds the same file and the network's description, so that any
checkpoint is also a model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corun_ray.core.network_spec import CORUN_TYPE, NetworkError, NetworkSpec, one_line
from corun_ray.core.networks import build
from corun_ray.core.spandrel_networks import recognise
from corun_ray.core.state import TrainState
from corun_ray.core.weights import WeightsError, read_weights

NETWORK_FILE = "network.pth"
SPEC_FILE = "network.json"
TRAINING_FILE = "training.pt"
# Where other authors put the state dict; the moving average is the better one.
WRAPPINGS = ("params_ema", "params-ema", "params", "model_state_dict", "state_dict", "model", "net")
NAMES_SHOWN = 3


class CheckpointError(ValueError):
    """A file that is no checkpoint or does not fit; the message says what was found and expected."""


@dataclass(frozen=True)
class LoadedNetwork:
    """A network with its weights, and what builds it without them."""

    network: nn.Module
    spec: NetworkSpec


def load_network(path: Path) -> LoadedNetwork:
    """The moving-average network, in eval mode, of a checkpoint folder or of a bare published file.

    A bare file (`.pth`, `.safetensors`) must hold CORUN or an architecture that spandrel recognises. Raises
    `CheckpointError`.
    """
    try:
        if path.is_dir():
            spec, file = read_spec(path), path / NETWORK_FILE
            params = _params(file)
        else:
            file, params = path, _params(path)
            spec, params = _corun(params) or recognise(params)
        network = build(spec)
    except NetworkError as error:
        raise CheckpointError(f"{path}: {error}") from None
    _refuse_misfit(params, network, file)
    network.load_state_dict(params)
    return LoadedNetwork(network.eval(), spec)


def load_params(path: Path, network: nn.Module) -> dict[str, Tensor]:
    """The moving-average (else the only) parameters of a checkpoint folder or file, checked to be `network`'s.

    Raises `CheckpointError`.
    """
    file = path / NETWORK_FILE if path.is_dir() else path
    params = _params(file)
    _refuse_misfit(params, network, file)
    return params


def read_spec(folder: Path) -> NetworkSpec:
    """The network of a checkpoint folder; raises `CheckpointError`."""
    file = folder / SPEC_FILE
    try:
        return NetworkSpec.from_json(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no checkpoint folder (no {SPEC_FILE} in it)") from None
    except NetworkError as error:
        raise CheckpointError(f"{file}: {error}") from None


def save_network(path: Path, student: nn.Module, teacher: nn.Module) -> None:
    """Writes the published format; tensors are moved to the CPU."""
    parts = {"params": student, "params_ema": teacher}
    torch.save({name: {k: v.cpu() for k, v in net.state_dict().items()} for name, net in parts.items()}, path)


def save_run(folder: Path, state: TrainState, spec: NetworkSpec, extra: dict[str, Any]) -> None:
    """A checkpoint folder: the networks in the published format, and what else continuing the run needs.

    `extra` holds plain values only (the id of the pool's snapshot, the seed).
    """
    save_network(folder / NETWORK_FILE, state.student, state.teacher)
    (folder / SPEC_FILE).write_text(spec.to_json())
    torch.save({**state.training_record(), "extra": extra}, folder / TRAINING_FILE)


def load_run(folder: Path, state: TrainState, spec: NetworkSpec) -> dict[str, Any]:
    """Restores `state`, a run of `spec`, in place from a checkpoint folder and returns its `extra`.

    Raises `CheckpointError`.
    """
    found = read_spec(folder)
    if found != spec:
        raise CheckpointError(f"{folder}: a run of {found.type} {found.args}, not of {spec.type} {spec.args}")
    networks, record = _read(folder / NETWORK_FILE), _read(folder / TRAINING_FILE)
    try:
        state.restore(networks["params"], networks["params_ema"], record)
        return record["extra"]
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: does not fit this run ({one_line(error)})") from None


def _read(path: Path) -> Any:
    try:
        return read_weights(path)
    except WeightsError as error:
        raise CheckpointError(str(error)) from None


def _params(path: Path) -> dict[str, Tensor]:
    """The state dict of a file, out of its wrapping and without the prefix of data-parallel training."""
    content = _read(path)
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


def _refuse_misfit(params: dict[str, Tensor], network: nn.Module, where: Path) -> None:
    expected = network.state_dict()
    reshaped = [
        f"{name} {tuple(params[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in params and params[name].shape != expected[name].shape
    ]
    kinds = {
        "missing": [name for name in expected if name not in params],
        "unexpected": [name for name in params if name not in expected],
        "of another shape": reshaped,
    }
    faults = [f"{len(found)} tensors {kind} ({_first(found)})" for kind, found in kinds.items() if found]
    if faults:
        raise CheckpointError(f"{where}: does not fit {type(network).__name__}: {', '.join(faults)}")


def _first(names: list[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
