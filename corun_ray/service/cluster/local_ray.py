"""Where a local Ray puts its files and sockets, looked at before it starts: Ray itself fails there in tracebacks."""

import os
import tempfile
from pathlib import Path

from corun_ray.core.errors import UserError

FOLDER_VARIABLES = ("RAY_TMPDIR", "TMPDIR")
"""Ray takes the first that is set, else /tmp."""
MAX_SOCKET_BYTES = 107
"""Of the path of a Unix socket on Linux."""
SESSION = "ray/session_2000-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
"""Of the length of Ray's longest path of a socket."""
TRIAL_BYTES = 2**20
"""Written for a trial: some file systems tell only then that they are full."""


class LocalRayError(UserError):
    """A local Ray that cannot start as things are; the message is one line."""


def find_folder() -> tuple[str, str]:
    """Return the folder below which a local Ray keeps its files, and the variable that names it, if one does."""
    for name in FOLDER_VARIABLES:
        if name in os.environ:
            return os.environ[name], name
    return "/tmp", ""


def check_folder() -> None:
    """Check that a local Ray can have its sockets and files where it puts them.

    Raises `LocalRayError`: the path is too long for sockets, cannot be written, or has no room.
    """
    folder, variable = find_folder()
    given = f"{variable}={folder}" if variable else folder

    # The kernel keeps the paths of sockets in a field of fixed size.
    socket = Path(folder, SESSION.format(pid=os.getpid()))
    num_bytes = len(os.fsencode(socket))
    if num_bytes > MAX_SOCKET_BYTES:
        longest = MAX_SOCKET_BYTES - num_bytes + len(os.fsencode(folder))
        raise LocalRayError(
            f"a local Ray cannot start below {given}: paths of sockets have at most {MAX_SOCKET_BYTES} bytes, these "
            f"would have {num_bytes}; set RAY_TMPDIR to a folder of at most {longest} bytes, such as RAY_TMPDIR=/tmp"
        )

    # Ray's own folder may be another user's.
    ray_folder = Path(folder, "ray")
    try:
        ray_folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=ray_folder) as trial:
            trial.write(bytes(TRIAL_BYTES))
            trial.flush()
            os.fsync(trial.fileno())
    except OSError as error:
        raise LocalRayError(
            f"a local Ray cannot start: cannot write below {ray_folder}"
            f"{f' ({given})' if variable else ''}: {error.strerror}; set RAY_TMPDIR to a folder that can be written"
        ) from None
