"""Weights folders: files by the libraries' own names, checked against `weights.json`, had once per node.

A folder or URI holds the files flat, and the index `{"files": {name: {"size": bytes, "sha256": hex}}}`.
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

from corun_ray.core.weights import WeightsError, WeightsSource
from corun_ray.service.storage import Location, StorageError, locate

INDEX = "weights.json"
SUFFIXES = (".pt", ".pth", ".safetensors", ".mat", ".npz", ".npy", ".bin", ".ckpt")
CACHE_VARIABLE = "CORUN_WEIGHTS_CACHE"
DEFAULT_CACHE = Path("~/.cache/corun_ray/weights")
CHUNK_BYTES = 8 * 2**20
LOCK_TIMEOUT_S = 30 * 60.0


@dataclass(frozen=True)
class Content:
    """What a file must hold: its size and the SHA-256 of its bytes, in hexadecimal."""

    size_bytes: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.size_bytes} bytes with SHA-256 {self.sha256[:12]}…"


@dataclass(frozen=True)
class WeightsFolder:
    """A `WeightsSource`: the files of a folder or URI, each checked once per process before it is used.

    A local folder is used in place. From anywhere else a file comes once per node into `cache` (by default
    CORUN_WEIGHTS_CACHE or ~/.cache/corun_ray/weights of the machine it runs on), while other processes wait for it.
    """

    uri: str
    cache: Path | None = None

    def __call__(self, name: str) -> Path:
        """The checked file on this machine; raises `WeightsError` where it is missing, damaged or not indexed."""
        with _weights_errors():
            folder = locate(self.uri)
            content = read_index(self.uri).get(name)
            if content is None:
                raise WeightsError(
                    f"{name} is not in {self.uri}/{INDEX}; `corun-ray weights fetch` gets files, "
                    f"`corun-ray weights index` takes up those put there"
                )
            if folder.is_local:
                path = Path(folder.path) / name
                if not path.is_file():
                    raise WeightsError(f"{path}: no such file, though {INDEX} lists it")
                _compare(str(path), content, compute_content(path))
                return path
            target = (self.cache or _default_cache()) / content.sha256[:16] / name
            return target if _holds(target, content) else _fill(target, folder.child(name), content)


class RecordingSource:
    """A source that remembers which files were asked for, and why some could not be had."""

    def __init__(self, source: WeightsSource) -> None:
        self.source = source
        self.asked: list[str] = []
        self.missing: dict[str, str] = {}

    def __call__(self, name: str) -> Path:
        """What the source gives; its `WeightsError` is noted and passed on."""
        if name not in self.asked:
            self.asked.append(name)
        try:
            return self.source(name)
        except WeightsError as error:
            self.missing[name] = str(error)
            raise


def read_index(uri: str) -> dict[str, Content]:
    """The validated index of a weights folder, by file name; raises `WeightsError` where there is none."""
    with _weights_errors():
        place = locate(uri).child(INDEX)
        if not place.exists():
            raise WeightsError(f"{uri}: no {INDEX} there; `corun-ray weights index {uri}` makes it")
        return _parse(place.read(), place.uri)


def write_index(uri: str, contents: dict[str, Content]) -> None:
    """Replaces the index of a weights folder; raises `WeightsError` where it cannot be written."""
    files = {name: {"size": content.size_bytes, "sha256": content.sha256} for name, content in sorted(contents.items())}
    with _weights_errors():
        locate(uri).child(INDEX).write(json.dumps({"files": files}, indent=1).encode() + b"\n")


def inspect_folder(uri: str) -> tuple[dict[str, int], dict[str, Content]]:
    """Sizes in bytes of the weight files that lie in a folder, and its index (empty where there is none)."""
    with _weights_errors():
        folder = locate(uri)
        return _sizes(folder), read_index(uri) if folder.child(INDEX).exists() else {}


def index_folder(uri: str) -> dict[str, Content]:
    """Reads every weight file of a folder or URI and writes its index; raises `WeightsError` where there is none."""
    with _weights_errors():
        folder = locate(uri)
        names = [name for name in _sizes(folder) if _is_plain(name)]
        if not names:
            raise WeightsError(f"{uri}: no weight files there ({' '.join(SUFFIXES)})")
        contents = {name: _stream(folder.child(name)) for name in names}
    write_index(uri, contents)
    return contents


def compute_content(path: Path) -> Content:
    """Size and SHA-256 of a local file, read once per process and state of the file."""
    state = path.stat()
    return Content(state.st_size, _sha256(path, state.st_size, state.st_mtime_ns))


@lru_cache(maxsize=256)
def _sha256(path: Path, size_bytes: int, modified_ns: int) -> str:
    """The digest of a file as it is; size and time of change tell it from what it was."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _holds(path: Path, content: Content) -> bool:
    return path.is_file() and path.stat().st_size == content.size_bytes and compute_content(path) == content


def _fill(target: Path, place: Location, content: Content) -> Path:
    """Downloads a file into the cache, unless another process has done so while this one waited."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f"{target.name}.lock")
    part = target.with_name(f"{target.name}.part")
    try:
        with FileLock(lock, timeout=LOCK_TIMEOUT_S):
            if _holds(target, content):
                return target
            target.unlink(missing_ok=True)
            try:
                _check_size(place, content)
                with part.open("wb") as file:
                    _compare(place.uri, content, _stream(place, file))
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)
    except Timeout:
        minutes = LOCK_TIMEOUT_S / 60
        raise WeightsError(f"{target}: another process has held {lock} for {minutes:.0f} minutes") from None
    return target


def _stream(place: Location, copy: BinaryIO | None = None) -> Content:
    """Reads a file in chunks, into `copy` if given."""
    digest, size = hashlib.sha256(), 0
    # pyarrow would unpack a `.gz` on the way.
    with place.filesystem.open_input_stream(place.path, compression=None) as source:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            if copy is not None:
                copy.write(chunk)
    return Content(size, digest.hexdigest())


def _sizes(folder: Location) -> dict[str, int]:
    """The weight files in a folder, without those of folders below it."""
    found = folder.filesystem.get_file_info(fs.FileSelector(folder.path))
    files = (info for info in found if info.type == fs.FileType.File and info.base_name.endswith(SUFFIXES))
    return {info.base_name: info.size for info in sorted(files, key=lambda info: info.base_name)}


def _check_size(place: Location, expected: Content) -> None:
    """Spares the download of what cannot be right."""
    info = place.filesystem.get_file_info(place.path)
    if info.type != fs.FileType.File:
        raise WeightsError(f"{place.uri}: no such file, though {INDEX} lists it")
    if info.size != expected.size_bytes:
        raise WeightsError(f"{place.uri}: expected {expected}, found {info.size} bytes")


def _compare(where: str, expected: Content, found: Content) -> None:
    if found != expected:
        raise WeightsError(f"{where}: expected {expected}, found {found}")


def _default_cache() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE).expanduser()


def _parse(data: bytes, where: str) -> dict[str, Content]:
    try:
        record = json.loads(data)
    except ValueError as error:
        raise WeightsError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict) or set(record) != {"files"} or not isinstance(record["files"], dict):
        raise WeightsError(f"{where}: expected an object with `files` alone")
    return {name: _content(name, entry, where) for name, entry in record["files"].items()}


def _content(name: str, entry: Any, where: str) -> Content:
    if not _is_plain(name):
        raise WeightsError(f"{where}: {name!r} is no plain file name")
    match entry:
        case {"size": int(size), "sha256": str(sha256)} if (
            len(entry) == 2 and not isinstance(size, bool) and size >= 0 and re.fullmatch("[0-9a-f]{64}", sha256)
        ):
            return Content(size, sha256)
    raise WeightsError(f"{where}: {name}: expected `size` in bytes and `sha256` of 64 hexadecimal digits, got {entry}")


def _is_plain(name: str) -> bool:
    """Whether a name stays in its folder and hides from nobody."""
    return re.fullmatch(r"[^\x00-\x1f/\\.][^\x00-\x1f/\\]*", name) is not None and name != INDEX


@contextmanager
def _weights_errors() -> Iterator[None]:
    """What storage and the disk refuse, as `WeightsError`."""
    try:
        yield
    except (OSError, StorageError) as error:
        raise WeightsError(" ".join(str(error).split())[:300]) from None


Wanted = Mapping[str, str]
"""File name → what needs it."""


OK, MISSING, SIZE_DIFFERS, NOT_INDEXED = "ok", "missing", "size differs", "not indexed"


@dataclass(frozen=True)
class FileState:
    """One line of `weights ls`; `size_bytes` and `sha256` are what the index says, None where it does not."""

    name: str
    size_bytes: int | None
    sha256: str | None
    state: str
    needed_by: str


def list_files(folder_uri: str | None, wanted: Wanted) -> list[FileState]:
    """The files that a folder holds, its index lists or `wanted` names; sizes are looked at, contents are not read.

    Raises `WeightsError` for a folder that cannot be read. None is the folder of a job that names none.
    """
    from corun_ray.service.weights.folder import inspect_folder

    there, indexed = inspect_folder(folder_uri) if folder_uri is not None else ({}, {})

    def state(name: str) -> str:
        if name not in there:
            return MISSING
        if name not in indexed:
            return NOT_INDEXED
        return OK if there[name] == indexed[name].size_bytes else SIZE_DIFFERS

    rows = []
    for name in sorted({*there, *indexed, *wanted}):
        content = indexed.get(name)
        size, sha256 = (content.size_bytes, content.sha256) if content else (there.get(name), None)
        rows.append(FileState(name, size, sha256, state(name), wanted.get(name, "")))
    return rows


def describe_lacking(folder_uri: str | None, wanted: Wanted) -> list[str]:
    """One line for each wanted file that cannot be used as it is; empty where all are there."""
    where = "the job names no weights folder" if folder_uri is None else folder_uri
    rows = [row for row in list_files(folder_uri, wanted) if row.name in wanted and row.state != OK]
    return [f"{row.name} (for {row.needed_by}): {row.state} ({where})" for row in rows]
