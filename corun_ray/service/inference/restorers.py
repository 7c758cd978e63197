"""Networks that restore images in Ray Data: each actor loads its networks once."""

import json
from collections.abc import Mapping
from dataclasses import asdict

import ray
import torch
from torch import Tensor

from corun_ray.core.inference.memory import MIB, fit_in_memory
from corun_ray.core.inference.overlapping import OverlappingTiles, Tiling, find_worse
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

        self.tilings: dict[str, Tiling] = {}
        """Tiles by network, where they do not give what the whole image would."""

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
            network = fit_in_memory(self.networks[name], view, self.memory_mib)
            restoration = restore(network, view)
            self.note_tiles(name, network)
            return restoration

        if self_ensemble:
            return restore_by_self_ensemble(restore_view, hazy)
        return restore_view(hazy)

    def note_tiles(self, name: str, network: torch.nn.Module) -> None:
        """Keep how the tiles of a network disagreed on its last image, if this is the worst so far."""
        tiling = network.tiling if isinstance(network, OverlappingTiles) else None
        worse = find_worse(self.tilings.get(name), tiling)
        if worse is not None:
            self.tilings[name] = worse

    def take_tilings(self) -> str:
        """Return what `note_tiles` has kept, as JSON for `read_tilings`, and forget it."""
        tilings = {name: asdict(tiling) for name, tiling in self.tilings.items()}
        self.tilings.clear()
        return json.dumps(tilings)


def read_tilings(text: str) -> dict[str, Tiling]:
    """Read tiles by network from JSON."""
    return {name: Tiling(**values) for name, values in json.loads(text).items()}
