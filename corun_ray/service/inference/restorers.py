"""Networks that restore images in Ray Data: each actor loads its networks once."""

from collections.abc import Mapping

import ray
import torch
from torch import Tensor

from corun_ray.core.inference.memory import MIB, fit_in_memory
from corun_ray.core.inference.restore import restore
from corun_ray.core.inference.self_ensemble import restore_by_self_ensemble
from corun_ray.core.networks.corun import Restoration
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

    def restore(self, name: str, hazy: Tensor, self_ensemble: bool = False) -> Restoration:
        """Restore an image 1 3 H W by a network of this actor.

        The network works within the memory limit. With `self_ensemble`, the result is the mean over eight views.
        Raises `ValueError` for small images, and `TooLarge`.
        """

        def restore_view(view: Tensor) -> Restoration:
            """Restore the image as it is, or one of its turned views."""
            return restore(fit_in_memory(self.networks[name], view, self.memory_mib), view)

        if self_ensemble:
            return restore_by_self_ensemble(restore_view, hazy)
        return restore_view(hazy)
