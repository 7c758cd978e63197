"""Networks that restore images in Ray Data: one actor a slot, its networks loaded once."""

from typing import Any

import ray
import torch
from ray.data import ActorPoolStrategy

from corun_ray.core.corun import CORUN


def share_network(network: CORUN) -> Any:
    """A reference to the network in the object store, for `Restorers` on any node."""
    return ray.put((network.stages, network.width, network.state_dict()))


class Restorers:
    """The networks of an actor, by name."""

    def __init__(self, shared: dict[str, Any]) -> None:
        """`shared` maps names to what `share_network` returned."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        self.networks = {name: self._load(*ray.get(ref)) for name, ref in shared.items()}

    def _load(self, stages: int, width: int, params: dict[str, torch.Tensor]) -> CORUN:
        network = CORUN(stages, width)
        network.load_state_dict(params)
        return network.to(self.device).eval()


def actor_slots() -> dict[str, Any]:
    """How many restoring actors the cluster has room for, as arguments of `Dataset.map_batches`."""
    resources = ray.cluster_resources()
    if gpus := int(resources.get("GPU", 0)):
        return {"compute": ActorPoolStrategy(size=gpus), "num_gpus": 1}
    # One CPU stays free for reading.
    return {"compute": ActorPoolStrategy(size=max(1, int(resources.get("CPU", 2)) - 1)), "num_cpus": 1}
