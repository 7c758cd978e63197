"""A user's own network class: its module travels from the job file's folder to every process that builds it."""

import hashlib
import sys
import tempfile
from pathlib import Path

MARKER_PREFIX = "corun-ray-code-"
"""Begins the name of the temporary folder from which a process imports a user's module."""
DIGEST_CHARACTERS = 16

UserCode = dict[str, bytes]
"""The files of one module or package, by their paths below the folder that stands in `sys.path`."""


def collect_code(network_type: str, folder: Path) -> UserCode:
    """Read the module that `module.path:ClassName` names from `folder`.

    Returns no files where `network_type` names no module, or where the module is not in `folder`. Such a module has to
    be installed wherever the network is built.
    """
    module, colon, _ = network_type.partition(":")
    if not colon:
        return {}

    # A module is one file; a package is all files below its folder.
    top = module.partition(".")[0]
    single = folder / f"{top}.py"
    paths = [single] if single.is_file() else sorted((folder / top).rglob("*.py"))

    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def write_code(code: UserCode, folder: Path) -> list[Path]:
    """Write the files below `folder`; return their top level."""
    top_paths = set()
    for name, content in code.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        top_paths.add(folder / name.partition("/")[0])
    return sorted(top_paths)


def install_code(code: UserCode) -> None:
    """Make the module importable in this process, once."""
    if not code:
        return

    # The digest of the files names the folder: the same code is installed once, changed code again.
    digest = hashlib.sha256()
    for name, content in sorted(code.items()):
        digest.update(name.encode() + b"\0" + content + b"\0")
    marker = f"{MARKER_PREFIX}{digest.hexdigest()[:DIGEST_CHARACTERS]}"
    if any(marker in entry for entry in sys.path):
        return

    folder = Path(tempfile.mkdtemp(prefix=f"{marker}-"))
    write_code(code, folder)
    sys.path.insert(0, str(folder))
