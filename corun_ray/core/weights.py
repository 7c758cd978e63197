"""Weights of the pretrained networks that scorers and losses use: read as data, never as code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from corun_ray.core.errors import UserError

WeightsSource = Callable[[str], Path]
"""File name → its path on this machine, checked; raises `WeightsError` where it cannot be had."""


class WeightsError(UserError):
    """Weights that are missing or not what they should be; the message is one line."""


def no_weights(name: str) -> Path:
    """The source of a job that names none."""
    raise WeightsError(f"{name} is needed, but the job names no weights folder")


def read_weights(path: Path) -> Any:
    """The tensors and plain values of a `.safetensors`, `.pt` or `.pth` file, memory-mapped where the format allows.

    Raises `WeightsError` for a file that holds anything else, which is never run.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        import torch

        return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise WeightsError(f"{path}: not a file of plain tensors ({reason})") from None


def _is_zip(path: Path) -> bool:
    """Whether a torch file has the present format; the one before it cannot be memory-mapped."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"
