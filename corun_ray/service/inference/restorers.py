"""Networks that restore images in Ray Data: one actor a slot, its networks loaded once."""

import traceback
from collections.abc import Iterator
from typing import Any

import ray
import torch
from ray.data import ActorPoolStrategy, Dataset
from ray.exceptions import RayTaskError

from corun_ray.core.inference.memory import MIB
from corun_ray.service.errors import root_cause
from corun_ray.service.models.sources import Model
from corun_ray.service.storage import StorageError

CPU_MEMORY_MIB = 2816
GPU_SHARE = 0.75


class Restorers:
    """The networks of an actor, by name."""

    def __init__(self, shared: dict[str, Any], threads: int, memory_mib: int | None = None) -> None:
        """`shared` maps names to references of `Model`s in the object store.

        `threads` are for work on the CPU, `memory_mib` for an image at work.
        """
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(threads)
        self.memory_mib = memory_mib or CPU_MEMORY_MIB
        if memory_mib is None and self.device.type == "cuda":
            self.memory_mib = int(torch.cuda.get_device_properties(self.device).total_memory * GPU_SHARE / MIB)
        models: dict[str, Model] = {name: ray.get(ref) for name, ref in shared.items()}
        self.networks = {name: model.build().to(self.device).eval() for name, model in models.items()}


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
        kind, _, reason = root_cause(str(error)).partition(": ")
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
