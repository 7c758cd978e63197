"""The manifest: which files a run trains on, and which it skips and why. Also the job's validation sets."""

import hashlib
import json
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from pyarrow.fs import FileInfo

from corun_ray.config.jobs import ColabatorJob, TrainingJob
from corun_ray.config.pairing import TruthSection, compile_pattern
from corun_ray.config.training import PairedSection, ValidationSection
from corun_ray.core.data.images import BadImage, ImageU8, decode_depth, decode_image
from corun_ray.core.data.samples import fit_truth
from corun_ray.service.data.listing import (
    DEPTH_SUFFIXES,
    IMAGE_SUFFIXES,
    Listing,
    ManifestError,
    filter_by_suffix,
    list_folder,
)
from corun_ray.service.data.packs import Pack, is_pack, open_pack
from corun_ray.service.data.pairing import (
    NAMED_FILES,
    Pairing,
    find_key,
    get_stem,
    pair_by_pattern,
    pair_by_stem,
    strip_suffix,
)
from corun_ray.service.places import find_below
from corun_ray.service.storage import MissingFile, locate, split_options

TRIED_PAIRS = 3
"""Pairs whose sizes are compared before a job starts."""


# --- The training data ---


@dataclass(frozen=True)
class Manifest:
    """Training files by their paths relative to the data roots; a path is also the image's key."""

    clear: tuple[str, ...]
    depth: tuple[str, ...] | None
    """The depth map of each image of `clear`; None: procedural depth."""
    hazy: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    """URI → reason, of images that cannot be used and of files that match nothing."""
    paired_hazy: tuple[str, ...] | None = None
    """The degraded image of each image of `clear`; None: haze is synthesised."""
    packs: dict[str, Pack] = field(default_factory=dict)
    """The data roots that are packs, by their `Location.uri`, as they were when the manifest was built."""
    passed_over: dict[str, str] = field(default_factory=dict)
    """Data root → `.heic 2, .txt 1`: files of other kinds, by number."""
    files: str = ""
    """SHA-256 over names and sizes of the images, and over the depth maps' names without suffix."""
    versions: dict[str, str] = field(default_factory=dict)
    """Data root → SHA-256 over names, sizes and times of its files: another one where any file is another."""

    @property
    def num_images(self) -> int:
        """Number of images in the training data, unusable ones included."""
        return len(self.clear) + len(self.hazy) + len(self.skipped)

    def read_image(self, root: str, key: str) -> bytes:
        """Read an image file of a data root.

        Raises `BadImage` and the errors of `Location`.
        """
        place = locate(root)
        pack = self.packs.get(place.uri)
        return place.child(key).read() if pack is None else pack.read(pack.images[key])

    def read_depth(self, root: str, key: str) -> bytes:
        """Read a depth map's file of a data root.

        Raises as `read_image` does.
        """
        place = locate(root)
        pack = self.packs.get(place.uri)
        return place.child(key).read() if pack is None else pack.read(pack.depths[key])

    def compute_digest(self) -> str:
        """Compute a SHA-256 over the names: equal for equal data."""
        content = json.dumps([self.clear, self.depth, self.hazy, self.paired_hazy])
        return hashlib.sha256(content.encode()).hexdigest()


def build_manifest(job: TrainingJob) -> Manifest:
    """List and pair the training data of a job.

    Raises `StorageError`, and `ManifestError` where there is nothing to train on.
    """
    roots = _DataRoots({"storage": job.storage})
    manifest = _pair_files(job, roots)
    return replace(manifest, files=_compute_files_digest(job, manifest, roots), versions=roots.versions)


def _pair_files(job: TrainingJob, roots: "_DataRoots") -> Manifest:
    """List the files of a job's data roots, and pair them."""
    hazy: tuple[str, ...] = ()
    if isinstance(job, ColabatorJob):
        hazy = tuple(roots.list_images(job.data.hazy, "data.hazy"))

    # Paired data: degraded images and their clean ones.
    if job.data.paired is not None:
        return _build_paired_manifest(job.data.paired, hazy, roots)

    # Clear images alone, whose depth will be procedural.
    assert job.data.clear is not None
    images = roots.list_images(job.data.clear, "data.clear")
    if job.data.depth is None:
        return Manifest(tuple(images), None, hazy, roots.skipped, None, roots.packs, roots.passed_over)

    # Clear images and their depth maps.
    maps = roots.list_depth_maps(job.data.depth)
    names = roots.list_names(job.data.depth)
    pairing = explain_suffixes(pair_by_stem(images, maps, "depth map"), names, "depth map")
    if not pairing.pairs:
        raise ManifestError(f"data.depth: none of the {len(maps)} depth maps below {job.data.depth} matches an image")

    skipped = roots.skipped | pairing.list_skipped(job.data.clear, job.data.depth)
    clear, depth = tuple(pairing.pairs), tuple(pairing.pairs.values())
    return Manifest(clear, depth, hazy, skipped, None, roots.packs, roots.passed_over)


def _build_paired_manifest(paired: PairedSection, hazy: tuple[str, ...], roots: "_DataRoots") -> Manifest:
    """Build the manifest of a job with paired data."""
    degraded = roots.list_images(paired.hazy, "data.paired.hazy")
    clean = roots.list_images(paired.clear, "data.paired.clear")
    pairing = pair_truths(paired, "data.paired", degraded, clean, "clean image")

    # A pattern is wrong that pairs nothing, or gives any image two truths.
    if paired.match is not None and (pairing.ambiguous or not pairing.pairs):
        wrong = {image: pairing.unpaired[image] for image in pairing.ambiguous or pairing.unpaired}
        lack = f"no single clean image by {_name_patterns(paired)}"
        _refuse_unpaired(wrong, pairing.num_images, paired.hazy, "data.paired.match", lack)
    if not pairing.pairs:
        raise ManifestError(
            f"data.paired.clear: none of the {len(clean)} images below {paired.clear} "
            f"is named like one below {paired.hazy} (data.paired.match pairs by a part of the names)"
        )

    skipped = roots.skipped | pairing.list_skipped(paired.hazy, paired.clear)
    clear, paired_hazy = tuple(pairing.pairs.values()), tuple(pairing.pairs)
    return Manifest(clear, None, hazy, skipped, paired_hazy, roots.packs, roots.passed_over)


def _compute_files_digest(job: TrainingJob, manifest: Manifest, roots: "_DataRoots") -> str:
    """Compute a digest of the files that is the same wherever they lie, in a pack too.

    A pack holds the bytes of images as they were, and depth maps in another format.
    """
    data, content = job.data, []
    clear_root = data.paired.clear if data.paired is not None else data.clear
    groups = [(clear_root, manifest.clear)]
    if isinstance(job, ColabatorJob):
        groups.append((job.data.hazy, manifest.hazy))
    if data.paired is not None:
        groups.append((data.paired.hazy, manifest.paired_hazy or ()))

    for root, keys in groups:
        sizes = roots.list_sizes(root) if root is not None and keys else {}
        content.append([(key, sizes[key]) for key in keys])
    stems = None if manifest.depth is None else [strip_suffix(key) for key in manifest.depth]
    return hashlib.sha256(json.dumps([content, stems]).encode()).hexdigest()


class _DataRoots:
    """Lists the data roots of a job, folders and packs alike; opens each pack once."""

    def __init__(self, outputs: Mapping[str, str]) -> None:
        """Begin; `outputs` are the places to which the job writes, by their keys."""
        self.outputs = outputs
        self.packs: dict[str, Pack] = {}
        self.skipped: dict[str, str] = {}
        """URI → reason, of links that cannot be followed."""
        self.passed_over: dict[str, str] = {}
        """Data root → numbers of its files of other kinds."""
        self.versions: dict[str, str] = {}
        """Data root → digest of its files, as of `Manifest.versions`."""
        self._sizes: dict[str, dict[str, int]] = {}
        """`Location.uri` of a root → size of each of its files, or of each image of its pack."""

    def list_sizes(self, uri: str) -> dict[str, int]:
        """List the sizes in bytes of the images of a root that was listed before."""
        return self._sizes[locate(uri).uri]

    def list_images(self, uri: str, key: str) -> list[str]:
        """List the images of a data root.

        Raises `ManifestError`, naming the job's `key`, where there are none.
        """
        found = self._open(uri, key)
        if isinstance(found, Pack):
            return list(found.images)

        images = _select_images(found, uri, key)
        self.skipped |= found.list_skipped(IMAGE_SUFFIXES)
        others = found.count_others(IMAGE_SUFFIXES)
        if others:
            self.passed_over[uri] = others
        return list(images)

    def list_depth_maps(self, uri: str) -> list[str]:
        """List the depth maps of a data root.

        Raises `ManifestError` for a pack without depth.
        """
        found = self._open(uri, "data.depth")
        if not isinstance(found, Pack):
            self.skipped |= found.list_skipped(DEPTH_SUFFIXES)
            return _select_maps(found, uri, "data.depth", "depth maps")
        if not found.depths:
            raise ManifestError(f"data.depth: the pack in {uri} holds no depth (corun-ray pack --depth adds it)")
        return list(found.depths)

    def list_names(self, uri: str) -> list[str]:
        """List all files of a folder of depth maps; none of a pack."""
        found = self._open(uri, "data.depth")
        return [] if isinstance(found, Pack) else list(found.infos)

    def _open(self, uri: str, key: str) -> Pack | Listing:
        """Return the pack in a folder, or the folder's files."""
        place = locate(uri)
        if place.uri in self.packs:
            return self.packs[place.uri]

        # A job reads whole folders: the paths of images are relative to them.
        found = list_folder(uri, key, self.outputs)
        if found.root != place.uri:
            raise ManifestError(f"{key}: {uri} is a file, expected a folder")
        self.versions[uri] = _compute_version(found)
        if not is_pack(found.infos):
            self._sizes[place.uri] = {file: info.size for file, info in found.infos.items()}
            return found
        pack = self.packs[place.uri] = open_pack(place, found.infos)
        self._sizes[place.uri] = {file: image.num_bytes for file, image in pack.images.items()}
        return self.packs[place.uri]


def _compute_version(found: Listing) -> str:
    """Compute a digest of the files of a folder, as far as their names, sizes and times tell them apart."""
    content = [(file, info.size, info.mtime_ns) for file, info in found.infos.items()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# --- Listing folders ---


def list_images(
    uri: str, key: str, outputs: Mapping[str, str] | None = None, passed_over: dict[str, str] | None = None
) -> list[str]:
    """List the images below a folder or URI; links that lead nowhere count, so that readers report them.

    The numbers of files of other kinds are added to `passed_over`, by `uri`.

    Raises as `list_image_folder` does.
    """
    found = list_image_folder(uri, key, outputs)
    others = found.count_others(IMAGE_SUFFIXES)
    if others and passed_over is not None:
        passed_over[uri] = others
    dead = filter_by_suffix(list(found.bad_links), IMAGE_SUFFIXES)
    return sorted([*found.select(IMAGE_SUFFIXES), *dead])


def list_image_folder(uri: str, key: str, outputs: Mapping[str, str] | None = None) -> Listing:
    """List a folder or URI of images, or one image.

    Images of all folders below count, but for those that the job writes to `outputs`, by their keys.

    Raises `StorageError`, and `ManifestError`, naming the job file's `key`, for a folder without images, with a pack,
    and for one that is an output itself.
    """
    found = list_folder(uri, key, outputs)
    if is_pack(found.infos):
        raise ManifestError(f"{key}: {uri} holds a pack, which only training can read")
    _select_images(found, uri, key)
    return found


def _select_images(found: Listing, uri: str, key: str) -> dict[str, FileInfo]:
    """Return the images among the files below `uri`.

    Raises `ManifestError` where there are none.
    """
    images = found.select(IMAGE_SUFFIXES)
    if images:
        return images

    # Say what is there instead.
    kinds = ", ".join(sorted(IMAGE_SUFFIXES))
    others = found.count_others(IMAGE_SUFFIXES)
    there = f": {others}" if others else ""
    skipped = list(found.list_skipped(IMAGE_SUFFIXES).items())[:NAMED_FILES]
    reasons = "".join(f"; {path}: {reason}" for path, reason in skipped)
    raise ManifestError(f"{key}: no images ({kinds}) among the {len(found.infos)} files below {uri}{there}{reasons}")


def _select_maps(found: Listing, uri: str, key: str, name: str) -> list[str]:
    """Return the depth or transmission maps among the files below `uri`.

    Raises `ManifestError`, naming the job file's `key`, where no file has the suffix of one.
    """
    maps = list(found.select(DEPTH_SUFFIXES))
    if not maps:
        others = found.count_others(DEPTH_SUFFIXES) or "none"
        expected = ", ".join(sorted(DEPTH_SUFFIXES))
        raise ManifestError(f"{key}: no {name} ({expected}) among the {len(found.infos)} files below {uri} ({others})")
    return maps


def explain_suffixes(pairing: Pairing, files: list[str], name: str) -> Pairing:
    """Name the file that an unpaired image would have as its map, if files of that suffix were read.

    `files` are all below the maps' root; `name` is what a map is.
    """
    never_read = {get_stem(file): file for file in files if posixpath.splitext(file)[1].lower() not in DEPTH_SUFFIXES}
    expected = ", ".join(sorted(DEPTH_SUFFIXES))
    unpaired = {}
    for image, reason in pairing.unpaired.items():
        file = never_read.get(get_stem(image))
        unpaired[image] = reason if file is None else f"{name} {file} has a suffix that is never read ({expected} are)"
    return replace(pairing, unpaired=unpaired)


# --- Pairs of images and their truth ---


def pair_truths(section: TruthSection, key: str, images: list[str], truths: list[str], truth_name: str) -> Pairing:
    """Pair degraded images with their truth, by stem or by the patterns of the job.

    `images` and `truths` are what the section's two folders hold. Where both are one folder, the images that
    `match_clear` matches are the truths, and all others are degraded.

    Raises `ManifestError`, naming the section's `key` in the job file, where none of them is degraded.
    """
    if section.match is None:
        return pair_by_stem(images, truths, truth_name)
    pattern = compile_pattern(section.match)
    truth_pattern = pattern if section.match_clear is None else compile_pattern(section.match_clear)

    # Tell the files of one folder apart.
    assert section.clear is not None
    is_one_folder = find_below(locate(section.hazy), locate(section.clear)) == ""
    if is_one_folder and section.match_clear is not None:
        truths = [image for image in images if find_key(image, truth_pattern) is not None]
        images = [image for image in images if find_key(image, truth_pattern) is None]
        if not images:
            raise ManifestError(
                f"{key}.match_clear: {section.match_clear} matches all {len(truths)} images below {section.hazy}, "
                "so that none of them is hazy"
            )

    return pair_by_pattern(images, truths, truth_name, pattern, truth_pattern)


def _name_patterns(section: TruthSection) -> str:
    """Name the patterns of a section that has some."""
    return " and ".join(text for text in (section.match, section.match_clear) if text)


def _refuse_unpaired(unpaired: Mapping[str, str], num_images: int, root: str, key: str, lack: str) -> None:
    """Refuse images without a partner.

    `unpaired` holds their reasons; `lack` tells what they have not.

    Raises `ManifestError`, naming the first of them.
    """
    if unpaired:
        first = list(unpaired.items())[:NAMED_FILES]
        named = "; ".join(f"{posixpath.join(root, image)}: {reason}" for image, reason in first)
        raise ManifestError(f"{key}: {len(unpaired)} of {num_images} hazy images have {lack} ({named})")


def pair_validation_images(
    section: TruthSection, key: str, storage: str | None = None, passed_over: dict[str, str] | None = None
) -> list[tuple[str, str | None]]:
    """Pair the hazy images of a section with their ground truth, by relative path.

    Without `clear`, the truth of each is None. `storage` is where the job writes: nothing there is an image of the
    section. The numbers of files of other kinds are added to `passed_over`, by folder.

    Raises `StorageError`, and `ManifestError`, naming the section's `key` in the job file and the first images without
    a truth.
    """
    outputs = {} if storage is None else {"storage": storage}
    hazy = list_images(section.hazy, f"{key}.hazy", outputs, passed_over)
    if section.clear is None:
        return [(image, None) for image in hazy]

    # Every hazy image must have its truth.
    clear = list_images(section.clear, f"{key}.clear", outputs, passed_over)
    pairing = pair_truths(section, key, hazy, clear, "clear image")
    if section.match is None:
        _refuse_unpaired(pairing.unpaired, pairing.num_images, section.hazy, f"{key}.clear", "no truth")
    else:
        lack = f"no single truth by {_name_patterns(section)}"
        _refuse_unpaired(pairing.unpaired, pairing.num_images, section.hazy, f"{key}.match", lack)
    return list(pairing.pairs.items())


def use_folders(section: TruthSection) -> dict[str, str]:
    """Return the folders of a section that names single images in their place, by `hazy` and `clear`.

    Paths of `pair_validation_images` are relative to these.

    Raises `StorageError`.
    """
    folders = {}
    for key, uri in (("hazy", section.hazy), ("clear", section.clear)):
        # A store is asked only about names of images.
        if uri is not None and posixpath.splitext(split_options(uri)[0])[1].lower() in IMAGE_SUFFIXES:
            place = locate(uri)
            if place.find_file() is not None:
                folders[key] = place.parent().uri
    return folders


# --- Reading files ---


def read_file(root: str, key: str) -> bytes:
    """Read a file of a folder or URI.

    Raises `StorageError`.
    """
    return locate(root).child(key).read()


def load_image(root: str, key: str) -> ImageU8:
    """Read and decode one image.

    Raises `StorageError` and `BadImage`.
    """
    return decode_image(read_file(root, key))


def load_truth(root: str, key: str, shape: tuple[int, ...], *, crop_truth: bool) -> ImageU8:
    """Read and decode the truth of a hazy image of this shape, and take off a border as `fit_truth` does.

    Raises `StorageError`, and `BadImage` also where the truth does not fit.
    """
    truth = fit_truth(load_image(root, key), shape, crop_truth=crop_truth)
    return truth[0 : shape[0], 0 : shape[1]]


# --- Sizes of pairs ---


def refuse_misfits(
    section: TruthSection,
    pairs: Sequence[tuple[str, str | None]],
    key: str,
    read: Callable[[str, str], bytes] = read_file,
) -> None:
    """Refuse a section none of whose first truths fits its image, before a job starts.

    `read` returns the file of a data root and path. A single misfit is left to the job, and so are files that cannot
    be used.

    Raises `StorageError`, and `ManifestError`, naming the section's `key` in the job file.
    """
    misfits = []
    for hazy_key, clear_key in pairs[:TRIED_PAIRS]:
        if section.clear is None or clear_key is None:
            return

        try:
            hazy = decode_image(read(section.hazy, hazy_key))
            clear = decode_image(read(section.clear, clear_key))
        except (BadImage, MissingFile):
            return

        try:
            fit_truth(clear, hazy.shape, crop_truth=section.crop_truth)
            return
        except BadImage as error:
            misfits.append(f"{key}.clear: {posixpath.join(section.hazy, hazy_key)}: {error}")

    if misfits:
        raise ManifestError(misfits[0])


# --- Validation sets ---


@dataclass(frozen=True)
class ValidationSet:
    """One validation set, and the prefix of its metrics: `val`, or `val/NAME`."""

    prefix: str
    hazy_root: str
    clear_root: str | None
    pairs: list[tuple[str, str | None]]
    """Hazy image and its ground truth (None without `clear_root`), by relative path."""
    transmission_root: str | None = None
    transmissions: Mapping[str, str] = field(default_factory=dict)
    """Hazy image → its true transmission (empty without `transmission_root`), by relative path."""
    crop_truth: bool = False
    """Whether a truth may have a border, which it loses, see `fit_truth`."""
    metrics: tuple[str, ...] = ()
    """The metrics by which the job measures the set."""


def list_validation_sets(job: TrainingJob) -> list[ValidationSet]:
    """List the job's `data.validation`, if any, and its `data.validation_sets`.

    Raises the errors of `pair_validation_images`.
    """
    sets = []
    for key, section in job.data.list_validation_sections().items():
        pairs = pair_validation_images(section, key, job.storage)
        transmissions = {}
        if section.transmission is not None:
            transmissions = _pair_transmissions([image for image, _ in pairs], section, key)
        sets.append(
            ValidationSet(
                prefix=job.data.name_validation_set(key),
                hazy_root=section.hazy,
                clear_root=section.clear,
                pairs=pairs,
                transmission_root=section.transmission,
                transmissions=transmissions,
                crop_truth=section.crop_truth,
                metrics=job.train.choose_metrics(section),
            )
        )

    return sets


def refuse_other_sizes(job: TrainingJob, manifest: Manifest, sets: Sequence[ValidationSet]) -> None:
    """Refuse paired data and validation sets whose first truths do not fit their images.

    `sets` are the job's, from `list_validation_sets`.

    Raises as `refuse_misfits` does.
    """
    if job.data.paired is not None and manifest.paired_hazy is not None:
        pairs = list(zip(manifest.paired_hazy, manifest.clear, strict=True))
        refuse_misfits(job.data.paired, pairs, "data.paired", manifest.read_image)

    for (key, section), one in zip(job.data.list_validation_sections().items(), sets, strict=True):
        refuse_misfits(section, one.pairs, key)


def _pair_transmissions(hazy: list[str], section: ValidationSection, key: str) -> dict[str, str]:
    """Pair hazy images with their true transmission, by relative path.

    Raises `StorageError`, and `ManifestError`, naming the job file's `key`, for images without one.
    """
    assert section.transmission is not None
    found = list_folder(section.transmission, f"{key}.transmission")
    maps = _select_maps(found, section.transmission, f"{key}.transmission", "transmission maps")
    pairing = explain_suffixes(pair_by_stem(hazy, maps, "transmission map"), list(found.infos), "transmission map")
    _refuse_unpaired(pairing.unpaired, len(hazy), section.hazy, f"{key}.transmission", "no true transmission")
    return pairing.pairs


def pair_results(hazy_root: str, hazy: Sequence[str], results: list[str], key: str) -> dict[str, str]:
    """Pair hazy images with the results that a method has made of them, by relative path.

    Raises `ManifestError`, naming the job file's `key` and the first images without a result.
    """
    pairing = pair_by_stem(list(hazy), results, "result")
    _refuse_unpaired(pairing.unpaired, len(hazy), hazy_root, key, "no result")
    return pairing.pairs


def load_transmission(validation_set: ValidationSet, hazy_key: str) -> NDArray[np.float32]:
    """Read the true transmission of a validation image, `H W` float32.

    Integers become a share of their type's greatest value.

    Raises `StorageError` and `BadImage`.
    """
    assert validation_set.transmission_root is not None
    place = locate(validation_set.transmission_root).child(validation_set.transmissions[hazy_key])
    values = decode_depth(place.read(), posixpath.splitext(place.name)[1])
    scale = np.iinfo(values.dtype).max if np.issubdtype(values.dtype, np.integer) else 1
    return np.asarray(values / scale, np.float32)
