"""Folders and object-store URIs alike, through pyarrow's filesystems.

S3-compatible stores work by environment alone (`AWS_ENDPOINT_URL` and the usual credentials).
"""

import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from pyarrow import fs

T = TypeVar("T")


class StorageError(Exception):
    """A place that cannot be read or written; the message says which, and why, in one line."""


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

    def child(self, relative: str) -> "Location":
        """A place below this one."""
        return Location(posixpath.join(self.uri, relative), self.filesystem, posixpath.join(self.path, relative))

    def files(self) -> list[str]:
        """Paths of all files below, relative to here, sorted; raises `StorageError` where there is no such folder."""
        selector = fs.FileSelector(self.path, recursive=True)
        found = self._attempt("list", lambda: self.filesystem.get_file_info(selector))
        files = (posixpath.relpath(info.path, self.path) for info in found if info.type == fs.FileType.File)
        return sorted(files)

    def exists(self) -> bool:
        """Whether a file or folder is here."""
        info = self._attempt("look at", lambda: self.filesystem.get_file_info(self.path))
        return info.type != fs.FileType.NotFound

    def read(self) -> bytes:
        """The whole file."""

        def read() -> bytes:
            with self.filesystem.open_input_file(self.path) as file:
                return file.read()

        return self._attempt("read", read)

    def write(self, data: bytes) -> None:
        """Replaces the file, so that a reader sees the old content or the new one, never a part."""

        def write() -> None:
            self.filesystem.create_dir(posixpath.dirname(self.path), recursive=True)
            # An object store shows an object only when it is complete; a folder needs the detour.
            target = f"{self.path}.part" if self.is_local else self.path
            with self.filesystem.open_output_stream(target) as file:
                file.write(data)
            if self.is_local:
                self.filesystem.move(target, self.path)

        self._attempt("write", write)

    def download(self, folder: Path) -> Path:
        """Copies the file or folder into `folder`, under its own name, and returns where it is."""
        target = folder / posixpath.basename(self.path)
        if self._attempt("look at", lambda: self.filesystem.get_file_info(self.path)).type == fs.FileType.Directory:
            target.mkdir(parents=True)
        here = fs.LocalFileSystem()
        self._attempt("read", lambda: fs.copy_files(self.path, str(target), self.filesystem, here))
        return target

    def _attempt(self, verb: str, action: Callable[[], T]) -> T:
        try:
            return action()
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
            raise StorageError(f"cannot {verb} {self.uri}: {reason}") from None


@lru_cache(maxsize=64)
def locate(uri: str) -> Location:
    """The place that a folder path or URI means; raises `StorageError` for a URI that pyarrow does not know."""
    if "://" not in uri:
        path = Path(uri).expanduser().absolute()
        return Location(str(path), fs.LocalFileSystem(), str(path))
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot open {uri}: {str(error).strip().splitlines()[0][:300]}") from None
    return Location(uri.rstrip("/"), filesystem, path.rstrip("/"))
