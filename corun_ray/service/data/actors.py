"""New."""

import traceback
from collections.abc import Iterator
from typing import Any

import ray
from ray.data import ActorPoolStrategy, Dataset
from ray.exceptions import RayTaskError

from corun_ray.service.errors import find_root_cause
from corun_ray.service.storage import StorageError


def rows_of(outcomes: Dataset) -> Iterator[dict[str, Any]]:
    """The rows that actors return; raises a `StorageError` of theirs, of which Ray keeps only the text.

    Keep no name for `outcomes`: after an error, their actors go with the last reference.
    """
    try:
        yield from outcomes.iter_rows()
    except RayTaskError as error:
        # Ray Data gives its actors up when nothing refers to the iteration any more; the error's frames would.
        traceback.clear_frames(error.__traceback__)
        del outcomes
        kind, _, reason = find_root_cause(str(error)).partition(": ")
        if kind.endswith(StorageError.__name__):
            raise StorageError(reason) from None
        raise


def actor_slots(num_images: int) -> tuple[dict[str, Any], int]:
    """How many restoring actors the cluster has room and work for, and the CPU threads of each.

    The former as arguments of `Dataset.map_batches`.
    """
    resources = ray.cluster_resources()
    if gpus := int(resources.get("GPU", 0)):
        return {"compute": ActorPoolStrategy(size=min(gpus, num_images)), "num_gpus": 1}, 1
    # The actors read for themselves, and their input is in the object store already: nothing else needs a CPU. One is
    # what each asks for, since more might fit on no node; where there are fewer images than CPUs, it uses several.
    cpus = max(1, int(resources.get("CPU", 1)))
    actors = min(cpus, num_images)
    sizes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    threads = min(cpus // actors, min(filter(None, sizes), default=1))
    return {"compute": ActorPoolStrategy(size=actors), "num_cpus": 1}, threads
