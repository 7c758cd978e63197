"""Comparing places: whether two spellings name one folder, and whether a folder lies in another.

Links, `..`, `file://`, double slashes and, where the file system folds it, case do not make another place of one.
"""

import os
import posixpath
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow import fs

from corun_ray.service.s3 import S3Store
from corun_ray.service.storage import Location

AMAZON = "amazonaws.com"
THIS_MACHINE = ("localhost", "::1", "127.0.0.1")


def find_below(inner: Location, outer: Location) -> str | None:
    """Return the path of a place below another; empty where both are one, None where it does not lie there."""
    if inner.is_local != outer.is_local:
        return None
    if inner.is_local:
        return _find_local_path(Path(inner.path), Path(outer.path))

    # Object stores have no links: one store, and the parts of one path begin with those of the other.
    if _name_store(inner) != _name_store(outer):
        return None
    parts, outer_parts = _split_path(inner), _split_path(outer)
    if parts[: len(outer_parts)] != outer_parts:
        return None
    return "/".join(parts[len(outer_parts) :])


def find_overwritten(source: Location, keys: Sequence[str], target: Location, names: Sequence[str]) -> list[str]:
    """Return those of the files `names` below `target` that are files `keys` below `source`, or what these link to."""
    originals = set()
    for key in keys:
        originals.add(_identify(source, key))
        path = posixpath.join(source.path, key)
        if source.is_local and os.path.islink(path):
            real = os.path.realpath(path)
            originals.add((_identify_folder(os.path.dirname(real)), os.path.basename(real)))
    return [name for name in names if _identify(target, name) in originals]


# --- Local places ---


def _find_local_path(inner: Path, outer: Path) -> str | None:
    """Return the path of a local place below another, as `find_below` does."""
    real_inner, real_outer = Path(os.path.realpath(inner)), Path(os.path.realpath(outer))
    if real_inner.is_relative_to(real_outer):
        path = real_inner.relative_to(real_outer).as_posix()
        return "" if path == "." else path

    # One folder may have names that differ by case, or lie at two mount points.
    for folder in (real_inner, *real_inner.parents):
        if folder.exists() and real_outer.exists() and folder.samefile(real_outer):
            path = real_inner.relative_to(folder).as_posix()
            return "" if path == "." else path
    return None


def _identify(place: Location, path: str) -> tuple[object, str]:
    """Return what is equal for two spellings of one file below a place."""
    folder, name = posixpath.split(posixpath.join(place.path, path))
    if place.is_local:
        return _identify_folder(folder), name
    return (_name_store(place), *_split_path(place), *posixpath.dirname(path).split("/")), name


def _identify_folder(folder: str) -> object:
    """Return what is equal for two spellings of one local folder."""
    try:
        found = os.stat(folder)
    except OSError:
        # A folder that is not there yet has no files.
        return os.path.realpath(folder)
    return found.st_dev, found.st_ino


# --- Object stores ---


def _name_store(place: Location) -> str:
    """Return the kind of a store, with its endpoint where it is not Amazon's."""
    filesystem = place.filesystem
    store = filesystem.handler if isinstance(filesystem, fs.PyFileSystem) else None
    if not isinstance(store, S3Store):
        return filesystem.type_name

    endpoint = str(store.options.get("endpoint_override") or "")
    address = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
    host = address.hostname or ""
    if not host or host.endswith(AMAZON):
        return "s3"
    host = THIS_MACHINE[0] if host in THIS_MACHINE else host
    return f"s3 {host}:{address.port}"


def _split_path(place: Location) -> list[str]:
    """Return the parts of a path in an object store."""
    return [part for part in posixpath.normpath(f"/{place.path}").split("/") if part]
