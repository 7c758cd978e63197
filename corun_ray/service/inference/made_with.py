"""What the restored images of a folder were made with, so that `--resume` never mixes images of two kinds."""

import hashlib
import json

import torch

from corun_ray.config.tasks import DehazeSection
from corun_ray.service.data.listing import RESTORED_MARK
from corun_ray.service.models.sources import Model
from corun_ray.service.storage import StorageError, locate

SELF_ENSEMBLE_FILE = "self_ensemble.txt"
"""Its presence in the output says that the images there were restored with `self_ensemble`."""
SELF_ENSEMBLE_TEXT = "The images of this folder are means over the restorations of eight flips and turns.\n"
EXPECTED = "another output, or no --resume, was expected"


def digest_model(model: Model) -> str:
    """Compute a SHA-256 over a model's network and weights."""
    digest = hashlib.sha256(json.dumps([model.spec.type, model.spec.args], sort_keys=True, default=str).encode())
    for name, tensor in sorted((model.params or {}).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def refuse_other_ensemble(section: DehazeSection, files: set[str]) -> None:
    """Refuse to resume among `files` of the output that were made with another `self_ensemble`.

    Raises `StorageError`.
    """
    made_by_ensemble = SELF_ENSEMBLE_FILE in files
    if made_by_ensemble != section.self_ensemble:
        made = "with" if made_by_ensemble else "without"
        raise StorageError(f"cannot resume in {section.output}: its images were made {made} self_ensemble; {EXPECTED}")


def refuse_other_model(section: DehazeSection, model: Model) -> None:
    """Refuse to resume in an output whose images another model has made.

    An output of an earlier version, which has no record, is taken.

    Raises `StorageError`.
    """
    place = locate(section.output).child(RESTORED_MARK)
    if not place.exists():
        return
    try:
        record = json.loads(place.read())
        digest, source = record["sha256"], record["source"]
    except (ValueError, KeyError, TypeError):
        raise StorageError(f"{place.uri}: not a record of a model; {EXPECTED}") from None
    if digest != digest_model(model):
        by = f"by another model ({source})" if source != section.model else f"by other weights of {source}"
        raise StorageError(f"cannot resume in {section.output}: its images were made {by}; {EXPECTED}")


def record_settings(section: DehazeSection, model: Model) -> None:
    """Record in the output what its images are made with.

    Raises `StorageError`.
    """
    output = locate(section.output)
    mark = output.child(SELF_ENSEMBLE_FILE)
    if section.self_ensemble:
        mark.write(SELF_ENSEMBLE_TEXT.encode())
    else:
        mark.delete()

    record = {"source": section.model, "sha256": digest_model(model)}
    output.child(RESTORED_MARK).write(json.dumps(record, indent=1).encode() + b"\n")
