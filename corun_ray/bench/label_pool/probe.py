"""Observe the machine while the label pool is measured: memory, processor time, files, versions."""

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import ray
from pyarrow import fs
from ray.actor import ActorProxy

from corun_ray.service.storage import Location

REPORT_S = 1.0
"""Seconds until Ray's figures of its object store are up to date."""


def measure_object_store_bytes() -> float:
    """Return the bytes in all nodes' object stores."""
    # Ray knows the capacity and the free bytes.
    time.sleep(REPORT_S)
    return read_object_store_capacity_bytes() - ray.available_resources().get("object_store_memory", 0.0)


def read_object_store_capacity_bytes() -> float:
    """Return the bytes that object stores can hold.

    Beyond these, Ray writes to disk.
    """
    return ray.cluster_resources()["object_store_memory"]


def measure_private_bytes(actors: Sequence[ActorProxy[Any]]) -> int:
    """Return the private memory of the actors' processes.

    Shared memory, such as the object store's, is not counted.
    """
    return sum(ray.get([actor.__ray_call__.remote(_read_private_bytes) for actor in actors]))


def _read_private_bytes(_: Any) -> int:
    # Linux counts pages: total size, resident, shared and so on.
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def measure_cpu_s(actors: Sequence[ActorProxy[Any]]) -> float:
    """Return the processor time of the actors' processes.

    All of their threads count.
    """
    return sum(ray.get([actor.__ray_call__.remote(_read_cpu_s) for actor in actors]))


def _read_cpu_s(_: Any) -> float:
    return time.process_time()


def list_file_sizes(place: Location) -> dict[str, int]:
    """Return path → bytes of every file below a folder.

    A folder that does not exist has no files.
    """
    selector = fs.FileSelector(place.path, recursive=True, allow_not_found=True)
    sizes = {}
    for info in place.filesystem.get_file_info(selector):
        if info.is_file:
            sizes[info.path] = info.size
    return sizes


def describe_machine() -> dict[str, str | float]:
    """Return this machine's size and versions of software."""
    return {
        "cores": os.cpu_count() or 0,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "nodes": sum(node["Alive"] for node in ray.nodes()),
        "object_store_bytes": read_object_store_capacity_bytes(),
        "python": platform.python_version(),
        "ray": ray.__version__,
        "pyarrow": pyarrow.__version__,
    }
