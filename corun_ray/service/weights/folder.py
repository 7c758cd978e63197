"""Weights folders: files under the libraries' own names, checked against `weights.json`, downloaded once per node.

A folder or URI holds the files flat, and the index `{"files": {name: {"size": bytes, "sha256": hex}}}`. A model of
several files is such a folder by itself, below another.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout
from pyarrow import fs

from corun_ray.core.errors import format_error
from corun_ray.core.weights import WeightsError, WeightsSource
from corun_ray.service.storage import Location, StorageError, locate

INDEX = "weights.json"
DEPTH_MODEL = "depth-anything-v2-small"
"""Folder of the depth estimator that can be fetched."""
SUFFIXES = (".pt", ".pth", ".safetensors", ".mat", ".npz", ".npy", ".bin", ".ckpt", ".json")
CACHE_VARIABLE = "CORUN_WEIGHTS_CACHE"
DEFAULT_CACHE = Path("~/.cache/corun_ray/weights")
CHUNK_BYTES = 8 * 2**20
LOCK_TIMEOUT_S = 30 * 60.0

OK, MISSING, SIZE_DIFFERS, NOT_INDEXED = "ok", "missing", "size differs", "not indexed"
"""States of a file in a listing."""

Wanted = Mapping[str, str]
"""File name → what needs the file."""


@dataclass(frozen=True)
class Content:
    """What a file must hold: its size and the SHA-256 of its bytes, in hexadecimal."""

    size_bytes: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.size_bytes} bytes with SHA-256 {self.sha256[:12]}…"


# --- Using files ---


def locate_model(uri: str, name: str) -> str:
    """Return the folder of a model below a weights folder.

    Raises `WeightsError` where there is none.
    """
    with _translate_errors():
        place = locate(uri).child(name)
        if not place.exists():
            raise WeightsError(f"{uri} has no model {name}; `corun-ray weights fetch DIR depth` gets {DEPTH_MODEL}")
        return place.uri


@dataclass(frozen=True)
class WeightsFolder:
    """A `WeightsSource`: the files of a folder or URI, each checked once per process before its first use.

    A local folder is used in place. From anywhere else a file is downloaded once per node into `cache`, by default
    CORUN_WEIGHTS_CACHE or ~/.cache/corun_ray/weights of the machine; other processes wait for the download.
    """

    uri: str
    cache: Path | None = None

    def __call__(self, name: str) -> Path:
        """Return the checked file on this machine.

        Raises `WeightsError` where the file is missing, damaged or not indexed.
        """
        with _translate_errors():
            folder = locate(self.uri)
            content = read_index(self.uri).get(name)
            if content is None:
                raise WeightsError(
                    f"{name} is not in {self.uri}/{INDEX}; `corun-ray weights fetch` gets files, "
                    f"`corun-ray weights index` adds files that are there to the index"
                )

            # A local file is used where it is.
            if folder.is_local:
                path = Path(folder.path) / name
                if not path.is_file():
                    raise WeightsError(f"{path}: no such file, though {INDEX} lists it")

                _check_content(str(path), content, compute_content(path))
                return path

            # Any other comes through the node's cache. The digest is part of the path, so that a file of the same name
            # with other bytes has a place of its own.
            target = (self.cache or _find_default_cache()) / content.sha256[:16] / name
            if _has_content(target, content):
                return target

            return _download_to_cache(target, folder.child(name), content)


class RecordingSource:
    """A `WeightsSource` that remembers which files it was asked for, and why some were missing."""

    def __init__(self, source: WeightsSource) -> None:
        self.source = source
        self.asked: list[str] = []
        self.missing: dict[str, str] = {}
        """File name -> reason."""

    def __call__(self, name: str) -> Path:
        """Return the file of the wrapped source.

        A `WeightsError` is recorded and raised again.
        """
        if name not in self.asked:
            self.asked.append(name)
        try:
            return self.source(name)
        except WeightsError as error:
            self.missing[name] = str(error)
            raise


def compute_content(path: Path) -> Content:
    """Compute size and SHA-256 of a local file.

    The file is read once per process, and again after a change.
    """
    state = path.stat()
    return Content(state.st_size, _compute_sha256(path, state.st_size, state.st_mtime_ns))


@lru_cache(maxsize=256)
def _compute_sha256(path: Path, size_bytes: int, modified_ns: int) -> str:
    """Compute the digest of a file.

    Its size and time of change are keys of the cache.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _has_content(path: Path, content: Content) -> bool:
    """Return whether a local file is there, whole and undamaged."""
    return path.is_file() and path.stat().st_size == content.size_bytes and compute_content(path) == content


def _download_to_cache(target: Path, place: Location, content: Content) -> Path:
    """Download a file into the cache; return its path.

    Another process may have done so while this one waited for the lock.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f"{target.name}.lock")
    part = target.with_name(f"{target.name}.part")
    try:
        with FileLock(lock, timeout=LOCK_TIMEOUT_S):
            if _has_content(target, content):
                return target

            # Check while downloading, then rename: a reader never sees a part of the file.
            target.unlink(missing_ok=True)
            try:
                _check_size(place, content)
                with part.open("wb") as file:
                    _check_content(place.uri, content, _hash_file(place, file))

                part.replace(target)
            finally:
                part.unlink(missing_ok=True)
    except Timeout:
        minutes = LOCK_TIMEOUT_S / 60
        raise WeightsError(f"{target}: another process has held {lock} for {minutes:.0f} minutes") from None

    return target


def _hash_file(place: Location, copy: BinaryIO | None = None) -> Content:
    """Compute the content of a file, chunk by chunk.

    The chunks are also written to `copy`, if given.
    """
    digest, size_bytes = hashlib.sha256(), 0

    # Without `compression=None`, pyarrow would unpack a `.gz` on the way.
    with place.filesystem.open_input_stream(place.path, compression=None) as source:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            size_bytes += len(chunk)
            if copy is not None:
                copy.write(chunk)

    return Content(size_bytes, digest.hexdigest())


def _check_size(place: Location, expected: Content) -> None:
    """Check the size of a file before its download.

    Raises `WeightsError` for another size.
    """
    info = place.filesystem.get_file_info(place.path)
    if info.type != fs.FileType.File:
        raise WeightsError(f"{place.uri}: no such file, though {INDEX} lists it")
    if info.size != expected.size_bytes:
        raise WeightsError(f"{place.uri}: expected {expected}, found {info.size} bytes")


def _check_content(where: str, expected: Content, found: Content) -> None:
    """Raise `WeightsError` for a file of other bytes."""
    if found != expected:
        raise WeightsError(f"{where}: expected {expected}, found {found}")


def _find_default_cache() -> Path:
    """Return the cache folder of this machine."""
    return Path(os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE).expanduser()


# --- The index ---


def read_index(uri: str) -> dict[str, Content]:
    """Read the index of a weights folder, by file name.

    Raises `WeightsError` where there is none, or where it says anything else than it may.
    """
    with _translate_errors():
        place = locate(uri).child(INDEX)
        if not place.exists():
            raise WeightsError(f"{uri}: no {INDEX} there; `corun-ray weights index {uri}` makes it")
        return _parse_index(place.read(), place.uri)


def write_index(uri: str, contents: dict[str, Content]) -> None:
    """Replace the index of a weights folder.

    Raises `WeightsError` where it cannot be written.
    """
    files = {}
    for name, content in sorted(contents.items()):
        files[name] = {"size": content.size_bytes, "sha256": content.sha256}
    with _translate_errors():
        locate(uri).child(INDEX).write(json.dumps({"files": files}, indent=1).encode() + b"\n")


def index_folder(uri: str) -> dict[str, Content]:
    """Read every weight file and write the folder's index.

    Raises `WeightsError` for a folder without weight files.
    """
    with _translate_errors():
        folder = locate(uri)
        names = [name for name in _list_sizes(folder) if _is_plain(name)]
        if not names:
            raise WeightsError(f"{uri}: no weight files there ({' '.join(SUFFIXES)})")

        contents = {name: _hash_file(folder.child(name)) for name in names}

    write_index(uri, contents)
    return contents


def _parse_index(data: bytes, where: str) -> dict[str, Content]:
    """Parse and validate an index; raises `WeightsError`."""
    # An index may come from anywhere: accept nothing but the documented form.
    try:
        record = json.loads(data)
    except ValueError as error:
        raise WeightsError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict) or set(record) != {"files"} or not isinstance(record["files"], dict):
        raise WeightsError(f"{where}: expected an object with `files` alone")
    return {name: _parse_entry(name, entry, where) for name, entry in record["files"].items()}


def _parse_entry(name: str, entry: Any, where: str) -> Content:
    """Parse and validate the entry of one file; raises `WeightsError`."""
    if not _is_plain(name):
        raise WeightsError(f"{where}: {name!r} is no plain file name")

    # Just these two keys; JSON's true would pass as an int.
    match entry:
        case {"size": int(size), "sha256": str(sha256)} if (
            len(entry) == 2 and not isinstance(size, bool) and size >= 0 and re.fullmatch("[0-9a-f]{64}", sha256)
        ):
            return Content(size, sha256)

    raise WeightsError(f"{where}: {name}: expected `size` in bytes and `sha256` of 64 hexadecimal digits, got {entry}")


def _is_plain(name: str) -> bool:
    """Return whether a name is a plain file name.

    Such a file is visible, lies right in the folder, and is not the index.
    """
    return re.fullmatch(r"[^\x00-\x1f/\\.][^\x00-\x1f/\\]*", name) is not None and name != INDEX


@contextmanager
def _translate_errors() -> Iterator[None]:
    """Turn errors of storage and of the disk into `WeightsError`."""
    try:
        yield
    except (OSError, StorageError) as error:
        raise WeightsError(format_error(error)) from None


# --- Listing ---


@dataclass(frozen=True)
class FileState:
    """One line of `weights ls`; `size_bytes` and `sha256` are those of the index, None where it has none."""

    name: str
    size_bytes: int | None
    sha256: str | None
    state: str
    needed_by: str


def list_files(folder_uri: str | None, wanted: Wanted) -> list[FileState]:
    """List the files of a folder, its index and a job.

    Sizes are compared, contents are not read. `folder_uri` is None for a job without a weights folder.

    Raises `WeightsError` for a folder that cannot be read.
    """
    sizes: dict[str, int] = {}
    indexed: dict[str, Content] = {}
    if folder_uri is not None:
        sizes, indexed = inspect_folder(folder_uri)

    files = []
    for name in sorted({*sizes, *indexed, *wanted}):
        # A file outside the index has a size, but no digest.
        content = indexed.get(name)
        if content is None:
            size_bytes, sha256 = sizes.get(name), None
        else:
            size_bytes, sha256 = content.size_bytes, content.sha256

        # Compare the index with what lies there.
        if name not in sizes:
            state = MISSING
        elif content is None:
            state = NOT_INDEXED
        elif sizes[name] == content.size_bytes:
            state = OK
        else:
            state = SIZE_DIFFERS

        files.append(FileState(name, size_bytes, sha256, state, wanted.get(name, "")))

    return files


def describe_lacking(folder_uri: str | None, wanted: Wanted) -> list[str]:
    """Return a line for each wanted file that is unusable."""
    where = "the job names no weights folder" if folder_uri is None else folder_uri
    lines = []
    for file in list_files(folder_uri, wanted):
        if file.name in wanted and file.state != OK:
            lines.append(f"{file.name} (for {file.needed_by}): {file.state} ({where})")
    return lines


def inspect_folder(uri: str) -> tuple[dict[str, int], dict[str, Content]]:
    """Return the sizes of a folder's files, and its index.

    Sizes are in bytes. The index is empty where there is none.
    """
    with _translate_errors():
        folder = locate(uri)
        index = read_index(uri) if folder.child(INDEX).exists() else {}
        return _list_sizes(folder), index


def _list_sizes(folder: Location) -> dict[str, int]:
    """Return the sizes in bytes of a folder's weight files.

    Files of folders below are skipped. Sorted by name.

    Raises `StorageError` where there is no such folder.
    """
    sizes = {}
    for name, info in folder.list_infos().items():
        if "/" not in name and name.endswith(SUFFIXES) and name != INDEX:
            sizes[name] = info.size
    return sizes
