"""Folders of results: images that another method has made of the hazy images of an evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from corun_ray.config.tasks import EvaluateSection
from corun_ray.core.choices import SHIPPED_MODELS
from corun_ray.service.data.listing import IMAGE_SUFFIXES, ManifestError, filter_by_suffix
from corun_ray.service.data.manifest import pair_results
from corun_ray.service.data.pairing import get_stem
from corun_ray.service.storage import locate

REGISTRY_SCHEMES = ("models:/", "runs:/")
WEIGHT_SUFFIXES = frozenset({".pth", ".pt", ".ckpt", ".safetensors"})
"""A folder with such a file holds a model."""


@dataclass(frozen=True)
class ResultImages:
    """The results of one method, by the hazy images that they were made of."""

    root: str
    images: Mapping[str, str]
    """Hazy image → result, by relative path."""


def find_results(section: EvaluateSection, hazy: Sequence[str]) -> dict[str, ResultImages]:
    """Find the folders of results among `evaluate.models`, by name.

    `hazy` are the hazy images by relative path; each needs a result of its name.

    Raises `StorageError`, and `ManifestError` for a folder that lacks results, and for one that holds results and a
    model, or neither.
    """
    found = {}
    for name, source in section.models.items():
        key = f"evaluate.models.{name}"
        images = _list_result_images(source, hazy, key)
        if images:
            # Workers do not run in the driver's folder.
            found[name] = ResultImages(locate(source).uri, pair_results(section.hazy, hazy, images, key))
    return found


def holds_results(source: str) -> bool:
    """Tell whether the source of a model is a folder of images without a model.

    Raises `StorageError`.
    """
    files = _list_folder(source) or []
    return bool(filter_by_suffix(files, IMAGE_SUFFIXES)) and not filter_by_suffix(files, WEIGHT_SUFFIXES)


def _list_folder(source: str) -> list[str] | None:
    """List the files of a source that is a folder; None for any other source."""
    if source in SHIPPED_MODELS or source.startswith(REGISTRY_SCHEMES):
        return None
    place = locate(source)
    return place.list_files() if place.is_folder() else None


def _list_result_images(source: str, hazy: Sequence[str], key: str) -> list[str]:
    """List the images of a folder of results; none where the source is a model, or nothing is there.

    Raises the errors of `find_results`.
    """
    files = _list_folder(source)
    if files is None:
        return []

    # A folder with weights is a model: its card may have a picture, but no image named like a hazy one.
    images = filter_by_suffix(files, IMAGE_SUFFIXES)
    weights = filter_by_suffix(files, WEIGHT_SUFFIXES)
    if weights:
        stems = {get_stem(image) for image in hazy}
        results = [image for image in images if get_stem(image) in stems]
        if results:
            both = f"both a model ({weights[0]}) and results ({results[0]})"
            raise ManifestError(f"{key}: {source} holds {both}; expected a folder of one of them")
        return []

    if not images:
        raise ManifestError(
            f"{key}: {source} holds neither a model (a checkpoint folder) nor images (results of another method), "
            f"among {len(files)} files"
        )
    return images
