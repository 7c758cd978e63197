"""A replica of the served model: it decodes, restores in batches and encodes.

The work runs in threads, so that the replica's event loop always answers.
"""

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import torch
from ray import serve

from corun_ray.core.data.images import BadImage
from corun_ray.core.inference.memory import compute_batch_size, fit_in_memory
from corun_ray.core.inference.restore import restore, to_image, to_tensor
from corun_ray.core.networks.finite import NotFinite
from corun_ray.service.inference.photos import Pixels, read_photo, write_photo
from corun_ray.service.inference.restorers import RestorerActor
from corun_ray.service.models.sources import Model
from corun_ray.service.serve.messages import DehazedImage, ReplicaHealth
from corun_ray.service.serve.uploads import Refusal

log = logging.getLogger(__name__)

Size = TypeVar("Size", bound=Hashable)
Outcome = DehazedImage | Refusal
Restored = tuple[Pixels, int, float]
"""Pixels, the number of images restored together, and the seconds that their batch took."""


@dataclass(frozen=True)
class ReplicaOptions:
    """The resources and the batching of a replica."""

    threads: int
    """CPU threads of the network, and files that are decoded or encoded at a time."""
    memory_mib: int | None
    """Memory for a batch at work; None: the default of the device."""
    gpu_share: float
    """GPUs of the replica; 0.5 is half of one."""
    max_batch: int
    batch_wait_s: float
    """Time that an image waits for others of its batch."""


class Replica(RestorerActor):
    """Restores uploaded images. An image that cannot be restored is answered with a `Refusal`, not an exception."""

    def __init__(self, models: Mapping[str, "ray.ObjectRef[Model]"], options: ReplicaOptions) -> None:
        super().__init__(models, options.threads, options.memory_mib)

        # Replicas that share a GPU share its memory.
        if options.memory_mib is None and self.device.type == "cuda":
            self.memory_mib = int(self.memory_mib * min(1.0, options.gpu_share))

        # One thread runs the network, others decode and encode: the event loop stays free for health checks.
        set_threads = functools.partial(torch.set_num_threads, options.threads)
        self._network_thread = ThreadPoolExecutor(1, "network", set_threads)
        self._file_threads = ThreadPoolExecutor(max(1, options.threads), "files")

        # Decoded images are large: only this batch and the next may wait for the network.
        self._decoded_slots = asyncio.Semaphore(2 * options.max_batch)

        self.max_batch = options.max_batch
        batched: Any = self._restore
        batched.set_max_batch_size(options.max_batch)
        batched.set_batch_wait_timeout_s(options.batch_wait_s)

    async def report_health(self) -> ReplicaHealth:
        """Answer that this replica has its model."""
        return ReplicaHealth(self.device.type)

    async def dehaze(self, data: bytes, suffix: str) -> Outcome:
        """Restore a file that `check_image` accepts.

        Returns the restored file in the format of `suffix`.
        """
        loop = asyncio.get_running_loop()
        async with self._decoded_slots:
            # Decode: only decoding shows some kinds of damage.
            try:
                photo = await loop.run_in_executor(self._file_threads, read_photo, data)
            except BadImage as error:
                return Refusal(400, f"damaged or not supported: {error}")

            # Restore, in a batch with the images of other requests.
            restored = await self._restore(photo.pixels)
            if isinstance(restored, Refusal):
                return restored

            # Encode with the metadata of the upload.
            pixels, batch, seconds = restored
            encode = functools.partial(write_photo, photo.with_pixels(pixels), suffix)
            file = await loop.run_in_executor(self._file_threads, encode)

        height_px, width_px = pixels.shape[:2]
        return DehazedImage(file, width_px * height_px, batch, seconds)

    @serve.batch
    async def _restore(self, images: list[Pixels]) -> list[Restored | Refusal]:
        """Restore a batch of images.

        Ray Serve gathers the batch: a caller passes one image and gets one outcome.
        """
        return await asyncio.get_running_loop().run_in_executor(self._network_thread, self._restore_all, images)

    def _restore_all(self, images: list[Pixels]) -> list[Restored | Refusal]:
        """Restore images of any sizes, in order."""
        sizes = [image.shape[:2] for image in images]

        # Images of one size go through the network together.
        outcomes: dict[int, Restored | Refusal] = {}
        for positions in group_by_size(sizes, self._choose_group_size):
            group = [images[position] for position in positions]
            for position, outcome in zip(positions, self._restore_group(group), strict=True):
                outcomes[position] = outcome

        return [outcomes[position] for position in range(len(images))]

    def _choose_group_size(self, size: tuple[int, ...]) -> int:
        """Return how many images of a size fit together.

        `size` is height and width.
        """
        fitting = compute_batch_size(self.networks["model"], size[0], size[1], self.memory_mib)
        return self.max_batch if fitting is None else fitting

    def _restore_group(self, images: list[Pixels]) -> Sequence[Restored | Refusal]:
        """Restore images of one size together.

        An error refuses the whole group, but no other group of the batch. A restoration that is not finite refuses
        its image alone.
        """
        started = time.monotonic()
        try:
            hazy = torch.cat([to_tensor(image) for image in images]).to(self.device)
            network = fit_in_memory(self.networks["model"], hazy, self.memory_mib)
            scene = restore(network, hazy).scene
            self._tell_tiles(network)

            # Every image keeps its own number of bits.
            pixels = [to_image(scene[n : n + 1], image.dtype.type) for n, image in enumerate(images)]
        except NotFinite as error:
            if len(images) > 1:
                return [self._restore_group([image])[0] for image in images]
            return [Refusal(500, f"the model failed on this image: {error}")]
        except ValueError as error:
            # The images are too small, or too large even in tiles.
            return [Refusal(422, str(error)) for _ in images]
        except Exception:
            log.exception("restoring %d images of %s failed", len(images), images[0].shape)
            reason = "the model failed on this image; the log of the server says more"
            return [Refusal(500, reason) for _ in images]

        took_s = time.monotonic() - started
        return [(restored, len(images), took_s) for restored in pixels]

    def _tell_tiles(self, network: torch.nn.Module) -> None:
        """Log that images depend on their tiles; the first time alone."""
        was_told = "model" in self.tilings
        self.note_tiles("model", network)
        if not was_told and "model" in self.tilings:
            log.warning("large images in %s", self.tilings["model"].describe("the network"))


def group_by_size(sizes: Sequence[Size], choose_group_size: Callable[[Size], int]) -> list[list[int]]:
    """Group the positions of images of equal size.

    Positions stay in order. A group has at most `choose_group_size(size)` images. The group of the first image is
    first.
    """
    positions_of: dict[Size, list[int]] = {}
    for position, size in enumerate(sizes):
        positions_of.setdefault(size, []).append(position)

    # Cut the images of each size into groups that fit.
    groups = []
    for size, positions in positions_of.items():
        length = choose_group_size(size)
        for start in range(0, len(positions), length):
            groups.append(positions[start : start + length])
    return sorted(groups)
