"""Local folders and object stores behind one interface, through pyarrow's filesystems.

S3-compatible stores are configured as for boto3 (`service/s3.py`). A request that is refused, reset or answered with
5xx is retried at growing intervals for about `CORUN_STORAGE_PATIENCE_S` seconds (default: 100). Then one `StorageError`
is raised.
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
from typing import TypeVar
from urllib.parse import quote

from pyarrow import NativeFile, fs

from corun_ray.config.credentials import REFUSED, holds_credentials, mask_credentials
from corun_ray.config.s3_uri import S3_SCHEME, has_unreadable_part, parse_s3_uri
from corun_ray.core.errors import UserError
from corun_ray.core.home import has_no_home
from corun_ray.service.errors import format_reason
from corun_ray.service.s3 import open_s3

T = TypeVar("T")

PATIENCE_VARIABLE = "CORUN_STORAGE_PATIENCE_S"
DEFAULT_PATIENCE_S = 100.0
FIRST_DELAY_S = 0.05
"""Pause before the second retry; the first retry comes at once."""
CACHED_LOCATIONS = 64
OPEN_FILES = 32
"""Files that stay open for `Location.read_range`."""
URI_CHARACTERS = "%:/?#[]@!$&'()*+,;="
"""What stays as it is in a URI that pyarrow parses: delimiters, and what is encoded already."""


class StorageError(UserError):
    """A place that cannot be read or written; the message names the place and the reason in one line."""


class MissingFile(StorageError):
    """One file that is not there, or a local file that the user may not read. The store itself answers."""


class DamagedFile(StorageError):
    """A file that is read and has not the content that it should have."""


def _read_patience_s() -> float:
    """Read the time for retries from the environment.

    Raises `ValueError` where the variable is no positive number.
    """
    text = os.environ.get(PATIENCE_VARIABLE) or str(DEFAULT_PATIENCE_S)
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise ValueError(f"{PATIENCE_VARIABLE} must be a number of seconds above 0, not {text!r}")


def _count_retries(patience_s: float) -> int:
    """Return how many retries fill `patience_s`."""
    # The first retry comes at once, the next after FIRST_DELAY_S, and each later one after twice as long.
    return 1 + round(math.log2(patience_s / FIRST_DELAY_S + 1))


@dataclass(frozen=True)
class Location:
    """A folder or file in some filesystem."""

    uri: str
    filesystem: fs.FileSystem
    path: str

    @property
    def is_local(self) -> bool:
        """Whether the place is on this machine's own filesystem."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return posixpath.basename(self.path)

    # --- Navigating ---

    def child(self, relative: str) -> "Location":
        """Return the place at a path relative to this one.

        Raises `StorageError` where the path leads out of this place.
        """
        if posixpath.isabs(relative) or posixpath.normpath(relative).split("/")[0] == "..":
            raise StorageError(f"{relative!r} does not lie below {self.uri}")

        place, options = split_options(self.uri)
        uri = posixpath.join(place, _quote_name(relative) if "://" in place else relative) + options
        return Location(uri, self.filesystem, posixpath.join(self.path, relative))

    def parent(self) -> "Location":
        """Return the folder that holds this place."""
        place, options = split_options(self.uri)
        uri = posixpath.dirname(place.rstrip("/")) + options
        return Location(uri, self.filesystem, posixpath.dirname(self.path))

    # --- Listing ---

    def exists(self) -> bool:
        """Return whether there is a file or folder here."""
        info = self._attempt("look at", lambda: self.filesystem.get_file_info(self.path))
        return info.type != fs.FileType.NotFound

    def is_folder(self) -> bool:
        """Return whether there is a folder here."""
        info = self._attempt("look at", lambda: self.filesystem.get_file_info(self.path))
        return info.type == fs.FileType.Directory

    def find_file(self) -> fs.FileInfo | None:
        """Return the info of the file here; None where there is none."""
        info = self._attempt("look at", lambda: self.filesystem.get_file_info(self.path))
        return info if info.type == fs.FileType.File else None

    def list_files(self) -> list[str]:
        """List the relative paths of all files below, sorted.

        Raises `StorageError` where there is no such folder.
        """
        return list(self.list_infos())

    def list_infos(self) -> dict[str, fs.FileInfo]:
        """Return the info of every file below, sorted by path.

        The info has `size` and `mtime_ns`; paths are relative. Files that a killed writer left unfinished are skipped.

        Raises `StorageError` where there is no such folder.
        """
        selector = fs.FileSelector(self.path, recursive=True)
        found = self._attempt("list", lambda: self.filesystem.get_file_info(selector))
        if not self.is_local:
            self._refuse_unreadable([info.path for info in found if info.type == fs.FileType.File])
        by_path = {}
        for info in found:
            if info.type == fs.FileType.File and not _is_unfinished(info.base_name):
                by_path[posixpath.relpath(info.path, self.path)] = info
        return dict(sorted(by_path.items()))

    def list_folders(self) -> list[str]:
        """List the names of the folders directly below, sorted.

        There are none where this is no folder.
        """
        selector = fs.FileSelector(self.path, allow_not_found=True)
        found = self._attempt("list", lambda: self.filesystem.get_file_info(selector))
        paths = [info.path for info in found if info.type == fs.FileType.Directory]

        # An object store may have keys with an empty part, which no folder of ours has.
        names = [posixpath.relpath(path, self.path) for path in paths]
        return sorted(name for name in names if not has_unreadable_part(name))

    # --- Reading ---

    def read(self) -> bytes:
        """Return the content of the whole file.

        Raises `MissingFile` where there is no file, and `StorageError` where the store does not tell.
        """

        def read() -> bytes:
            with self.filesystem.open_input_file(self.path) as file:
                return file.read()

        return self._attempt("read", read)

    def read_range(self, offset: int, num_bytes: int) -> bytes:
        """Read a part of the file by one request.

        The part is shorter where the file ends. The file stays open for the next part, so it must never be changed in
        place.

        Raises the errors of `read`.
        """
        return self._attempt("read", lambda: _open_file(self.uri).read_at(num_bytes, offset))

    def download(self, folder: Path) -> Path:
        """Copy the file or folder into `folder`.

        It keeps its own name. Returns its new path. The copy appears whole or not at all.

        Raises the errors of `read`.
        """
        target = folder / self.name

        def download() -> None:
            folder.mkdir(parents=True, exist_ok=True)

            # Copy into a temporary folder beside the target, then move: a rename is atomic on one disk.
            with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=folder) as part:
                copy = Path(part, target.name)
                if self.filesystem.get_file_info(self.path).type == fs.FileType.Directory:
                    copy.mkdir()
                fs.copy_files(self.path, str(copy), self.filesystem, fs.LocalFileSystem())
                copy.replace(target)

        self._attempt("read", download)
        return target

    # --- Writing ---

    def write(self, data: bytes) -> None:
        """Replace the file as a whole.

        A reader sees the old content or the new one, never a part.

        Raises `StorageError`.
        """

        def write() -> None:
            if self.is_local:
                _replace_file(Path(self.path), data)
                return

            # An object store shows an object only when it is complete, so no temporary name is needed.
            self.filesystem.create_dir(posixpath.dirname(self.path), recursive=True)
            with self.filesystem.open_output_stream(self.path) as file:
                file.write(data)

        self._attempt("write", write)

    def create(self, data: bytes) -> bool:
        """Create a local file; return False where there is something already. One of many callers succeeds.

        Raises `StorageError`.
        """

        def create() -> bool:
            path = Path(self.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with path.open("xb") as file:
                    file.write(data)
            except FileExistsError:
                return False
            return True

        return self._attempt("write", create)

    def create_folder(self) -> bool:
        """Create a local folder; return False where there is something already. One of many callers succeeds.

        Raises `StorageError`.
        """

        def create() -> bool:
            path = Path(self.path)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                path.mkdir()
            except FileExistsError:
                return False
            return True

        return self._attempt("write", create)

    def delete(self) -> None:
        """Delete the file, or the folder with everything below.

        Where there is neither, nothing happens.

        Raises `StorageError`.
        """

        def delete() -> None:
            kind = self.filesystem.get_file_info(self.path).type
            if kind == fs.FileType.Directory:
                self.filesystem.delete_dir(self.path)
            elif kind != fs.FileType.NotFound:
                self.filesystem.delete_file(self.path)

        # Another process may have deleted the file in between.
        with suppress(MissingFile):
            self._attempt("delete", delete)

    def _refuse_unreadable(self, paths: list[str]) -> None:
        """Raise `StorageError` where keys in the store cannot be read; left out, they would be missed by nobody."""
        keys = [path.removeprefix(f"{self.path}/") for path in paths]
        unreadable = sorted(key for key in keys if has_unreadable_part(key))
        if unreadable:
            count = "1 key has" if len(unreadable) == 1 else f"{len(unreadable)} keys have"
            raise StorageError(
                f"cannot list {self.uri}: {count} an empty part (//), a part . or .. and cannot be read "
                f"({unreadable[0]!r}); rename them, or give a folder without"
            )

    def _attempt(self, verb: str, action: Callable[[], T]) -> T:
        """Return the result of `action`; raise its errors as one line.

        The line is `cannot VERB URI: REASON`.
        """
        try:
            return action()
        except (OSError, ValueError) as error:
            # A missing file is the file's fault, and a local one without permission as well; the rest is the store's.
            is_refused = self.is_local and verb == "read" and isinstance(error, PermissionError)
            kind = MissingFile if is_refused or isinstance(error, FileNotFoundError) else StorageError

            # For a local file, use the system's own text: pyarrow's repeats the path and the number of the error, and
            # names the temporary file.
            reason = format_reason(error)
            if self.is_local and isinstance(error, OSError) and error.errno:
                reason = os.strerror(error.errno)
            raise kind(f"cannot {verb} {self.uri}: {reason}") from None


@lru_cache(maxsize=CACHED_LOCATIONS)
def locate(uri: str) -> Location:
    """Return the place of a folder path or URI.

    Raises `StorageError` for a scheme that pyarrow does not know, and for a URI with credentials.
    """
    if holds_credentials(uri):
        raise StorageError(f"{mask_credentials(uri)} {REFUSED}")

    # A plain path is a local place.
    if "://" not in uri:
        path = expand_home(uri).absolute()
        return Location(str(path), fs.LocalFileSystem(), str(path))

    # The scheme of a URI chooses the filesystem.
    try:
        if uri.startswith(S3_SCHEME):
            parsed = parse_s3_uri(uri)
            filesystem, key = open_s3(parsed, _count_retries(_read_patience_s())), parsed.path
        else:
            filesystem, key = fs.FileSystem.from_uri(quote(uri, safe=URI_CHARACTERS))
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot open {uri}: {format_reason(error)}") from None
    place, options = split_options(uri)
    return Location(place.rstrip("/") + options, filesystem, key.rstrip("/"))


def expand_home(path: str) -> Path:
    """Return a local path with `~` replaced by the user's home.

    Raises `StorageError` where there is no such home.
    """
    if not path.startswith("~"):
        return Path(path)
    try:
        expanded = Path(path).expanduser()
    except RuntimeError:
        expanded = None
    if expanded is None or has_no_home():
        raise StorageError(f"{path}: there is no such home folder here; expected an absolute path or a URI")
    return expanded


def split_options(uri: str) -> tuple[str, str]:
    """Split a URI into its place and its options.

    The options (`?region=…`) stay at the end of the URI of a child. A plain path has no options: a question mark
    belongs to a file's name there.
    """
    if "://" not in uri:
        return uri, ""
    place, mark, options = uri.partition("?")
    return place, mark + options


def _quote_name(name: str) -> str:
    """Encode what would have a meaning of its own in a URI; spaces and letters stay, for people."""
    return name.replace("%", "%25").replace("?", "%3F").replace("#", "%23")


@lru_cache(maxsize=OPEN_FILES)
def _open_file(uri: str) -> NativeFile:
    place = locate(uri)
    return place.filesystem.open_input_file(place.path)


def _replace_file(path: Path, data: bytes) -> None:
    """Write a local file under a temporary name, then move it."""
    path.parent.mkdir(parents=True, exist_ok=True)

    # Every writer has a name of its own: two writers must not share a temporary file.
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            # Some filesystems report a full disk only now.
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _is_unfinished(name: str) -> bool:
    """Return whether a killed writer left this file."""
    return name.startswith(".") and name.endswith(".part")
