"""Checkpoints: the published file, the folder that a run saves, and plain model folders.

A published checkpoint is a `torch.save`d dict of two state dicts: `params` (student) and `params_ema` (its moving
average, the one to use). A run's checkpoint folder holds the same file and the network's description, so that every
checkpoint is also a model.

A run resumes from another file, in which there is no pickle: `training.safetensors`, with both networks and the
optimizer. So the folder holds the weights twice: the price of resuming without reading the published file.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from corun_ray.core.networks.build import build_network
from corun_ray.core.networks.finite import find_bad_weight
from corun_ray.core.networks.spandrel import recognise
from corun_ray.core.networks.spec import CORUN_TYPE, NetworkError, NetworkSpec
from corun_ray.core.training.checkpoint_record import (
    NETWORK_FILE,
    SPEC_FILE,
    TRAINING_FILE,
    CheckpointError,
    check_record,
    find_training_file,
    read_file,
)
from corun_ray.core.training.state import TrainState
from corun_ray.core.weights import read_tensors, read_weights, write_tensors

# A plain model folder, with the names that other tools expect.
MODEL_FILE, CONFIG_FILE = "model.safetensors", "config.json"

WRAPPINGS = (
    "params_ema",
    "params-ema",
    "ema_state_dict",
    "model_ema",
    "params",
    "model_state_dict",
    "state_dict",
    "model",
    "net",
)
"""Where other authors put the state dict, the moving average first: it is the better one."""

COMPILED_PART = "_orig_mod"
"""The part that torch.compile adds to the names of what it compiles."""

COUNTERS = ("total_ops", "total_params")
"""The last parts of the names under which a profiler leaves its counts among the weights."""

OPTIMIZER = "optim"
"""The names of optimizers' states begin so; these hold tensors too."""

NAMES_SHOWN = 3
NAMES_MAX_CHARS = 300


class DivergedCheckpoint(CheckpointError):
    """A checkpoint with weights that are not finite."""


@dataclass(frozen=True)
class LoadedNetwork:
    """A network with its weights, and its description."""

    network: nn.Module
    spec: NetworkSpec


# --- Networks ---


def load_network(path: Path) -> LoadedNetwork:
    """Load the moving-average network of a checkpoint, in eval mode.

    `path` is a checkpoint folder, a plain model folder or a bare published file (`.pth`, `.safetensors`). A bare file
    must hold CORUN or an architecture that spandrel recognises. Raises `CheckpointError`.
    """
    try:
        # A folder describes its network. Of a bare file, the names and shapes of the tensors tell the network.
        if path.is_dir():
            spec, file = read_spec(path), _find_network_file(path)
            params = _read_params(file)
        else:
            file = path
            spec, params = _recognise(_read_params(path))
        network = build_network(spec)
    except NetworkError as error:
        raise CheckpointError(f"{path}: {error}") from None

    params = _strip_to_fit(params, network.state_dict())
    _check_fit(params, network.state_dict(), f"{file}: does not fit {type(network).__name__}")
    network.load_state_dict(params)
    _refuse_bad_weights(network.state_dict(), network, file)
    return LoadedNetwork(network.eval(), spec)


def load_params(path: Path, network: nn.Module) -> dict[str, Tensor]:
    """Load the parameters of a checkpoint folder or file.

    These are the moving average, or else the only parameters, in the number types of `network`.

    Raises `CheckpointError` unless they fit `network`.
    """
    file = _find_network_file(path) if path.is_dir() else path
    expected = network.state_dict()
    params = _strip_to_fit(_read_params(file), expected)
    _check_fit(params, expected, f"{file}: does not fit {type(network).__name__}")

    # A file may hold its weights in half precision.
    converted = {name: tensor.to(expected[name].dtype) for name, tensor in params.items()}
    _refuse_bad_weights(converted, network, file)
    return converted


def read_spec(folder: Path) -> NetworkSpec:
    """Read the network's description in a folder.

    The folder is a checkpoint folder or a plain model folder.

    Raises `CheckpointError`.
    """
    file = folder / CONFIG_FILE
    if not file.exists():
        file = folder / SPEC_FILE

    try:
        return NetworkSpec.from_json(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no checkpoint folder (no {SPEC_FILE} in it)") from None
    except NetworkError as error:
        raise CheckpointError(f"{file}: {error}") from None


def save_network(path: Path, student: nn.Module, teacher: nn.Module) -> None:
    """Save both networks in the published format.

    All tensors are moved to the CPU.
    """
    content = {}
    for name, network in (("params", student), ("params_ema", teacher)):
        content[name] = {key: tensor.cpu() for key, tensor in network.state_dict().items()}
    torch.save(content, path)


def save_model(folder: Path, loaded: LoadedNetwork) -> None:
    """Save a plain model folder.

    It holds the weights as safetensors and the network's description, and no pickle.
    """
    record = {"type": loaded.spec.type, "args": loaded.spec.args}
    write_tensors(folder / MODEL_FILE, loaded.network.state_dict(), record)
    (folder / CONFIG_FILE).write_text(loaded.spec.to_json())


# --- Runs ---


def save_run(folder: Path, state: TrainState, spec: NetworkSpec, extra: dict[str, Any]) -> None:
    """Save a checkpoint folder: a model, and the training state.

    `extra` holds plain JSON values only (the id of the pool's snapshot, the seed). Raises `TypeError` or `ValueError`
    where it does not, and `Diverged`, before anything is written, for weights that are not finite.
    """
    state.refuse_bad_weights()

    # The model: networks in the published format, and their description.
    save_network(folder / NETWORK_FILE, state.student, state.teacher)
    (folder / SPEC_FILE).write_text(spec.to_json())

    # The training state: tensors, and a record of plain values.
    record = state.collect_values() | {"extra": extra}
    write_tensors(folder / TRAINING_FILE, state.collect_tensors(), record)


def load_run(folder: Path, state: TrainState, spec: NetworkSpec) -> dict[str, Any]:
    """Restore a run from a checkpoint folder.

    Changes `state`, which is a run of `spec`, in place. Returns the `extra` of `save_run`.

    Raises `CheckpointError`; `state` then stays as it was.
    """
    # The folder must be of the same network.
    found = read_spec(folder)
    if found != spec:
        raise CheckpointError(f"{folder}: a run of {found.type} {found.args}, not of {spec.type} {spec.args}")

    # Check everything before anything changes: the record's entries, the tensors, and AdamW's groups.
    file = find_training_file(folder)
    tensors, record = read_file(file, read_tensors)
    check_record(record, file)

    expected = state.list_expected_tensors(tensors.keys())
    _check_fit(tensors, expected, f"{file}: does not fit this run", same_dtypes=True)

    for part, network in (("student", state.student), ("teacher", state.teacher)):
        weights = {name: tensors[f"{part}.{name}"] for name in network.state_dict()}
        _refuse_bad_weights(weights, network, file)

    groups = state.collect_values()["param_groups"]
    if not _is_like(record["param_groups"], groups):
        raise CheckpointError(f"{file}: its param_groups are not those of this run's AdamW, like {groups}")

    state.restore(tensors, record)
    return record["extra"]


# --- Finding and reading files ---


def _find_network_file(folder: Path) -> Path:
    """Find the weights in a checkpoint folder or plain model folder."""
    model_file = folder / MODEL_FILE
    return model_file if model_file.exists() else folder / NETWORK_FILE


def _read_params(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a file, plain or wrapped.

    What stands beside the tensors (numbers, texts, a profiler's counts) is left out.
    """
    content: Any = read_file(path, read_weights)

    # Unwrap, as deep as there are wrappings.
    while isinstance(content, dict):
        wrapping = _find_wrapping(content, path)
        if wrapping is None:
            break
        content = content[wrapping]

    params = {}
    if isinstance(content, dict):
        for name, value in content.items():
            if isinstance(name, str) and _is_weight(name, value):
                parts = [part for part in name.split(".") if part != COMPILED_PART]
                params[".".join(parts)] = value if isinstance(value, Tensor) else torch.from_numpy(value)
    if not params:
        raise CheckpointError(f"{path}: no state dict in it (plain, or under {', '.join(WRAPPINGS)})")
    return params


def _find_wrapping(content: Mapping[Any, Any], path: Path) -> Any | None:
    """Find the entry that holds the state dict: the first of `WRAPPINGS`, or else the only one with weights.

    Returns None where the weights are not wrapped, or there are none. Raises `CheckpointError` for several entries.
    """
    for name in WRAPPINGS:
        if isinstance(content.get(name), dict):
            return name
    if any(isinstance(value, Tensor) for value in content.values()):
        return None

    found = []
    for name, value in content.items():
        if not str(name).startswith(OPTIMIZER) and _holds_weights(value):
            found.append(name)
    if len(found) > 1:
        raise CheckpointError(
            f"{path}: {len(found)} state dicts in it ({_shorten(list(map(str, found)))}), none under a known name "
            f"({', '.join(WRAPPINGS)}); save the network's alone"
        )
    return found[0] if found else None


def _holds_weights(value: object) -> bool:
    """Tell whether an entry is a dict that holds tensors under names, at any depth."""
    if not isinstance(value, dict):
        return False
    for name, inner in value.items():
        if isinstance(name, str) and (isinstance(inner, Tensor) or _holds_weights(inner)):
            return True
    return False


def _is_weight(name: str, value: object) -> bool:
    """Tell whether an entry of a state dict is a weight: a tensor or a NumPy array, and no counter."""
    return isinstance(value, Tensor | np.ndarray) and name.rpartition(".")[2] not in COUNTERS


def _list_unprefixed(params: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """List a state dict under its own names, and without the parts that all names begin with, one part less each.

    Wrappers of a network (data-parallel training, an average, a trainer's class) put a part before every name. Single
    numbers beside these are a wrapper's own: how many networks are averaged, by which decay.
    """
    versions = [params]
    while True:
        last = versions[-1]
        own = [name for name in last if "." not in name]
        heads = {name.partition(".")[0] for name in last if "." in name}
        if len(heads) != 1 or any(last[name].ndim for name in own):
            return versions
        versions.append({name.partition(".")[2]: tensor for name, tensor in last.items() if "." in name})


def _strip_to_fit(params: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the names that a network expects, or as they are where no version has these names."""
    for version in _list_unprefixed(params):
        if version.keys() == expected.keys():
            return version
    return params


def _recognise(params: dict[str, Tensor]) -> tuple[NetworkSpec, dict[str, Tensor]]:
    """Find the network of a state dict, and the tensors under the names that it gives them.

    Raises `NetworkError` where it is neither CORUN nor a network of spandrel.
    """
    versions = _list_unprefixed(params)
    for version in versions:
        spec = _recognise_corun(version)
        if spec is not None:
            return spec, version

    # Names that all begin alike may be a network's own, so the longest names are tried first.
    for version in versions[:-1]:
        with contextlib.suppress(NetworkError):
            return recognise(version)
    return recognise(versions[-1])


def _recognise_corun(params: dict[str, Tensor]) -> NetworkSpec | None:
    """Describe CORUN by the names and shapes of its tensors.

    Returns None for another network's tensors.
    """
    # The first convolution of the first CPMM is `width 4 3 3`.
    embedding = params.get("first.trans_net.embedding.weight")
    if embedding is None or embedding.ndim != 4:
        return None

    # Between the first and the last stage, the stages are `basic.0`, `basic.1`, ...
    middle = {name.split(".")[1] for name in params if name.startswith("basic.")}
    return NetworkSpec(CORUN_TYPE, {"stages": 2 + len(middle), "width": embedding.shape[0]})


# --- Checking what was read ---


def _is_like(value: Any, example: Any) -> bool:
    """Tell whether a JSON value is built like an example.

    It has the same keys, lengths and types. An int passes for a float, and a list for a tuple.
    """
    if isinstance(example, dict):
        if not isinstance(value, dict) or value.keys() != example.keys():
            return False
        return all(_is_like(value[key], example[key]) for key in example)

    if isinstance(example, list | tuple):
        return isinstance(value, list) and len(value) == len(example) and all(map(_is_like, value, example))

    if isinstance(example, float):
        return type(value) in (int, float)
    return type(value) is type(example)


def _refuse_bad_weights(weights: Mapping[str, Tensor], network: nn.Module, file: Path) -> None:
    """Refuse weights of a network that are not finite: its training has diverged.

    Raises `DivergedCheckpoint`.
    """
    bad_weight = find_bad_weight(weights, network)
    if bad_weight is not None:
        raise DivergedCheckpoint(
            f"{file}: {bad_weight}, not finite: its training has diverged; take an earlier checkpoint"
        )


def _check_fit(params: dict[str, Tensor], expected: dict[str, Tensor], what: str, same_dtypes: bool = False) -> None:
    """Check that tensors have the expected names and shapes.

    Raises `CheckpointError`, whose message starts with `what`. With `same_dtypes`, the number types are compared too.
    """
    # Names.
    missing = [name for name in expected if name not in params]
    unexpected = [name for name in params if name not in expected]

    # Shapes and number types of the tensors that both have.
    other_shape, other_dtype = [], []
    for name, example in expected.items():
        if name not in params:
            continue
        found = params[name]
        if found.shape != example.shape:
            other_shape.append(f"{name} {tuple(found.shape)} instead of {tuple(example.shape)}")
        if same_dtypes and found.dtype != example.dtype:
            other_dtype.append(f"{name} {found.dtype} instead of {example.dtype}")

    # One message for all of them.
    faults = []
    for kind, names in (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", other_shape),
        ("of another dtype", other_dtype),
    ):
        if names:
            faults.append(f"{len(names)} tensors {kind} ({_shorten(names)})")
    if faults:
        raise CheckpointError(f"{what}: {', '.join(faults)}")


def _shorten(names: list[str]) -> str:
    """Join the first few names on one line.

    A file's names may be anything, line breaks included.
    """
    shown = " ".join(", ".join(names[:NAMES_SHOWN]).split())[:NAMES_MAX_CHARS]
    return f"{shown}, ..." if len(names) > NAMES_SHOWN else shown
