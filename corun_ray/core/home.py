"""A home for processes that have none, as containers run them: any uid without a name, no HOME, a read-only root.

Libraries look for the home and the name of the user when they are imported, or keep caches there, and fail without.
"""

import os
import pwd
import stat
import tempfile
from pathlib import Path

PREFIX = "corun-ray-home-"
"""How the folder begins that takes the place of a home; the uid follows."""
NAME_VARIABLES = ("LOGNAME", "USER", "LNAME", "USERNAME")
"""Where Python looks for the name of the user before it asks the system."""
CACHES = {
    "CORUN_WEIGHTS_CACHE": "weights",
    "HF_HOME": "huggingface",
    "MPLCONFIGDIR": "matplotlib",
    "TORCH_HOME": "torch",
    "XDG_CACHE_HOME": "cache",
    "XDG_CONFIG_HOME": "config",
}
"""Variables of the libraries that keep files below the home, and the folders that they get instead."""


def settle_in() -> None:
    """Give this process, and those that it starts, a user name and a home that can be written, if they lack them.

    Where there is no home, HOME names a private folder among the temporary files. A home that is there and cannot be
    written stays, since it may hold credentials; only caches go elsewhere. Values that the environment has stay. Where
    no temporary file can be written either, nothing is changed.
    """
    if not _has_name() and not any(os.environ.get(name) for name in NAME_VARIABLES):
        os.environ["USER"] = f"uid-{os.getuid()}"

    home = _find_home()
    if home is not None and os.access(home, os.W_OK | os.X_OK):
        return
    folder = _make_private_folder()
    if folder is None:
        return
    if home is None:
        os.environ["HOME"] = str(folder)
        return
    for variable, name in CACHES.items():
        os.environ.setdefault(variable, str(folder / name))


def has_no_home() -> bool:
    """Tell whether HOME is a folder that took the place of a home: nothing that must last may be written there."""
    return Path(os.environ.get("HOME", "")).name.startswith(PREFIX)


def _has_name() -> bool:
    """Return whether the system has a name for this uid."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


def _find_home() -> Path | None:
    """Return the user's home if there is such a folder."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if home.is_dir() else None


def _make_private_folder() -> Path | None:
    """Return this user's folder among the temporary files, made where it is missing.

    None where it cannot be made, and where somebody else may write in it.
    """
    try:
        folder = Path(tempfile.gettempdir(), f"{PREFIX}{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
    except OSError:
        return None
    is_private = stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid() and not state.st_mode & 0o077
    return folder if is_private else None
