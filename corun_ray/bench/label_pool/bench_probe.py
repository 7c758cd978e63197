"""What can be seen of the machine while the label pool is measured: memory, processor time, files, versions."""

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import ray
from pyarrow import fs

from corun_ray.service.storage import Location

REPORT_S = 1.0
"""After so long, Ray's word on its object store is up to date."""


def object_store_bytes() -> float:
    """What lies in the object stores of all nodes."""
    time.sleep(REPORT_S)
    return object_store_capacity_bytes() - ray.available_resources().get("object_store_memory", 0.0)


def object_store_capacity_bytes() -> float:
    """What Ray keeps in memory; beyond it, it writes to disk."""
    return ray.cluster_resources()["object_store_memory"]


def private_bytes(actors: Sequence[Any]) -> int:
    """Memory of the actors' processes, without what they share with others (the object store)."""
    return sum(ray.get([actor.__ray_call__.remote(_private_bytes) for actor in actors]))


def cpu_s(actors: Sequence[Any]) -> float:
    """Processor time that the actors' processes have used, of all their threads."""
    return sum(ray.get([actor.__ray_call__.remote(_cpu_s) for actor in actors]))


def sizes(place: Location) -> dict[str, int]:
    """Every file below by its path, in bytes; none where there is no such folder."""
    selector = fs.FileSelector(place.path, recursive=True, allow_not_found=True)
    return {info.path: info.size for info in place.filesystem.get_file_info(selector) if info.is_file}


def machine() -> dict[str, str | float]:
    """This machine, and what runs on it."""
    return {
        "cores": os.cpu_count() or 0,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "nodes": sum(node["Alive"] for node in ray.nodes()),
        "object_store_bytes": object_store_capacity_bytes(),
        "python": platform.python_version(),
        "ray": ray.__version__,
        "pyarrow": pyarrow.__version__,
    }


def _private_bytes(_: Any) -> int:
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _cpu_s(_: Any) -> float:
    return time.process_time()
