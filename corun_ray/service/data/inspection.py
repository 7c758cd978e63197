"""Opens images before a job uses them, in the job's own way, and tells which cannot be used.

Files are read and decoded whole: half a JPEG has a good header. A sample is spread over the whole list of images; a
short list is opened whole.
"""

import functools
import posixpath
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from corun_ray.config.jobs import ColabatorJob, PretrainJob, TrainingJob
from corun_ray.config.pairing import TruthSection
from corun_ray.core.data.depth import DepthMap
from corun_ray.core.data.images import BadImage, decode_depth, decode_image
from corun_ray.core.data.samples import fit_truth
from corun_ray.service.data.manifest import (
    Manifest,
    ManifestError,
    ValidationSet,
    build_manifest,
    list_validation_sets,
    load_transmission,
    read_file,
    refuse_other_sizes,
)
from corun_ray.service.data.unusable import BlameFile, UnusableFile, join_first_reasons

SAMPLED_IMAGES = 32
"""Images of each kind that are opened, unless all are asked for."""
THREADS = 4
"""Images that are opened at once: a store takes its time to answer, and decoded images take memory."""
NAMED_UNUSABLE = 10
"""Unusable files that the refusal of a job names."""

T = TypeVar("T")
ReadImage = Callable[[str, str], bytes]
"""Data root and path → the content of the file."""
Progress = Callable[[str, int, int], None]
"""Called with the key of the images, the number of images opened and the number of images to open."""


class Opened(NamedTuple):
    """An image that can be used."""

    uri: str
    height_px: int
    width_px: int


@dataclass(frozen=True)
class Inspection:
    """What was found among one kind of images of a job."""

    key: str
    """The images' key in the job file, such as `data.clear`."""
    num_images: int
    num_opened: int
    """Number of images that were opened, usable or not."""
    usable: list[Opened]
    unusable: dict[str, str]
    """URI → reason, of the files for which images cannot be used."""

    @property
    def is_sample(self) -> bool:
        """Whether some images were not opened."""
        return self.num_opened < self.num_images

    def describe_smaller(self, side_px: int) -> str | None:
        """Describe the images that are smaller than a patch of `side_px`; None where there are none."""
        smaller = [image for image in self.usable if min(image.height_px, image.width_px) < side_px]
        if not smaller:
            return None
        uri, height_px, width_px = smaller[0]
        count = f"{len(smaller)} of {self.num_opened} opened are smaller than a patch of {side_px} px"
        return f"{self.key}: {count} and will be enlarged; the first: {uri} ({width_px} x {height_px} px)"

    def refuse_if_nothing_is_usable(self) -> None:
        """Refuse images none of which can be used.

        Raises `ManifestError`, naming the first of them.
        """
        if self.unusable and not self.usable:
            images = f"{self.num_images} images"
            if self.is_sample:
                images = f"{self.num_opened} images opened (of {self.num_images})"
            reasons = join_first_reasons(self.unusable, NAMED_UNUSABLE)
            raise ManifestError(f"{self.key}: none of the {images} can be used; the first: {reasons}")


@dataclass(frozen=True)
class Inspector:
    """Opens images of jobs, at most `limit` of each kind; None: all."""

    limit: int | None = SAMPLED_IMAGES
    progress: Progress | None = None

    def inspect_training(self, job: TrainingJob, manifest: Manifest) -> list[Inspection]:
        """Open the training images, each with its depth map or its clean one.

        Raises `StorageError`.
        """
        found = [self._inspect_clear(job, manifest) if job.data.paired is None else self._inspect_paired(job, manifest)]
        if isinstance(job, ColabatorJob):
            found.append(self.inspect_images(job.data.hazy, manifest.hazy, "data.hazy", manifest.read_image))
        return found

    def inspect_validation(self, job: TrainingJob, sets: Sequence[ValidationSet]) -> list[Inspection]:
        """Open the images of validation sets, each with its truth and its true transmission.

        Raises `StorageError`.
        """
        found = []
        for (key, section), one in zip(job.data.list_validation_sections().items(), sets, strict=True):
            found.append(self._inspect(key, one.pairs, functools.partial(_open_validation_image, section, one)))
        return found

    def inspect_pairs(self, section: TruthSection, pairs: Sequence[tuple[str, str | None]], key: str) -> Inspection:
        """Open the images of an evaluation, each with its truth.

        Raises `StorageError`.
        """
        return self._inspect(key, pairs, lambda pair: _open_pair(section, *pair, read_file))

    def inspect_images(self, root: str, images: Sequence[str], key: str, read: ReadImage = read_file) -> Inspection:
        """Open images that stand alone.

        Raises `StorageError`.
        """
        return self._inspect(key, images, lambda image: _open_image(root, image, read))

    def inspect_results(self, hazy_root: str, root: str, results: Mapping[str, str], key: str) -> Inspection:
        """Open results of another method (hazy image → result), each with its hazy image.

        Raises `StorageError`.
        """
        return self._inspect(key, list(results.items()), lambda pair: _open_result(hazy_root, root, *pair))

    def _inspect_paired(self, job: TrainingJob, manifest: Manifest) -> Inspection:
        """Open degraded images with their clean ones."""
        paired = job.data.paired
        assert paired is not None and manifest.paired_hazy is not None
        pairs = list(zip(manifest.paired_hazy, manifest.clear, strict=True))
        return self._inspect("data.paired", pairs, lambda pair: _open_pair(paired, *pair, manifest.read_image))

    def _inspect_clear(self, job: TrainingJob, manifest: Manifest) -> Inspection:
        """Open clear images with their depth maps, if any."""
        root = job.data.clear
        assert root is not None
        if manifest.depth is None:
            return self.inspect_images(root, manifest.clear, "data.clear", manifest.read_image)

        pairs = list(zip(manifest.clear, manifest.depth, strict=True))
        return self._inspect("data.clear and data.depth", pairs, lambda pair: _open_with_depth(job, manifest, *pair))

    def _inspect(self, key: str, items: Sequence[T], open_one: Callable[[T], Opened]) -> Inspection:
        """Open a sample of images, several at once."""

        def attempt(item: T) -> Opened | UnusableFile:
            try:
                return open_one(item)
            except UnusableFile as error:
                return error

        chosen = choose_evenly(items, self.limit)
        found = Inspection(key, len(items), len(chosen), [], {})
        with ThreadPoolExecutor(THREADS) as threads:
            for done, result in enumerate(threads.map(attempt, chosen), 1):
                if isinstance(result, Opened):
                    found.usable.append(result)
                else:
                    found.unusable[result.uri] = result.reason
                if self.progress is not None:
                    self.progress(key, done, len(chosen))
        return found


def choose_evenly(items: Sequence[T], limit: int | None) -> Sequence[T]:
    """Choose at most `limit` items, evenly spread, the first and the last among them."""
    if limit is None or len(items) <= limit:
        return items
    return [items[place * (len(items) - 1) // (limit - 1)] for place in range(limit)]


# --- What follows from the findings ---


def prepare_data(job: TrainingJob) -> Manifest:
    """Return the manifest of a job whose data can be used, as far as a sample of its images tells.

    Raises the errors of `build_manifest`, and `ManifestError`, naming the first files that cannot be used.
    """
    manifest, sets = build_manifest(job), list_validation_sets(job)
    refuse_other_sizes(job, manifest, sets)
    inspector = Inspector()
    refuse_unusable(job, manifest, inspector.inspect_training(job, manifest))
    for one in inspector.inspect_validation(job, sets):
        one.refuse_if_nothing_is_usable()
    return manifest


def refuse_unusable(job: TrainingJob, manifest: Manifest, training: Sequence[Inspection]) -> None:
    """Refuse training data of which nothing, or too little, can be used.

    Raises `ManifestError`, naming the first files.
    """
    for one in training:
        one.refuse_if_nothing_is_usable()

    # Files that match nothing count like those that cannot be used.
    bad_files = dict(manifest.skipped)
    for one in training:
        bad_files |= one.unusable
    text = describe_excess(job, manifest, bad_files)
    if text is not None:
        raise ManifestError(text)


def describe_excess(job: TrainingJob, manifest: Manifest, bad_files: Mapping[str, str]) -> str | None:
    """Describe more bad files (URI → reason) than `data.max_bad_fraction` allows; None where it allows them."""
    if len(bad_files) <= job.data.max_bad_fraction * manifest.num_images:
        return None
    return (
        f"{len(bad_files)} of {manifest.num_images} images cannot be used, more than data.max_bad_fraction "
        f"({job.data.max_bad_fraction:g}) allows; the first: {join_first_reasons(bad_files, NAMED_UNUSABLE)}"
    )


def find_largest_patch_px(job: TrainingJob) -> int:
    """Return the largest patch of a run's phases."""
    sides_px = [job.data.patch_px]
    if isinstance(job, PretrainJob):
        sides_px += [step.patch_px for step in job.train.progressive]
    return max(sides_px)


# --- Opening one image ---


def _open_image(root: str, key: str, read: ReadImage) -> Opened:
    """Decode an image; raises `UnusableFile`."""
    with BlameFile(root, key):
        height_px, width_px, _ = decode_image(read(root, key)).shape
    return Opened(posixpath.join(root, key), height_px, width_px)


def _open_pair(section: TruthSection, hazy_key: str, clear_key: str | None, read: ReadImage) -> Opened:
    """Decode an image and its truth, if any; raises `UnusableFile`."""
    image = _open_image(section.hazy, hazy_key, read)
    if section.clear is None or clear_key is None:
        return image

    with BlameFile(section.clear, clear_key):
        clear = decode_image(read(section.clear, clear_key))
    # A pair of two sizes is known by its hazy image.
    with BlameFile(section.hazy, hazy_key):
        fit_truth(clear, (image.height_px, image.width_px, 3), crop_truth=section.crop_truth)
    return image


def _open_result(hazy_root: str, root: str, hazy_key: str, result_key: str) -> Opened:
    """Decode a result and its hazy image; raises `UnusableFile`."""
    hazy = _open_image(hazy_root, hazy_key, read_file)
    result = _open_image(root, result_key, read_file)
    with BlameFile(root, result_key):
        if result[1:] != hazy[1:]:
            sides = [f"{image.width_px} x {image.height_px} px" for image in (result, hazy)]
            raise BadImage(f"result of {sides[0]}, the hazy image has {sides[1]}")
    return result


def _open_with_depth(job: TrainingJob, manifest: Manifest, clear_key: str, depth_key: str) -> Opened:
    """Decode a clear image and its depth map; raises `UnusableFile`."""
    assert job.data.clear is not None and job.data.depth is not None
    image = _open_image(job.data.clear, clear_key, manifest.read_image)
    with BlameFile(job.data.depth, depth_key):
        content = manifest.read_depth(job.data.depth, depth_key)
        pixels = decode_depth(content, posixpath.splitext(depth_key)[1].lower())
        DepthMap.from_pixels(pixels, job.data.depth_kind).fit_to_image(image.height_px, image.width_px)
    return image


def _open_validation_image(
    section: TruthSection, validation_set: ValidationSet, pair: tuple[str, str | None]
) -> Opened:
    """Decode an image, its truth and its true transmission, if any; raises `UnusableFile`."""
    hazy_key, clear_key = pair
    image = _open_pair(section, hazy_key, clear_key, read_file)
    if validation_set.transmission_root is None:
        return image

    with BlameFile(validation_set.transmission_root, validation_set.transmissions[hazy_key]):
        refuse_other_transmission(load_transmission(validation_set, hazy_key).shape, (image.height_px, image.width_px))
    return image


def refuse_other_transmission(found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuse a true transmission of another size than its image; both are height and width.

    Raises `BadImage`.
    """
    if found != expected:
        sides = [f"{width_px} x {height_px} px" for height_px, width_px in (found, expected)]
        raise BadImage(f"true transmission of {sides[0]}, its image has {sides[1]}")
