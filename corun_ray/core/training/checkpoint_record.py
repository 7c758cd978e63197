"""The files of a run's checkpoint folder, and what is read of them without torch: the plain values of the training.

torch takes seconds to import, and who only lists a run's labels has no tensor to read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from corun_ray.core.errors import UserError
from corun_ray.core.weights import WeightsError, read_tensors_record

NETWORK_FILE = "network.pth"
SPEC_FILE = "network.json"
TRAINING_FILE = "training.safetensors"
EARLIER_TRAINING_FILE = "training.pt"

RECORD_TYPES = {"step": int, "num_images_seen": int, "param_groups": list, "extra": dict}
"""The entries of a training file's record, and their types."""

T = TypeVar("T")


class CheckpointError(UserError):
    """A file that is no checkpoint or does not fit; the message says what was found and expected."""


def read_record(folder: Path) -> dict[str, Any]:
    """Read the plain values of a checkpoint folder.

    These are `step`, `num_images_seen` and `extra`.

    Raises `CheckpointError`.
    """
    file = find_training_file(folder)
    record = read_file(file, read_tensors_record)
    check_record(record, file)
    return {name: record[name] for name in ("step", "num_images_seen", "extra")}


def find_training_file(folder: Path) -> Path:
    """Find the training state in a checkpoint folder.

    Raises `CheckpointError` for the format of earlier versions.
    """
    file = folder / TRAINING_FILE
    if not file.exists() and (folder / EARLIER_TRAINING_FILE).exists():
        raise CheckpointError(
            f"{folder}: a checkpoint of an earlier version ({EARLIER_TRAINING_FILE} instead of {TRAINING_FILE}), "
            f"from which no run can resume; its {NETWORK_FILE} is still a model"
        )
    return file


def read_file(path: Path, reader: Callable[[Path], T]) -> T:
    """Read a file; raise `CheckpointError` in the place of `WeightsError`."""
    try:
        return reader(path)
    except WeightsError as error:
        raise CheckpointError(str(error)) from None


def check_record(record: dict[str, Any], file: Path) -> None:
    """Check that a record has exactly the entries of `RECORD_TYPES`.

    Raises `CheckpointError`.
    """
    if {name: type(value) for name, value in record.items()} != RECORD_TYPES:
        expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in RECORD_TYPES.items())
        raise CheckpointError(f"{file}: its record is not that of a run, which is exactly {expected}")
    if record["step"] < 0 or record["num_images_seen"] < 0:
        raise CheckpointError(f"{file}: its step and num_images_seen are not both 0 or more")
