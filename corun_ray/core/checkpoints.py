"""CORUN checkpoints: the format in circulation, in and out, and the folder that a run saves.

A published checkpoint is a `torch.save`d dict of two state dicts, `params` (student) and `params_ema` (its moving
average, the one to use). A run's checkpoint folder holds the same file, so that any checkpoint is also a model.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corun_ray.core.corun import CORUN
from corun_ray.core.state import TrainState

NETWORK_FILE = "corun.pth"
TRAINING_FILE = "training.pt"


class CheckpointError(ValueError):
    """A file that is no CORUN checkpoint; the message says what was found and expected."""


def load_state_dicts(path: Path) -> dict[str, dict[str, Tensor]]:
    """The state dicts of a published `.pth`; raises `CheckpointError`. Read as data only, never as code."""
    content = _read(path)
    if not isinstance(content, dict) or not isinstance(content.get("params_ema", content.get("params")), dict):
        raise CheckpointError(f"{path}: no `params_ema` in it; a CORUN checkpoint has `params` and `params_ema`")
    return {name: content[name] for name in ("params", "params_ema") if name in content}


def build_network(state_dict: dict[str, Tensor], where: str) -> CORUN:
    """The network whose stages and width follow from the names and shapes of `state_dict`; raises `CheckpointError`."""
    embedding = state_dict.get("first.trans_net.embedding.weight")
    if not isinstance(embedding, Tensor) or embedding.ndim != 4:
        raise CheckpointError(f"{where}: its tensors are not those of CORUN (no first.trans_net.embedding.weight)")
    stages = 2 + len({name.split(".")[1] for name in state_dict if name.startswith("basic.")})
    try:
        network = CORUN(stages, width=embedding.shape[0])
        network.load_state_dict(state_dict)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{where}: does not fit a CORUN of {stages} stages ({_reason(error)})") from None
    return network


def load_network(path: Path) -> CORUN:
    """The moving-average network of a published `.pth` or of a checkpoint folder; raises `CheckpointError`."""
    file = path / NETWORK_FILE if path.is_dir() else path
    state_dicts = load_state_dicts(file)
    return build_network(state_dicts.get("params_ema") or state_dicts["params"], str(file)).eval()


def save_network(path: Path, student: CORUN, teacher: CORUN) -> None:
    """Writes the published format; tensors are moved to the CPU."""
    parts = {"params": student, "params_ema": teacher}
    torch.save({name: {k: v.cpu() for k, v in net.state_dict().items()} for name, net in parts.items()}, path)


def save_run(folder: Path, state: TrainState, extra: dict[str, Any]) -> None:
    """A checkpoint folder: the networks in the published format, and what else continuing the run needs.

    `extra` holds plain values only (the id of the pool's snapshot, the seed).
    """
    save_network(folder / NETWORK_FILE, state.student, state.teacher)
    torch.save({**state.training_record(), "extra": extra}, folder / TRAINING_FILE)


def load_run(folder: Path, state: TrainState) -> dict[str, Any]:
    """Restores `state` in place from a checkpoint folder and returns its `extra`; raises `CheckpointError`."""
    networks = load_state_dicts(folder / NETWORK_FILE)
    record = _read(folder / TRAINING_FILE)
    try:
        state.restore(networks["params"], networks["params_ema"], record)
        return record["extra"]
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: does not fit this run ({_reason(error)})") from None


def _read(path: Path) -> Any:
    """The tensors and plain values of a file; what else it holds is refused, never run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:
        raise CheckpointError(f"{path}: not a torch checkpoint of plain tensors ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """An error in one line, however long it is."""
    return " ".join(str(error).split())[:300] or type(error).__name__
