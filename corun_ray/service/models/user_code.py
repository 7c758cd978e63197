"""A user's own network class: its module travels from beside the job file to every process that builds it."""

import hashlib
import sys
import tempfile
from pathlib import Path

UserCode = dict[str, bytes]
"""The files of one module or package, by their paths below the folder that goes on `sys.path`."""


def collect_code(network_type: str, folder: Path) -> UserCode:
    """The files of the module that `module.path:ClassName` names, if it lies in `folder`; else none.

    A module that is not there has to be installed wherever the network is built.
    """
    module, colon, _ = network_type.partition(":")
    if not colon:
        return {}
    top = module.partition(".")[0]
    single = folder / f"{top}.py"
    found = [single] if single.is_file() else sorted((folder / top).rglob("*.py"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def write_code(code: UserCode, folder: Path) -> list[Path]:
    """Writes the files below `folder`; returns what lies at its top: a module or a package."""
    for name, content in code.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return sorted({folder / name.partition("/")[0] for name in code})


def install_code(code: UserCode) -> None:
    """Makes the module importable in this process, once."""
    if not code:
        return
    digest = hashlib.sha256()
    for name, content in sorted(code.items()):
        digest.update(name.encode() + b"\0" + content + b"\0")
    marker = f"corun-ray-code-{digest.hexdigest()[:16]}"
    if any(marker in entry for entry in sys.path):
        return
    folder = Path(tempfile.mkdtemp(prefix=f"{marker}-"))
    write_code(code, folder)
    sys.path.insert(0, str(folder))
