"""Folders and object-store URIs alike, through pyarrow's filesystems.

S3-compatible stores work by environment alone (`AWS_ENDPOINT_URL` and the usual credentials). One that refuses or
resets connections, or answers 5xx, is asked again for about `CORUN_STORAGE_PATIENCE_S` seconds (100 unless the
environment says otherwise) at ever longer intervals; then there is one `StorageError`.
"""

import math
import os
import posixpath
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import NativeFile, fs

from corun_ray.config.credentials import REFUSED, holds_credentials, without_credentials
from corun_ray.core.errors import UserError

T = TypeVar("T")

PATIENCE_VARIABLE, DEFAULT_PATIENCE_S = "CORUN_STORAGE_PATIENCE_S", 100.0
CONNECT_TIMEOUT_S = 3.0
SILENCE_TIMEOUT_S = 15.0
"""How long a connection may carry nothing; pyarrow's own 3 s fail a store slow to its first byte at every attempt."""
FIRST_DELAY_S = 0.05


class StorageError(UserError):
    """A place that cannot be read or written; the message says which, and why, in one line."""


class MissingFile(StorageError):
    """One file that is not there or, on this machine, one that its user may not read; the store itself answers."""


class PatientS3(fs.S3FileSystem):
    """An `S3FileSystem` that rides out its store's outages, and still does once unpickled: pyarrow's forgets how."""

    def __init__(self, **options: Any) -> None:
        # The "standard" strategy gives up early when many requests fail at once: they share one budget of retries.
        strategy = fs.AwsDefaultS3RetryStrategy(max_attempts=_num_retries(_patience_s()))
        timeouts = {"connect_timeout": CONNECT_TIMEOUT_S, "request_timeout": SILENCE_TIMEOUT_S}
        super().__init__(**{**options, **timeouts}, retry_strategy=strategy)

    @classmethod
    def like(cls, filesystem: fs.S3FileSystem) -> "PatientS3":
        """One for the same store."""
        _, (options,) = filesystem.__reduce__()
        return cls(**options)

    def __reduce__(self) -> tuple[Callable, tuple]:
        _, arguments = super().__reduce__()
        return _patient_s3, arguments


def _patient_s3(options: dict[str, Any]) -> PatientS3:
    return PatientS3(**options)


def _patience_s() -> float:
    text = os.environ.get(PATIENCE_VARIABLE) or str(DEFAULT_PATIENCE_S)
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise ValueError(f"{PATIENCE_VARIABLE} must be a number of seconds above 0, not {text!r}")


def _num_retries(patience_s: float) -> int:
    # The first retry comes at once, the next after FIRST_DELAY_S, each later one after twice as long.
    return 1 + round(math.log2(patience_s / FIRST_DELAY_S + 1))


@dataclass(frozen=True)
class Location:
    """A folder (or file) in some filesystem."""

    uri: str
    filesystem: fs.FileSystem
    path: str

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine's own filesystem."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return posixpath.basename(self.path)

    def child(self, relative: str) -> "Location":
        """A place below this one; raises `StorageError` for one that is not."""
        if posixpath.isabs(relative) or posixpath.normpath(relative).split("/")[0] == "..":
            raise StorageError(f"{relative!r} does not lie below {self.uri}")
        # The options of a URI stay at its end.
        place, mark, options = self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")
        uri = f"{posixpath.join(place, relative)}{mark}{options}"
        return Location(uri, self.filesystem, posixpath.join(self.path, relative))

    def files(self) -> list[str]:
        """Paths of all files below, relative to here, sorted; raises `StorageError` where there is no such folder."""
        return [*self.listing()]

    def listing(self) -> dict[str, fs.FileInfo]:
        """What is known of all files below (`size`, `mtime_ns`), by their paths as `files` has them; raises as that."""
        selector = fs.FileSelector(self.path, recursive=True)
        found = self._attempt("list", lambda: self.filesystem.get_file_info(selector))
        files = (info for info in found if info.type == fs.FileType.File and not _is_part(info.base_name))
        by_path = {posixpath.relpath(info.path, self.path): info for info in files}
        return dict(sorted(by_path.items()))

    def folders(self) -> list[str]:
        """Names of the folders right below, sorted; none where this is no folder."""
        selector = fs.FileSelector(self.path, allow_not_found=True)
        found = self._attempt("list", lambda: self.filesystem.get_file_info(selector))
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def exists(self) -> bool:
        """Whether a file or folder is here."""
        info = self._attempt("look at", lambda: self.filesystem.get_file_info(self.path))
        return info.type != fs.FileType.NotFound

    def read(self) -> bytes:
        """The whole file; raises `MissingFile` where there is none, `StorageError` where that cannot be known."""

        def read() -> bytes:
            with self.filesystem.open_input_file(self.path) as file:
                return file.read()

        return self._attempt("read", read)

    def read_range(self, offset: int, num_bytes: int) -> bytes:
        """A part of the file, shorter where the file ends, by one request; raises as `read` does.

        The file is kept open for the next part, so it must be one that is not changed in place.
        """
        return self._attempt("read", lambda: _opened(self.uri).read_at(num_bytes, offset))

    def write(self, data: bytes) -> None:
        """Replaces the file, so that a reader sees the old content or the new one, never a part."""

        def write() -> None:
            if self.is_local:
                return _replace(Path(self.path), data)
            self.filesystem.create_dir(posixpath.dirname(self.path), recursive=True)
            # An object store shows an object only when it is complete.
            with self.filesystem.open_output_stream(self.path) as file:
                file.write(data)

        self._attempt("write", write)

    def delete(self) -> None:
        """Deletes the file, or the folder with all below it; nothing to do where there is neither."""

        def delete() -> None:
            kind = self.filesystem.get_file_info(self.path).type
            if kind == fs.FileType.Directory:
                self.filesystem.delete_dir(self.path)
            elif kind != fs.FileType.NotFound:
                self.filesystem.delete_file(self.path)

        # Others may delete it too.
        with suppress(MissingFile):
            self._attempt("delete", delete)

    def download(self, folder: Path) -> Path:
        """Copies the file or folder into `folder`, under its own name, all of it or nothing; returns where it is."""
        target = folder / self.name

        def download() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=folder) as part:
                copy = Path(part, target.name)
                if self.filesystem.get_file_info(self.path).type == fs.FileType.Directory:
                    copy.mkdir()
                fs.copy_files(self.path, str(copy), self.filesystem, fs.LocalFileSystem())
                copy.replace(target)

        self._attempt("read", download)
        return target

    def _attempt(self, verb: str, action: Callable[[], T]) -> T:
        try:
            return action()
        except (OSError, ValueError) as error:
            refused = self.is_local and verb == "read" and isinstance(error, PermissionError)
            kind = MissingFile if refused or isinstance(error, FileNotFoundError) else StorageError
            # Of a local file, pyarrow would name the path again, twice the error's number, and its own temporary.
            known = self.is_local and isinstance(error, OSError) and error.errno
            raise kind(f"cannot {verb} {self.uri}: {os.strerror(known) if known else _first_line(error)}") from None


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: two writers must not share it.
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            # Some filesystems tell of a full disk only now.
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _is_part(name: str) -> bool:
    """Whether a file is what a writer that was killed left behind."""
    return name.startswith(".") and name.endswith(".part")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


@lru_cache(maxsize=32)
def _opened(uri: str) -> NativeFile:
    place = locate(uri)
    return place.filesystem.open_input_file(place.path)


@lru_cache(maxsize=64)
def locate(uri: str) -> Location:
    """The place that a folder path or URI means.

    Raises `StorageError` for a URI that pyarrow does not know, and for one with credentials.
    """
    if holds_credentials(uri):
        raise StorageError(f"{without_credentials(uri)} {REFUSED}")
    if "://" not in uri:
        path = Path(uri).expanduser().absolute()
        return Location(str(path), fs.LocalFileSystem(), str(path))
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
        if isinstance(filesystem, fs.S3FileSystem):
            filesystem = PatientS3.like(filesystem)
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot open {uri}: {_first_line(error)}") from None
    return Location(uri.rstrip("/"), filesystem, path.rstrip("/"))
