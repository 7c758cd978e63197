"""Load for measuring the label pool: synthetic labels, and processes that use the pool as training workers do.

What can be seen of the machine while the label pool is measured: memory, processor time, files, versions."""

import os
import platform
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow
import ray
from pyarrow import fs
from ray.exceptions import RayTaskError

from corun_ray.bench.label_pool.figures import STEP_S, Reads, Tick, latency
from corun_ray.core.choices import Encoding
from corun_ray.core.training.labels import Label, Scores, decode, encode
from corun_ray.service.pool.client import PoolClient, PoolError
from corun_ray.service.storage import Location

PROCESSES = 4
"""That share the workers of a simulated job."""
CLIENTS = 2
"""Of these, the ones that offer and read as fast as they can."""
READ_AT_ONCE = 8
OFFERS_AT_ONCE = 16
"""Labels in a call, and under way at most: the object store must hold them twice until the pool has decided."""
TEACHER_S = 0.1
"""From a step's start until it asks for its labels; until then, reading them costs it nothing."""
OFFER_SHARE = 0.1
"""Steps of a worker that end with a better label."""
BASES = 8
NOISE_LEVELS = 3.0
BLOCK_PX = 32
START_S = 0.5
"""Until all processes have heard when the first step is."""


class LabelMaker:
    """Labels that compress like photographs: one of a few smooth pictures under noise of its own."""

    def __init__(self, side_px: int, encoding: Encoding) -> None:
        rng = np.random.default_rng(0)
        coarse = rng.uniform(40, 215, (BASES * 4, 6, 6)).astype(np.float32)
        smooth = [cv2.resize(plane, (side_px, side_px), interpolation=cv2.INTER_LINEAR) for plane in coarse]
        self._bases = np.array(smooth, np.uint8).reshape(BASES, 4, side_px, side_px)
        # Unsigned, so that adding it wraps round to the right value; the pictures keep off both ends.
        noise = rng.normal(0, NOISE_LEVELS, 2 * self._bases[0].size)
        self._noise = noise.clip(-40, 40).astype(np.int8).view(np.uint8)
        self._encoding = encoding

    def label(self, number: int, step: int) -> Label:
        """The label of image `number`; one of a later step supersedes it."""
        base = self._bases[number % BASES]
        rng = np.random.default_rng((number, step))
        offset = rng.integers(len(self._noise) - base.size)
        image = base + self._noise[offset : offset + base.size].reshape(base.shape)
        if self._encoding != "uint8":
            image = encode(decode(image), self._encoding)
        side = max(1, base.shape[-1] // BLOCK_PX)
        clarity, quality = rng.random((2, side, side), np.float32)
        score = 1 - 1 / (step + 2)
        return Label(key_of(number), Scores(score, score), step, image[:3], image[3:], clarity, quality)


def key_of(number: int) -> str:
    """The key of image `number`."""
    return f"{number:07d}.jpg"


class LoadMaker:
    """One process with one or more clients of the pool; to be made a Ray actor."""

    def __init__(self, side_px: int, encoding: Encoding) -> None:
        self._make = LabelMaker(side_px, encoding).label
        self._clients: list[PoolClient] = []

    def join(self, shards: Sequence[Any], generation: int, num_clients: int = 1) -> None:
        """Uses this pool from now on."""
        self._clients = [PoolClient(shards, generation) for _ in range(num_clients)]

    def offer(self, numbers: Sequence[int], step: int) -> list[float]:
        """Offers the labels of `numbers`, most of them together; returns how many seconds single ones took.

        Of `OFFERS_AT_ONCE` labels, the last goes alone.
        """
        client = self._clients[0]
        times_s = []
        for first in range(0, len(numbers), OFFERS_AT_ONCE):
            *unanswered, last = [self._make(number, step) for number in numbers[first : first + OFFERS_AT_ONCE]]
            client.offer(unanswered)
            client.settle()
            start_s = time.perf_counter()
            client.offer([last])
            client.settle()
            times_s.append(time.perf_counter() - start_s)
        return times_s

    def read(self, numbers: Sequence[int], at_once: int) -> list[float]:
        """Reads the labels of `numbers`; returns the seconds of each read of `at_once` labels.

        Raises `PoolError` where one is missing.
        """
        times_s = []
        for first in range(0, len(numbers), at_once):
            keys = [key_of(number) for number in numbers[first : first + at_once]]
            start_s = time.perf_counter()
            found = self._clients[0].prefetch(keys).result()
            times_s.append(time.perf_counter() - start_s)
            if missing := sum(label is None for label in found):
                raise PoolError(f"label pool: {missing} of {len(keys)} labels could not be read")
        return times_s

    def work(self, numbers: Sequence[int], first_step: int, steps: int, starts_s: Sequence[float]) -> list[Tick]:
        """Every client takes `steps` steps with labels of `numbers`, its first at its `starts_s` (of `time.time`)."""

        def steps_of(client: PoolClient, start_s: float) -> list[Tick]:
            return [
                self._step(client, random.choice(numbers), first_step + step, start_s + step * STEP_S)
                for step in range(steps)
            ]

        with ThreadPoolExecutor(max(1, len(self._clients))) as threads:
            return [tick for ticks in threads.map(steps_of, self._clients, starts_s) for tick in ticks]

    def _step(self, client: PoolClient, number: int, step: int, due_s: float) -> Tick:
        """One step as `core.steps` takes it, with sleep in place of the networks."""
        time.sleep(max(0.0, due_s - time.time()))
        late_s, start_s = max(0.0, time.time() - due_s), time.perf_counter()
        watch = WallAndCpuTimer()
        with watch:
            pending = client.prefetch([key_of(number)])
        time.sleep(max(0.0, start_s + TEACHER_S - time.perf_counter()))
        with watch:
            pending.result()
        if random.random() < OFFER_SHARE:
            label = self._make(number, step)
            with watch:
                client.offer([label])
        return Tick(watch.wall_s, watch.cpu_s, late_s)


class WallAndCpuTimer:
    """Sums up the time of `with` blocks, and how much of it their thread was at work."""

    wall_s = cpu_s = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter(), time.thread_time()

    def __exit__(self, *_: object) -> None:
        start_s, start_cpu_s = self._start
        self.wall_s += time.perf_counter() - start_s
        self.cpu_s += time.thread_time() - start_cpu_s


class Crew:
    """The processes that make load, all of them on the same pool."""

    def __init__(self, side_px: int, encoding: Encoding) -> None:
        actor: Any = ray.remote(num_cpus=0)(LoadMaker)
        self._makers = [actor.remote(side_px, encoding) for _ in range(PROCESSES)]

    def join(self, shards: Sequence[Any], generation: int, workers: int = PROCESSES) -> None:
        """Uses this pool from now on, as so many workers."""
        shares = [len(range(workers)[i::PROCESSES]) for i in range(PROCESSES)]
        ray.get([m.join.remote(shards, generation, share) for m, share in zip(self._makers, shares, strict=True)])
        self._workers = workers

    def offer(self, numbers: Sequence[int], step: int) -> list[float]:
        """`CLIENTS` processes share the offers; returns what `LoadMaker.offer` does."""
        return _joined([self._makers[i].offer.remote(numbers[i::CLIENTS], step) for i in range(CLIENTS)])

    def read(self, numbers: Sequence[int], at_once: int) -> list[float]:
        """See `LoadMaker.read`, by one process."""
        return _joined([self._makers[0].read.remote(numbers, at_once)])

    def reads(self, numbers: Sequence[int]) -> Reads:
        """The first third one by one, in one process; the others in batches, in `CLIENTS`. Raises `PoolError`."""
        third = len(numbers) // 3
        one_s, rest = self.read(numbers[:third], 1), numbers[third:]
        start_s = time.perf_counter()
        _joined([self._makers[i].read.remote(rest[i::CLIENTS], READ_AT_ONCE) for i in range(CLIENTS)])
        return Reads(len(rest) / (time.perf_counter() - start_s), latency(one_s))

    def work(self, numbers: Sequence[int], first_step: int, steps: int, is_lockstep: bool) -> list[Tick]:
        """The workers' steps: all begin at the same times, or each at its own, evenly spread over the step."""
        start_s = time.time() + START_S
        starts_s = [start_s + (0 if is_lockstep else STEP_S * rank / self._workers) for rank in range(self._workers)]
        return _joined(
            [m.work.remote(numbers, first_step, steps, starts_s[i::PROCESSES]) for i, m in enumerate(self._makers)]
        )

    def end(self) -> None:
        """Ends the processes."""
        for maker in self._makers:
            ray.kill(maker)


def _joined(refs: Sequence[ray.ObjectRef]) -> list[Any]:
    """What several processes return, one after the other; raises what they raise."""
    try:
        return [item for some in ray.get(list(refs)) for item in some]
    except RayTaskError as error:
        raise error.cause from None


REPORT_S = 1.0
"""After so long, Ray's word on its object store is up to date."""


def object_store_bytes() -> float:
    """What lies in the object stores of all nodes."""
    time.sleep(REPORT_S)
    return object_store_capacity_bytes() - ray.available_resources().get("object_store_memory", 0.0)


def object_store_capacity_bytes() -> float:
    """What Ray keeps in memory; beyond it, it writes to disk."""
    return ray.cluster_resources()["object_store_memory"]


def private_bytes(actors: Sequence[Any]) -> int:
    """Memory of the actors' processes, without what they share with others (the object store)."""
    return sum(ray.get([actor.__ray_call__.remote(_private_bytes) for actor in actors]))


def cpu_s(actors: Sequence[Any]) -> float:
    """Processor time that the actors' processes have used, of all their threads."""
    return sum(ray.get([actor.__ray_call__.remote(_cpu_s) for actor in actors]))


def sizes(place: Location) -> dict[str, int]:
    """Every file below by its path, in bytes; none where there is no such folder."""
    selector = fs.FileSelector(place.path, recursive=True, allow_not_found=True)
    return {info.path: info.size for info in place.filesystem.get_file_info(selector) if info.is_file}


def machine() -> dict[str, str | float]:
    """This machine, and what runs on it."""
    return {
        "cores": os.cpu_count() or 0,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "nodes": sum(node["Alive"] for node in ray.nodes()),
        "object_store_bytes": object_store_capacity_bytes(),
        "python": platform.python_version(),
        "ray": ray.__version__,
        "pyarrow": pyarrow.__version__,
    }


def _private_bytes(_: Any) -> int:
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _cpu_s(_: Any) -> float:
    return time.process_time()
