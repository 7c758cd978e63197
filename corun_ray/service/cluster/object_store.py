"""The object store of a Ray that starts here: as large as the place that holds it has room.

Ray takes a third of the memory, in /dev/shm if that is large enough, else in a file among its temporary files: without
a look at the disk, and with a warning that our output leaves out. A container has 64 MiB of /dev/shm, if nobody says
otherwise; a process that writes an object where there is no room is killed by the system.
"""

import os
import shutil
import tempfile

import ray
from ray._private.ray_constants import OBJECT_STORE_MINIMUM_MEMORY_BYTES
from ray._private.utils import estimate_available_memory, resolve_object_store_memory

SHARED_MEMORY = "/dev/shm"
DISK_SHARE = 0.5
"""Largest share of a disk's free room; objects that overflow are written to the same disk."""
MIB = 2**20


def plan_object_store() -> int | None:
    """Return the bytes to ask for where Ray starts on this machine; None leaves the choice to Ray."""
    wanted_bytes = resolve_object_store_memory(estimate_available_memory())
    shm_bytes = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else 0
    disk_bytes = shutil.disk_usage(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()).free
    return choose_size(wanted_bytes, shm_bytes, disk_bytes)


def choose_size(wanted_bytes: int, shm_bytes: int, disk_bytes: int) -> int | None:
    """Choose the size of a store that should have `wanted_bytes`.

    Ray itself takes the shared memory for every size that fits into it, else the disk. The arguments are the free bytes
    of both.
    """
    if shm_bytes >= wanted_bytes:
        return None

    # A store in memory is better than a smaller one on a disk. Ray demands a least size.
    on_disk_bytes = min(wanted_bytes, int(DISK_SHARE * disk_bytes))
    return max(on_disk_bytes, shm_bytes, OBJECT_STORE_MINIMUM_MEMORY_BYTES)


def describe_local_store() -> str:
    """Tell where the objects of the Ray that was started here lie, if not in memory; else return nothing."""
    store_bytes = ray.nodes()[0]["Resources"].get("object_store_memory", 0)
    shm_bytes = shutil.disk_usage(SHARED_MEMORY).total if os.path.isdir(SHARED_MEMORY) else 0
    return describe_store(int(store_bytes), shm_bytes)


def describe_store(store_bytes: int, shm_bytes: int) -> str:
    """Tell that a store lies on a disk because the shared memory is smaller; else return nothing."""
    if store_bytes <= shm_bytes:
        return ""
    return f", its objects on the disk, as {SHARED_MEMORY} has {shm_bytes // MIB} MiB (docker run --shm-size=8g)"
