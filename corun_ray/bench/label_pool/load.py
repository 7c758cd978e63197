"""Put load on a label pool: synthetic labels, and processes that use the pool as training workers do."""

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import cv2
import numpy as np
import ray
from ray.actor import ActorProxy
from ray.exceptions import RayTaskError

from corun_ray.bench.label_pool.figures import STEP_S, Reads, Tick, summarise_latency
from corun_ray.core.choices import Encoding
from corun_ray.core.training.labels import Label, Scores, decode, encode
from corun_ray.service.pool.client import PoolClient, PoolError
from corun_ray.service.pool.shard import PoolShard

T = TypeVar("T")

PROCESSES = 4
"""Processes that the workers of a simulated job share."""
CLIENTS = 2
"""The processes among them that offer and read at full speed."""
READ_AT_ONCE = 8
"""Labels in one read at full speed."""
OFFERS_AT_ONCE = 16
"""Most labels in one call and under way: the object store holds them twice until the pool has decided."""
TEACHER_S = 0.1
"""From a step's start until the step needs its labels; a read that is done by then costs the step nothing."""
OFFER_SHARE = 0.1
"""Share of a worker's steps that end with a better label."""
START_S = 0.5
"""Until all processes know the time of the first step."""

BASES = 8
"""Different pictures under the noise."""
PLANES = 4
"""Planes of a label: three of the scene, one of the transmission."""
COARSE_PX = 6
"""Side of the random grid that is enlarged to a smooth picture."""
NOISE_LEVELS = 3.0
"""Standard deviation of the noise, in levels of 255."""
MAX_NOISE_LEVELS = 40
BLOCK_PX = 32


class LabelMaker:
    """Makes labels that compress like photographs: one of a few smooth pictures, under noise of its own."""

    def __init__(self, side_px: int, encoding: Encoding) -> None:
        self._encoding = encoding
        rng = np.random.default_rng(0)

        # Smooth pictures, BASES 4 H W. They stay away from both ends of the range by the largest noise.
        lowest, highest = MAX_NOISE_LEVELS, 255 - MAX_NOISE_LEVELS
        coarse = rng.uniform(lowest, highest, (BASES * PLANES, COARSE_PX, COARSE_PX)).astype(np.float32)
        smooth = [cv2.resize(plane, (side_px, side_px), interpolation=cv2.INTER_LINEAR) for plane in coarse]
        self._bases = np.array(smooth, np.uint8).reshape(BASES, PLANES, side_px, side_px)

        # Noise for twice the size of a picture, so that every label can have a section of its own. The noise is
        # unsigned: adding it to a picture wraps round to the right value.
        noise = rng.normal(0, NOISE_LEVELS, 2 * self._bases[0].size)
        self._noise = noise.clip(-MAX_NOISE_LEVELS, MAX_NOISE_LEVELS).astype(np.int8).view(np.uint8)

    def make(self, number: int, step: int) -> Label:
        """Return the label of image `number`.

        The label of a later step supersedes this one.
        """
        # A section of the noise over one of the pictures.
        base = self._bases[number % BASES]
        rng = np.random.default_rng((number, step))
        offset = rng.integers(len(self._noise) - base.size)
        image = base + self._noise[offset : offset + base.size].reshape(base.shape)
        if self._encoding != "uint8":
            image = encode(decode(image), self._encoding)

        # Random scores of the blocks, and a global score that grows with the step.
        side = max(1, base.shape[-1] // BLOCK_PX)
        clarity, quality = rng.random((2, side, side), np.float32)
        score = 1 - 1 / (step + 2)
        return Label(name_key(number), Scores(score, score), step, image[:3], image[3:], clarity, quality)


def name_key(number: int) -> str:
    """Return the key of image `number`."""
    return f"{number:07d}.jpg"


class LoadMaker:
    """One process with one or more clients of the pool; becomes a Ray actor."""

    def __init__(self, side_px: int, encoding: Encoding) -> None:
        self._labels = LabelMaker(side_px, encoding)
        self._clients: list[PoolClient] = []

    @ray.method
    def join(self, shards: Sequence[ActorProxy[PoolShard]], generation: int, num_clients: int) -> None:
        """Use this pool from now on."""
        self._clients = [PoolClient(shards, generation) for _ in range(num_clients)]

    @ray.method
    def offer(self, numbers: Sequence[int], step: int) -> list[float]:
        """Offer the labels of `numbers`; return the seconds of single offers.

        The last of every `OFFERS_AT_ONCE` labels is offered alone and timed, the others together.
        """
        client = self._clients[0]
        times_s = []
        for first in range(0, len(numbers), OFFERS_AT_ONCE):
            # Most labels together: making them is not timed, and neither is this call.
            chunk = numbers[first : first + OFFERS_AT_ONCE]
            *together, alone = [self._labels.make(number, step) for number in chunk]
            client.offer(together)
            client.settle()

            # The last one alone, until it is decided.
            start_s = time.perf_counter()
            client.offer([alone])
            client.settle()
            times_s.append(time.perf_counter() - start_s)
        return times_s

    @ray.method
    def read(self, numbers: Sequence[int], at_once: int) -> list[float]:
        """Read labels; return the seconds of each read.

        A read asks for `at_once` of the `numbers`.

        Raises `PoolError` where a label is missing.
        """
        times_s = []
        for first in range(0, len(numbers), at_once):
            # Time the read alone.
            keys = [name_key(number) for number in numbers[first : first + at_once]]
            start_s = time.perf_counter()
            found = self._clients[0].prefetch(keys).result()
            times_s.append(time.perf_counter() - start_s)

            # A label that is missing would make the read look fast.
            missing = found.count(None)
            if missing:
                raise PoolError(f"label pool: {missing} of {len(keys)} labels could not be read")
        return times_s

    @ray.method
    def work(self, numbers: Sequence[int], first_step: int, steps: int, starts_s: Sequence[float]) -> list[Tick]:
        """Take `steps` steps with every client.

        Clients have threads of their own, and draw their labels from `numbers`.

        `starts_s` are the times of each client's first step, by `time.time`.
        """

        def take_steps(client: PoolClient, start_s: float) -> list[Tick]:
            ticks = []
            for step in range(steps):
                number = random.choice(numbers)
                ticks.append(self._take_step(client, number, first_step + step, start_s + step * STEP_S))
            return ticks

        # A thread for each client: steps mostly sleep.
        all_ticks: list[Tick] = []
        with ThreadPoolExecutor(max(1, len(self._clients))) as threads:
            for ticks in threads.map(take_steps, self._clients, starts_s):
                all_ticks += ticks
        return all_ticks

    def _take_step(self, client: PoolClient, number: int, step: int, due_s: float) -> Tick:
        """Take one step with sleep in place of networks."""
        # Wait for the step's time.
        time.sleep(max(0.0, due_s - time.time()))
        late_s = max(0.0, time.time() - due_s)
        start_s = time.perf_counter()
        timer = WallAndCpuTimer()

        # The read runs behind the teacher's forward pass.
        with timer:
            pending = client.prefetch([name_key(number)])
        time.sleep(max(0.0, start_s + TEACHER_S - time.perf_counter()))
        with timer:
            pending.result()

        # Making the label is not the pool's time.
        if random.random() < OFFER_SHARE:
            label = self._labels.make(number, step)
            with timer:
                client.offer([label])
        return Tick(timer.wall_s, timer.cpu_s, late_s)


class WallAndCpuTimer:
    """Sums up the time of `with` blocks, and the processor time of their thread."""

    def __init__(self) -> None:
        self.wall_s = 0.0
        self.cpu_s = 0.0

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()
        self._start_cpu_s = time.thread_time()

    def __exit__(self, *_: object) -> None:
        self.wall_s += time.perf_counter() - self._start_s
        self.cpu_s += time.thread_time() - self._start_cpu_s


class Crew:
    """The processes that put load on one pool."""

    def __init__(self, side_px: int, encoding: Encoding) -> None:
        actor = ray.remote(num_cpus=0)(LoadMaker)
        self._makers = [actor.remote(side_px, encoding) for _ in range(PROCESSES)]
        self._workers = 0

    def join(self, shards: Sequence[ActorProxy[PoolShard]], generation: int, workers: int = PROCESSES) -> None:
        """Use this pool from now on.

        `workers` clients are spread over the processes.
        """
        # Deal the workers out to the processes, one after the other.
        joins = []
        for i, maker in enumerate(self._makers):
            num_clients = len(range(workers)[i::PROCESSES])
            joins.append(maker.join.remote(shards, generation, num_clients))
        ray.get(joins)
        self._workers = workers

    def offer(self, numbers: Sequence[int], step: int) -> list[float]:
        """Offer the labels of `numbers` from `CLIENTS` processes.

        Returns the seconds of single offers.
        """
        return _gather([self._makers[i].offer.remote(numbers[i::CLIENTS], step) for i in range(CLIENTS)])

    def read(self, numbers: Sequence[int], at_once: int) -> list[float]:
        """Read the labels of `numbers` in one process; see `LoadMaker.read`."""
        return _gather([self._makers[0].read.remote(numbers, at_once)])

    def measure_reads(self, numbers: Sequence[int]) -> Reads:
        """Measure single reads and reads in batches.

        One process reads a third of the labels one by one. Then `CLIENTS` processes read the others in batches.

        Raises `PoolError` where a label is missing.
        """
        # Single reads in one process.
        third = len(numbers) // 3
        one_s = self.read(numbers[:third], 1)

        # Batches, at full speed.
        rest = numbers[third:]
        start_s = time.perf_counter()
        _gather([self._makers[i].read.remote(rest[i::CLIENTS], READ_AT_ONCE) for i in range(CLIENTS)])
        labels_per_s = len(rest) / (time.perf_counter() - start_s)
        return Reads(labels_per_s, summarise_latency(one_s))

    def work(self, numbers: Sequence[int], first_step: int, steps: int, is_lockstep: bool) -> list[Tick]:
        """Take steps with all workers.

        In lockstep all workers begin at once; otherwise their beginnings are evenly spread over a step.
        """
        # The time of each worker's first step.
        start_s = time.time() + START_S
        starts_s = []
        for rank in range(self._workers):
            delay_s = 0 if is_lockstep else STEP_S * rank / self._workers
            starts_s.append(start_s + delay_s)

        # Worker i of the job is a client of process i modulo the number of processes.
        refs = []
        for i, maker in enumerate(self._makers):
            refs.append(maker.work.remote(numbers, first_step, steps, starts_s[i::PROCESSES]))
        return _gather(refs)

    def end(self) -> None:
        """End the processes."""
        kill_actors(self._makers)


def kill_actors(actors: Sequence[ActorProxy[Any]]) -> None:
    """End the processes of actors at once."""
    for actor in actors:
        ray.kill(actor)  # type: ignore[arg-type]  # Ray types a handle as the handle or the class.


def _gather(refs: Sequence["ray.ObjectRef[list[T]]"]) -> list[T]:
    """Return the lists of several processes as one.

    Raises the error of a process.
    """
    try:
        lists = ray.get(list(refs))
    except RayTaskError as error:
        raise error.cause from None

    gathered: list[T] = []
    for items in lists:
        gathered += items
    return gathered
