"""Files of weights, read as data and never run as code.

Pretrained weights come as `.safetensors`, `.pt` or `.pth`. Checkpoints are written as one safetensors file of named
tensors and a record of plain values: the format holds no pickle.
"""

import argparse
import codecs
import json
import os
import pathlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from corun_ray.core.errors import UserError, format_error
from corun_ray.core.foreign import HEAD_BYTES, recognise_foreign

if TYPE_CHECKING:  # Who only checks that files are there need not wait for torch.
    from torch import Tensor

RECORD_KEY = "corun_ray"
"""The file's only metadata entry: the record, as a JSON object."""

ZIP_START = b"PK\x03\x04"

OBJECT_PATTERN = re.compile(r"GLOBAL (?:\S+\.)?(\w+)")
"""Where torch's error names the class of an object that is not plain data."""

CUT_WORDS = ("zip archive", "central directory", "incomplete metadata", "file not fully covered")
"""Words of torch and safetensors for a file that ends too early."""

NOT_PLAIN = "save its state dict alone (model.state_dict()) with torch.save, or as .safetensors"
"""The advice for a file that holds objects beside tensors and plain values."""

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
    it. NumPy scalars and arrays, paths and namespaces of arguments are plain values too.

    Raises `WeightsError` for a file that holds anything else; such a file is never run.
    """
    head = _read_head(path)
    try:
        # A header of safetensors, after the 8 bytes of its length: people rename files.
        if path.suffix == ".safetensors" or head[8:9] == b"{":
            from safetensors.torch import load_file

            return load_file(path)

        import torch

        # torch warns of TorchScript programs, which are then refused. Files of the zip format can be mapped; those of
        # the format before it cannot.
        is_zip = head.startswith(ZIP_START)
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(_list_plain_types()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        raise WeightsError(f"{path}: {_explain(error)}") from None


def _read_head(path: Path) -> bytes:
    """Read the first bytes of a file of weights.

    Raises `WeightsError` also for what is often saved in its place: a page, a pointer, an answer of a server, nothing.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({format_error(error)})") from None

    # torch, too, goes by this suffix.
    if path.suffix == ".safetensors" and head.startswith(ZIP_START):
        raise WeightsError(f"{path}: a file of torch.save, not of safetensors; rename it to .pth")
    foreign = recognise_foreign(head)
    if foreign is not None and path.suffix != ".json":
        raise WeightsError(f"{path}: {foreign.what}, not weights; {foreign.advice}")
    return head


def _list_plain_types() -> list[Any]:
    """List the classes beside tensors that are data, under every name that files give them."""
    scalar, reconstruct = np._core.multiarray.scalar, np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    types: list[Any] = [np.ndarray, np.dtype, codecs.encode, argparse.Namespace, pathlib.PosixPath]
    for name in np.dtypes.__all__:
        types.append(getattr(np.dtypes, name))

    # NumPy 1 had other names for both functions.
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        types += [(scalar, f"{module}.scalar"), (reconstruct, f"{module}._reconstruct")]
    types.append((pathlib.PurePosixPath, "pathlib.WindowsPath"))
    return types


def _explain(error: Exception) -> str:
    """Say in one line why a file is not one of plain tensors.

    torch's own text is long, and advises to run what the file holds.
    """
    text = str(error)
    if "TorchScript" in text:
        return f"a TorchScript program, not weights; {NOT_PLAIN}"

    found = OBJECT_PATTERN.search(text)
    if found is not None:
        return f"holds objects of the class {found[1]}, which are code; {NOT_PLAIN}"
    if "not in a subdirectory" in text:
        return "a zip archive, but not one of torch.save; unpack it first"
    if any(words in text for words in CUT_WORDS):
        return "not whole: the end of the file is missing; the file must be downloaded or copied again"
    if "weights_only" in text or isinstance(error, EOFError):
        return "not a file of plain tensors (of torch.save or .safetensors), or not a whole one"
    return f"not a file of plain tensors ({format_error(error)})"


# --- Tensors with a record ---


def write_tensors(path: Path, tensors: "dict[str, Tensor]", record: dict[str, Any]) -> None:
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


def read_tensors(path: Path) -> "tuple[dict[str, Tensor], dict[str, Any]]":
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


def _read(path: Path, with_tensors: bool) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """Read a file of `write_tensors`.

    Without `with_tensors`, only its record.
    """
    from safetensors import safe_open

    _read_head(path)
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt" if with_tensors else "np") as file:
            metadata = file.metadata() or {}
            if with_tensors:
                for name in file.keys():  # noqa: SIM118
                    tensors[name] = file.get_tensor(name)
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
