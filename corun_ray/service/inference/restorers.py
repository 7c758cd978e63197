"""Networks that restore images in Ray Data: one actor a slot, its networks loaded once."""

from typing import Any

import ray
import torch

from corun_ray.core.inference.memory import MIB
from corun_ray.service.models.sources import Model

CPU_MEMORY_MIB = 2816
GPU_SHARE = 0.75


class RestorerActor:
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
