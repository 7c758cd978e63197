"""A replica of the served model: decodes, restores in batches, encodes; its event loop is never kept busy.

Which images of a batch are restored together."""

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from ray import serve

from corun_ray.core.data.images import BadImage
from corun_ray.core.inference.memory import compute_batch_size, fit_in_memory
from corun_ray.core.inference.restore import restore, to_image, to_tensor
from corun_ray.service.inference.photos import Pixels, read_photo, write_photo
from corun_ray.service.inference.restorers import RestorerActor
from corun_ray.service.serve.messages import DehazedImage, ReplicaHealth
from corun_ray.service.serve.uploads import Refusal

Size = TypeVar("Size", bound=Hashable)


def group_by_size(sizes: Sequence[Size], at_once: Callable[[Size], int]) -> list[list[int]]:
    """Positions of images of one size, in order, at most `at_once` of them in a group; the first come first."""
    by_size: dict[Size, list[int]] = {}
    for position, size in enumerate(sizes):
        by_size.setdefault(size, []).append(position)
    found = []
    for size, positions in by_size.items():
        most = at_once(size)
        found += [positions[start : start + most] for start in range(0, len(positions), most)]
    return sorted(found)


log = logging.getLogger(__name__)
Outcome = DehazedImage | Refusal
Restored = tuple[Pixels, int, float]
"""Pixels, the number of images restored together, and the seconds that it took."""


class Replica(RestorerActor):
    """Answers with what became of an image; what the image is to blame for is an answer too, never an exception."""

    def __init__(
        self,
        shared: dict[str, Any],
        threads: int,
        memory_mib: int | None,
        gpu_share: float,
        max_batch: int,
        batch_wait_s: float,
    ) -> None:
        """`shared` as for `RestorerActor`; `gpu_share` is this replica's part of its GPU."""
        super().__init__(shared, threads, memory_mib)
        if memory_mib is None and self.device.type == "cuda":
            self.memory_mib = int(self.memory_mib * min(1.0, gpu_share))
        self.max_batch = max_batch
        self._network = ThreadPoolExecutor(1, "network", functools.partial(torch.set_num_threads, threads))
        self._files = ThreadPoolExecutor(max(1, threads), "files")
        # Decoded images are large: no more of them than this batch and the next wait for the network.
        self._decoded = asyncio.Semaphore(2 * max_batch)
        batching: Any = self._restore
        batching.set_max_batch_size(max_batch)
        batching.set_batch_wait_timeout_s(batch_wait_s)

    async def alive(self) -> ReplicaHealth:
        """That this replica has its model and answers."""
        return ReplicaHealth(self.device.type)

    async def dehaze(self, data: bytes, suffix: str) -> Outcome:
        """A file that `check_image` lets through → the restored one, in the format of `suffix`."""
        loop = asyncio.get_running_loop()
        async with self._decoded:
            try:
                photo = await loop.run_in_executor(self._files, read_photo, data)
            except BadImage as error:
                return Refusal(400, f"damaged or not supported: {error}")
            restored = await self._restore(photo.pixels)
            if isinstance(restored, Refusal):
                return restored
            pixels, batch, seconds = restored
            file = await loop.run_in_executor(self._files, write_photo, photo.with_pixels(pixels), suffix)
        height_px, width_px = pixels.shape[:2]
        return DehazedImage(file, width_px * height_px, batch, seconds)

    @serve.batch
    async def _restore(self, images: list[Pixels]) -> list[Restored | Refusal]:
        return await asyncio.get_running_loop().run_in_executor(self._network, self._restore_all, images)

    def _restore_all(self, images: list[Pixels]) -> list[Restored | Refusal]:
        found: dict[int, Restored | Refusal] = {}
        for group in group_by_size([image.shape[:2] for image in images], self._at_once):
            for position, outcome in zip(group, self._restore_group([images[n] for n in group]), strict=True):
                found[position] = outcome
        return [found[position] for position in range(len(images))]

    def _at_once(self, size: tuple[int, ...]) -> int:
        fitting = compute_batch_size(self.networks["model"], size[0], size[1], self.memory_mib)
        return self.max_batch if fitting is None else fitting

    def _restore_group(self, images: list[Pixels]) -> Sequence[Restored | Refusal]:
        """Images of one size; what goes wrong with them leaves the others of the batch alone."""
        started = time.monotonic()
        try:
            hazy = torch.cat([to_tensor(image) for image in images]).to(self.device)
            scene = restore(fit_in_memory(self.networks["model"], hazy, self.memory_mib), hazy).scene
            levels = [to_image(scene[n : n + 1], image.dtype.type) for n, image in enumerate(images)]
        except ValueError as error:  # too small, or too large even in tiles
            return [Refusal(422, str(error))] * len(images)
        except Exception:
            log.exception("restoring %d images of %s failed", len(images), images[0].shape)
            return [Refusal(500, "the model failed on this image; the log of the server says more")] * len(images)
        took_s = time.monotonic() - started
        return [(pixels, len(images), took_s) for pixels in levels]
