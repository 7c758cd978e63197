"""Networks that restore images in Ray Data: one actor a slot, its networks loaded once."""

from typing import Any

import ray
import torch
from ray.data import ActorPoolStrategy

from corun_ray.service.models import Model


class Restorers:
    """The networks of an actor, by name."""

    def __init__(self, shared: dict[str, Any]) -> None:
        """`shared` maps names to references of `Model`s in the object store."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        models: dict[str, Model] = {name: ray.get(ref) for name, ref in shared.items()}
        self.networks = {name: model.build().to(self.device).eval() for name, model in models.items()}


def actor_slots() -> dict[str, Any]:
    """How many restoring actors the cluster has room for, as arguments of `Dataset.map_batches`."""
    resources = ray.cluster_resources()
    if gpus := int(resources.get("GPU", 0)):
        return {"compute": ActorPoolStrategy(size=gpus), "num_gpus": 1}
    # One CPU stays free for reading.
    return {"compute": ActorPoolStrategy(size=max(1, int(resources.get("CPU", 2)) - 1)), "num_cpus": 1}
