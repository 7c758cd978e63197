"""Listing a folder of files: which of them a job may read, and what is passed over.

Left out are hidden files and folders, those that storage devices and archives make beside photographs, what the job
itself writes there, and links that lead nowhere or round in a circle.
"""

import os
import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pyarrow.fs import FileInfo

from corun_ray.core.errors import UserError
from corun_ray.service.places import find_below
from corun_ray.service.storage import Location, StorageError, locate

IMAGE_SUFFIXES = frozenset({".avif", ".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
DEPTH_SUFFIXES = frozenset({".npy", ".png", ".mat"})

FOREIGN_FOLDERS = frozenset({"@eaDir", "#recycle", "@Recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found"})
"""Folders that storage devices and archives make: thumbnails, bins, resource forks."""
DEAD_LINK = "a link that leads nowhere"
CIRCLE = "a link to a folder that holds it"
RESTORED = "a folder of restored images"
RESTORED_MARK = ".model.json"
"""The file that `corun-ray dehaze` leaves in its output; hidden, so that it is no result."""


class ManifestError(UserError):
    """Data that a job cannot use; the message has one line for each mistake."""


@dataclass(frozen=True)
class Listing:
    """The files of a folder or URI, or the one file that was named in its place."""

    root: str
    """The folder or URI; that of a single file where one was named."""
    infos: dict[str, FileInfo]
    """What storage knows of each file, by relative path, sorted."""
    bad_links: dict[str, str] = field(default_factory=dict)
    """Relative path → reason, of links that cannot be followed."""
    results: tuple[str, ...] = ()
    """Folders below that hold what an earlier call has restored, by relative path."""

    def select(self, suffixes: frozenset[str]) -> dict[str, FileInfo]:
        """Return the files with these suffixes."""
        return {file: self.infos[file] for file in filter_by_suffix(list(self.infos), suffixes)}

    def count_others(self, suffixes: frozenset[str]) -> str:
        """Count the files of other suffixes by kind: `.heic 2, .txt 1`; empty where there are none."""
        kinds = Counter[str]()
        for file in self.infos:
            suffix = posixpath.splitext(file)[1].lower()
            if suffix not in suffixes:
                kinds[suffix or "no suffix"] += 1

        # The most frequent first.
        ordered = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
        return ", ".join(f"{suffix} {count}" for suffix, count in ordered)

    def list_skipped(self, suffixes: frozenset[str]) -> dict[str, str]:
        """Return URI → reason of folders of results, and of links to no folder and to no file of these suffixes."""
        skipped = {posixpath.join(self.root, folder): RESTORED for folder in self.results}
        for path, reason in self.bad_links.items():
            if reason == CIRCLE or posixpath.splitext(path)[1].lower() in suffixes:
                skipped[posixpath.join(self.root, path)] = reason
        return skipped


def list_folder(uri: str, key: str, outputs: Mapping[str, str] | None = None) -> Listing:
    """List the files below a folder or URI, or the single file there.

    `outputs` are the places to which the job writes, by their keys: what lies there is no input.

    Raises `StorageError`, and `ManifestError`, naming both keys, where an output is the folder itself.
    """
    place = locate(uri)
    bad_links: dict[str, str] = {}
    try:
        infos = place.list_infos()
        if place.is_local:
            bad_links = _find_bad_links(place)
    except StorageError:
        file = place.find_file()
        if file is None:
            raise
        place, infos = place.parent(), {place.name: file}

    # Nothing may be written among the images themselves.
    inner = []
    for output_key, output in (outputs or {}).items():
        path = find_below(locate(output), place)
        if path == "":
            raise ManifestError(f"{output_key}: {output} is the folder of {key}: choose another")
        if path is not None:
            inner.append(output)

    # The results of an earlier call are no input either, wherever this call writes.
    kept = _leave_out(place, list(infos), inner)
    results = tuple(posixpath.dirname(file) for file in kept if file.endswith(f"/{RESTORED_MARK}"))
    found = {}
    for file in kept:
        is_result = any(file.startswith(f"{folder}/") for folder in results)
        if not is_result and not is_foreign(file):
            found[file] = infos[file]
    return Listing(place.uri, found, bad_links, results)


def filter_by_suffix(files: list[str], suffixes: frozenset[str]) -> list[str]:
    """Return the files with these suffixes that are not foreign."""
    return [file for file in files if not is_foreign(file) and posixpath.splitext(file)[1].lower() in suffixes]


def is_foreign(path: str) -> bool:
    """Return whether a relative path is hidden (.DS_Store and the like), or lies in a folder that is never data."""
    return any(part.startswith(".") or part in FOREIGN_FOLDERS for part in path.split("/"))


def _leave_out(place: Location, files: Sequence[str], outputs: Sequence[str]) -> list[str]:
    """Return the files that lie in none of the outputs, and that no circle of links repeats."""
    targets = [locate(output) for output in outputs]
    is_kept: dict[str, bool] = {}
    kept = []
    for file in files:
        folder = posixpath.dirname(file)
        if folder not in is_kept:
            here = place.child(folder) if folder else place
            is_output = any(find_below(here, target) is not None for target in targets)
            is_kept[folder] = not is_output and not (place.is_local and _goes_round(place.path, folder))
        if is_kept[folder] and not _links_into(place, file, targets):
            kept.append(file)
    return kept


def _links_into(place: Location, file: str, targets: Sequence[Location]) -> bool:
    """Return whether a local file is a link to a file in one of the places."""
    path = posixpath.join(place.path, file)
    if not targets or not place.is_local or not os.path.islink(path):
        return False
    real = locate(os.path.realpath(path))
    return any(find_below(real, target) is not None for target in targets)


def _goes_round(root: str, folder: str) -> bool:
    """Return whether the path to a local folder passes one folder twice, by a link."""
    seen = {os.path.realpath(root)}
    path = root
    for part in folder.split("/") if folder else ():
        path = os.path.join(path, part)
        real = os.path.realpath(path)
        if real in seen:
            return True
        seen.add(real)
    return False


def _find_bad_links(place: Location) -> dict[str, str]:
    """Return relative path → reason of the links below a local folder that cannot be followed.

    pyarrow lists no link that leads nowhere, and follows a circle until the system stops it.
    """
    found = {}
    for folder, folders, files in os.walk(place.path):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, place.path).replace(os.sep, "/")
            if is_foreign(relative) or not os.path.islink(path):
                continue
            if not os.path.exists(path):
                found[relative] = DEAD_LINK
            elif os.path.isdir(path) and _goes_round(place.path, relative):
                found[relative] = CIRCLE
    return dict(sorted(found.items()))
