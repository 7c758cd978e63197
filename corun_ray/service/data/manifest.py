"""The manifest: which files a run trains on, and which it sets aside and why."""

import hashlib
import json
import posixpath
from collections import defaultdict
from dataclasses import dataclass, field

from pyarrow.fs import FileInfo

from corun_ray.config.jobs import ColabatorJob, TrainingJob
from corun_ray.config.training import PairedSection
from corun_ray.core.data.images import decode_image
from corun_ray.core.errors import UserError
from corun_ray.core.inference.pictures import ImageU8
from corun_ray.service.data.packs import Pack, is_pack, open_pack
from corun_ray.service.storage import locate

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
DEPTH_SUFFIXES = frozenset({".npy", ".png", ".mat"})


@dataclass(frozen=True)
class Manifest:
    """Files by their paths relative to the data roots; a path is also the image's key."""

    clear: tuple[str, ...]
    depth: tuple[str, ...] | None
    """One depth map an image of `clear`; None: procedural depth."""
    hazy: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    """URI → reason, of images that cannot be used and of files that match nothing."""
    paired_hazy: tuple[str, ...] | None = None
    """One degraded image an image of `clear`; None: `clear` is degraded by synthesis."""
    packs: dict[str, Pack] = field(default_factory=dict)
    """The data roots that are packs, by their `Location.uri`, as they were when the manifest was built."""

    @property
    def num_images(self) -> int:
        """Images in the training data, unusable ones included."""
        return len(self.clear) + len(self.hazy) + len(self.skipped)

    def read_image(self, root: str, key: str) -> bytes:
        """An image file below a data root; raises `BadImage` and the errors of `Location`."""
        place = locate(root)
        pack = self.packs.get(place.uri)
        return place.child(key).read() if pack is None else pack.read(pack.images[key])

    def read_depth(self, root: str, key: str) -> bytes:
        """A depth map's file, as `read_image` reads an image's."""
        place = locate(root)
        pack = self.packs.get(place.uri)
        return place.child(key).read() if pack is None else pack.read(pack.depths[key])

    def compute_digest(self) -> str:
        """A SHA-256 over the names: the same for the same data."""
        content = json.dumps([self.clear, self.depth, self.hazy, self.paired_hazy])
        return hashlib.sha256(content.encode()).hexdigest()


class ManifestError(UserError):
    """Data that holds nothing to train on; the message is one line a mistake."""


def strip_suffix(path: str) -> str:
    """A relative path without its last suffix: what pairs an image with its depth or truth."""
    return posixpath.splitext(path)[0]


def filter_by_suffix(files: list[str], suffixes: frozenset[str]) -> list[str]:
    """The files of these kinds; hidden ones (.DS_Store and the like) are never data."""
    visible = (file for file in files if not posixpath.basename(file).startswith("."))
    return [file for file in visible if posixpath.splitext(file)[1].lower() in suffixes]


def pair_by_stem(
    images: list[str], partners: list[str], what: str
) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Image → partner of the same stem, and the reasons for images and for partners that are left over."""
    by_stem = defaultdict(list)
    for partner in partners:
        by_stem[strip_suffix(partner)].append(partner)
    pairs, unpaired = {}, {}
    for image in images:
        found = by_stem.get(strip_suffix(image), [])
        if len(found) == 1:
            pairs[image] = found[0]
        else:
            unpaired[image] = (
                f"{len(found)} {what}s match it: {', '.join(found)}" if found else f"no {what} of this name"
            )
    stems = {strip_suffix(image) for image in images}
    unused = {p: f"{what} of no image" for p in partners if strip_suffix(p) not in stems}
    return pairs, unpaired, unused


def list_images(uri: str, key: str) -> list[str]:
    """The names of `list_image_files`; raises as that does."""
    return [*list_image_files(uri, key)]


def list_image_files(uri: str, key: str) -> dict[str, FileInfo]:
    """The images under a folder or URI, with what is known of their files.

    Raises `ManifestError`, naming the job file's `key`, where there are none or a pack of them, and `StorageError`.
    """
    files = locate(uri).list_infos()
    if is_pack(files):
        raise ManifestError(f"{key}: {uri} holds a pack, from which only training data are read")
    return {image: files[image] for image in _images_among([*files], uri, key)}


def _images_among(files: list[str], uri: str, key: str) -> list[str]:
    images = filter_by_suffix(files, IMAGE_SUFFIXES)
    if not images:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ManifestError(f"{key}: no images ({kinds}) among the {len(files)} files below {uri}")
    return images


def build_manifest(job: TrainingJob) -> Manifest:
    """Lists and pairs the job's training data; raises `StorageError` and `ManifestError`."""
    packs: dict[str, Pack] = {}
    hazy = tuple(_images(job.data.hazy, "data.hazy", packs)) if isinstance(job, ColabatorJob) else ()
    if job.data.paired is not None:
        return _paired(job.data.paired, hazy, packs)
    assert job.data.clear is not None
    clear = _images(job.data.clear, "data.clear", packs)
    if job.data.depth is None:
        return Manifest(tuple(clear), None, hazy, packs=packs)
    maps = _depth_maps(job.data.depth, packs)
    pairs, unpaired, unused = pair_by_stem(clear, maps, "depth map")
    if not pairs:
        raise ManifestError(f"data.depth: none of the {len(maps)} depth maps below {job.data.depth} matches an image")
    skipped = _below(job.data.clear, unpaired) | _below(job.data.depth, unused)
    return Manifest(tuple(pairs), tuple(pairs.values()), hazy, skipped, packs=packs)


def _images(uri: str, key: str, packs: dict[str, Pack]) -> list[str]:
    found = _pack_or_files(uri, packs)
    return [*found.images] if isinstance(found, Pack) else _images_among(found, uri, key)


def _depth_maps(uri: str, packs: dict[str, Pack]) -> list[str]:
    found = _pack_or_files(uri, packs)
    if not isinstance(found, Pack):
        return filter_by_suffix(found, DEPTH_SUFFIXES)
    if not found.depths:
        raise ManifestError(f"data.depth: the pack in {uri} holds no depth (corun-ray pack --depth adds it)")
    return [*found.depths]


def _pack_or_files(uri: str, packs: dict[str, Pack]) -> Pack | list[str]:
    """The pack in a folder, added to `packs`, or the folder's files."""
    place = locate(uri)
    if place.uri not in packs:
        files = place.list_infos()
        if not is_pack(files):
            return [*files]
        packs[place.uri] = open_pack(place, files)
    return packs[place.uri]


def _paired(paired: PairedSection, hazy: tuple[str, ...], packs: dict[str, Pack]) -> Manifest:
    degraded = _images(paired.hazy, "data.paired.hazy", packs)
    clean = _images(paired.clear, "data.paired.clear", packs)
    pairs, unpaired, unused = pair_by_stem(degraded, clean, "clean image")
    if not pairs:
        raise ManifestError(
            f"data.paired.clear: none of the {len(clean)} images below {paired.clear} "
            f"is named like one below {paired.hazy}"
        )
    skipped = _below(paired.hazy, unpaired) | _below(paired.clear, unused)
    return Manifest(tuple(pairs.values()), None, hazy, skipped, tuple(pairs), packs)


def _below(root: str, reasons: dict[str, str]) -> dict[str, str]:
    return {posixpath.join(root, name): reason for name, reason in reasons.items()}


def pair_validation_images(hazy_root: str, clear_root: str | None, section: str) -> list[tuple[str, str | None]]:
    """Hazy images and their truth (None without `clear_root`), by relative path.

    Raises `StorageError`, and `ManifestError` naming the first images without a truth and the job file's `section`.
    """
    hazy = list_images(hazy_root, f"{section}.hazy")
    if clear_root is None:
        return [(key, None) for key in hazy]
    pairs, unpaired, _ = pair_by_stem(hazy, list_images(clear_root, f"{section}.clear"), "clear image")
    if unpaired:
        named = "; ".join(f"{posixpath.join(hazy_root, key)}: {reason}" for key, reason in list(unpaired.items())[:3])
        raise ManifestError(f"{section}.clear: {len(unpaired)} of {len(hazy)} hazy images have no truth ({named})")
    return list(pairs.items())


@dataclass(frozen=True)
class ValidationSet:
    """One set of held-out images, and the prefix under which its metrics go: `val`, or `val/NAME`."""

    prefix: str
    hazy_root: str
    clear_root: str | None
    pairs: list[tuple[str, str | None]]


def list_validation_sets(job: TrainingJob) -> list[ValidationSet]:
    """The job's `data.validation`, if any, then its `data.validation_sets`.

    Raises the errors of `pair_validation_images`.
    """
    sections = {} if job.data.validation is None else {("val", "data.validation"): job.data.validation}
    for name, section in job.data.validation_sets.items():
        sections[f"val/{name}", f"data.validation_sets.{name}"] = section
    return [
        ValidationSet(prefix, section.hazy, section.clear, pair_validation_images(section.hazy, section.clear, key))
        for (prefix, key), section in sections.items()
    ]


def load_image(root: str, key: str) -> ImageU8:
    """Reads and decodes one image; raises `StorageError` and `BadImage`."""
    return decode_image(locate(root).child(key).read())
