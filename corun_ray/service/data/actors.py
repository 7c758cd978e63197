"""Actors of Ray Data: how many of them to start, reading what they return, and those that it leaves behind."""

import traceback
from collections.abc import Iterator
from typing import Any

import ray
from ray.data import ActorPoolStrategy, Dataset
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.data._internal.stats import get_or_create_stats_actor
from ray.exceptions import RayTaskError

from corun_ray.service.errors import find_root_cause
from corun_ray.service.storage import StorageError


def iterate_rows(outcomes: Dataset) -> Iterator[dict[str, Any]]:
    """Yield the rows that actors return.

    The caller must keep no reference to `outcomes`: after an error, its actors end with the last one.

    Raises `StorageError` where an actor raised one; Ray keeps only its text.
    """
    try:
        yield from outcomes.iter_rows()
    except RayTaskError as error:
        # Ray Data ends its actors when nothing refers to the iteration any more; the error's frames would still do so.
        traceback.clear_frames(error.__traceback__)
        del outcomes

        # Rebuild the storage error from its last line, `package.StorageError: reason`.
        kind, _, reason = find_root_cause(str(error)).partition(": ")
        if kind.endswith(StorageError.__name__):
            raise StorageError(reason) from None

        raise


def plan_actor_pool(num_images: int) -> tuple[dict[str, Any], int]:
    """Plan the actors that restore images.

    Returns their arguments of `Dataset.map_batches`, and the CPU threads of each.

    There are as many actors as the cluster has room for, and at most one for each image.
    """
    # With GPUs: one actor on each.
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    if gpus:
        return {"compute": ActorPoolStrategy(size=min(gpus, num_images)), "num_gpus": 1}, 1

    # Without: one actor on each CPU. Nothing else needs a CPU, since the actors read images themselves and their
    # input is in the object store already.
    cpus = max(1, int(resources.get("CPU", 1)))
    actors = min(cpus, num_images)

    # Each actor asks Ray for one CPU, since no node might have room for an actor that asks for more. Where there are
    # fewer images than CPUs, it uses several threads, at most as many as the smallest node has CPUs.
    node_cpus = []
    for node in ray.nodes():
        count = int(node["Resources"].get("CPU", 0))
        if node["Alive"] and count:
            node_cpus.append(count)

    threads = min(cpus // actors, min(node_cpus, default=1))
    return {"compute": ActorPoolStrategy(size=actors), "num_cpus": 1}, threads


def start_lasting_actors() -> None:
    """Start the two actors of Ray Data that outlive every job, on this node.

    Ray Data (2.60) starts each on the node that first needs it, for all jobs of the cluster. On a node that an
    autoscaler has added for a training they would keep that node for good.
    """
    get_or_create_stats_actor()
    get_or_create_autoscaling_coordinator()
