"""Networks that restore images in Ray Data: each actor loads its networks once."""

from collections.abc import Mapping

import ray
import torch

from corun_ray.core.inference.memory import MIB
from corun_ray.service.models.sources import Model

CPU_MEMORY_MIB = 2816
"""Default memory for one image at work on the CPU."""
GPU_MEMORY_SHARE = 0.75
"""Default share of a GPU's memory for one image at work."""


class RestorerActor:
    """The base of actors that restore images: a device, its memory limit, and networks by name."""

    def __init__(
        self, models: Mapping[str, "ray.ObjectRef[Model]"], threads: int, memory_mib: int | None = None
    ) -> None:
        """Build the networks of `models` on this actor's device.

        `models` are in the object store. `threads` are for work on the CPU. `memory_mib` limits the memory for one
        image at work; None takes the default of the device.
        """
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(threads)

        # Choose the memory limit: of a GPU, a share of all its memory.
        self.memory_mib = memory_mib or CPU_MEMORY_MIB
        if memory_mib is None and self.device.type == "cuda":
            total_bytes = torch.cuda.get_device_properties(self.device).total_memory
            self.memory_mib = int(total_bytes * GPU_MEMORY_SHARE / MIB)

        self.networks: dict[str, torch.nn.Module] = {}
        for name, reference in models.items():
            model = ray.get(reference)
            self.networks[name] = model.build().to(self.device).eval()
