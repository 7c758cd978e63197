"""Weights of the pretrained networks that scorers and losses use: read as data, never as code.

Named tensors and a record of plain values in one safetensors file, which holds no pickle and so never runs code."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from corun_ray.core.errors import UserError, one_line

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


RECORD_KEY = "corun_ray"
"""The file's only metadata entry: the record, as a JSON object."""


def write(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Writes the file whole or not at all; raises `TypeError` or `ValueError` where `record` is not plain JSON."""
    from safetensors.torch import save

    metadata = {RECORD_KEY: json.dumps(record, allow_nan=False)}
    # Contiguous and each its own: the format has no strides and no shared memory (tied weights).
    packed = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    partial = path.with_name(f"{path.name}.partial")
    try:
        # Not the library's save_file, whose files only their owner can read.
        partial.write_bytes(save(packed, metadata))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_record(path: Path) -> dict[str, Any]:
    """The record of a file that `write` wrote; its tensors are not read. Raises `WeightsError`."""
    return _read(path, with_tensors=False)[1]


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, memory-mapped on the CPU, and the record of such a file. Raises `WeightsError`."""
    return _read(path, with_tensors=True)


def _read(path: Path, with_tensors: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()} if with_tensors else {}  # noqa: SIM118
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except Exception as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({one_line(error)})") from None
    if metadata.keys() != {RECORD_KEY}:
        raise WeightsError(f"{path}: a safetensors file, but not one with a record (metadata of just {RECORD_KEY})")
    try:
        record = json.loads(metadata[RECORD_KEY])
    except (ValueError, RecursionError):
        raise WeightsError(f"{path}: its record ({RECORD_KEY} in the metadata) is not JSON") from None
    if not isinstance(record, dict):
        raise WeightsError(f"{path}: its record ({RECORD_KEY} in the metadata) is not a JSON object")
    return tensors, record
