"""Networks that restore images in Ray Data: one actor a slot, its networks loaded once."""

from collections.abc import Iterator
from typing import Any

import ray
import torch
from ray.data import ActorPoolStrategy, Dataset
from ray.exceptions import RayTaskError

from corun_ray.service.follower import root_cause
from corun_ray.service.models import Model
from corun_ray.service.storage import StorageError


class Restorers:
    """The networks of an actor, by name."""

    def __init__(self, shared: dict[str, Any]) -> None:
        """`shared` maps names to references of `Model`s in the object store."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        models: dict[str, Model] = {name: ray.get(ref) for name, ref in shared.items()}
        self.networks = {name: model.build().to(self.device).eval() for name, model in models.items()}


def rows_of(outcomes: Dataset) -> Iterator[dict[str, Any]]:
    """The rows that actors return; raises a `StorageError` of theirs, of which Ray keeps only the text."""
    try:
        yield from outcomes.iter_rows()
    except RayTaskError as error:
        kind, _, reason = root_cause(str(error)).partition(": ")
        if kind.endswith(StorageError.__name__):
            raise StorageError(reason) from None
        raise


def actor_slots() -> dict[str, Any]:
    """How many restoring actors the cluster has room for, as arguments of `Dataset.map_batches`."""
    resources = ray.cluster_resources()
    if gpus := int(resources.get("GPU", 0)):
        return {"compute": ActorPoolStrategy(size=gpus), "num_gpus": 1}
    # One CPU stays free for reading.
    return {"compute": ActorPoolStrategy(size=max(1, int(resources.get("CPU", 2)) - 1)), "num_cpus": 1}
