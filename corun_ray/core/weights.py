"""Files of weights, read as data and never run as code.

Pretrained weights come as `.safetensors`, `.pt` or `.pth`. Checkpoints are written as one safetensors file of named
tensors and a record of plain values: the format holds no pickle.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from corun_ray.core.errors import UserError, format_error

RECORD_KEY = "corun_ray"
"""The file's only metadata entry: the record, as a JSON object."""

WeightsSource = Callable[[str], Path]
"""File name → its checked path on this machine; raises `WeightsError` where the file cannot be had."""


class WeightsError(UserError):
    """Weights that are missing or not what they should be; the message is one line."""


# --- Pretrained weights ---


def refuse_weights(name: str) -> Path:
    """Refuse any file of weights.

    The source of a job without a weights folder. Raises `WeightsError`.
    """
    raise WeightsError(f"{name} is needed, but the job names no weights folder")


def read_weights(path: Path) -> Any:
    """Read tensors and plain values of a weights file.

    The file is `.safetensors`, `.pt` or `.pth`. Tensors lie on the CPU and are memory-mapped where the format allows
    it.

    Raises `WeightsError` for a file that holds anything else; such a file is never run.
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
        raise WeightsError(f"{path}: not a file of plain tensors ({format_error(error)})") from None


def _is_zip(path: Path) -> bool:
    """Return whether a torch file can be memory-mapped.

    Files of the zip format can be mapped; those of the format before it cannot.
    """
    with path.open("rb") as file:
        return file.read(2) == b"PK"


# --- Tensors with a record ---


def write_tensors(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write tensors and a record to one safetensors file.

    Writes the file whole or not at all.

    Raises `TypeError` or `ValueError` where `record` is not plain JSON.
    """
    from safetensors.torch import save

    metadata = {RECORD_KEY: json.dumps(record, allow_nan=False)}

    # The format has neither strides nor shared memory (tied weights): give each tensor contiguous memory of its own.
    packed = {}
    for name, tensor in tensors.items():
        packed[name] = tensor.detach().to("cpu", copy=True).contiguous()

    # Write beside the target, then rename: a reader never sees half a file.
    partial = path.with_name(f"{path.name}.partial")
    try:
        # The library's save_file would create files that only their owner can read.
        partial.write_bytes(save(packed, metadata))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `write_tensors`.

    Returns the tensors, memory-mapped on the CPU, and the record.

    Raises `WeightsError` for any other file.
    """
    return _read(path, with_tensors=True)


def read_tensors_record(path: Path) -> dict[str, Any]:
    """Read only the record of a file of `write_tensors`.

    Raises `WeightsError` for any other file.
    """
    return _read(path, with_tensors=False)[1]


def _read(path: Path, with_tensors: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `write_tensors`.

    Without `with_tensors`, only its record.
    """
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if with_tensors:
                for name in file.keys():  # noqa: SIM118
                    tensors[name] = file.get_tensor(name)
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except Exception as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({format_error(error)})") from None

    # Refuse safetensors files of other programs, then records that are not JSON objects.
    if metadata.keys() != {RECORD_KEY}:
        raise WeightsError(f"{path}: a safetensors file, but not one with a record (just {RECORD_KEY} in the metadata)")
    try:
        record = json.loads(metadata[RECORD_KEY])
    except (ValueError, RecursionError):
        raise WeightsError(f"{path}: its record ({RECORD_KEY} in the metadata) is not JSON") from None
    if not isinstance(record, dict):
        raise WeightsError(f"{path}: its record ({RECORD_KEY} in the metadata) is not a JSON object")

    return tensors, record
