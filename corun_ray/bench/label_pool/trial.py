"""Measures the label pool on this machine: how fast it takes and gives labels, what they weigh, saving, restoring.

One pool after another, each with its number of shards, is filled with synthetic labels in rounds. Every round ends
with an incremental snapshot, after which what was saved may leave memory: so a pool far larger than memory fits.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import ray

from corun_ray.bench.label_pool import load as bench_probe
from corun_ray.bench.label_pool.figures import (
    STEP_S,
    Level,
    Memory,
    PoolReport,
    PoolSettings,
    Reads,
    Restore,
    Save,
    Series,
    WorkerWaits,
    job_of,
    latency,
    levels_to,
)
from corun_ray.bench.label_pool.load import Crew, LabelMaker
from corun_ray.service.pool import snapshots
from corun_ray.service.pool.keeper import MIB, PoolKeeper, collect_counters, start_pool
from corun_ray.service.storage import Location

ROUND_LABELS = 5000
CHUNK_LABELS = 256
"""Between two lines of progress."""
READS = 600
"""Labels of one measurement of reading, at most."""
FIRST_READ = 100
REPLACED_SHARE = 0.01
WARM_UP_LABELS = 128
Tell = Callable[[int, str], None]
"""Takes how many labels have been filled in, of all pools, and what is being done."""


def bench_pool(settings: PoolSettings, folder: Location, tell: Tell) -> Iterator[PoolReport]:
    """Measures below `folder`; gives what is known after each pool. Needs a running Ray.

    Raises `PoolError` where labels are missing or a shard does not come back, and `StorageError`.
    """
    start_s = time.monotonic()
    crew = Crew(settings.side_px, settings.encoding)
    series: list[Series] = []
    try:
        for shards in settings.shards:
            trial = PoolTrial(
                settings, shards, folder.child(f"pool_{shards}"), crew, tell, len(series) * settings.labels
            )
            try:
                series.append(trial.run())
            finally:
                trial.end()
            yield PoolReport(settings, bench_probe.machine(), time.monotonic() - start_s, tuple(series))
    finally:
        crew.end()


class PoolTrial:
    """One pool with its number of shards, filled and measured level by level."""

    def __init__(self, settings: PoolSettings, shards: int, place: Location, crew: Crew, tell: Tell, done: int) -> None:
        """`done`: labels of the pools before."""
        self._settings, self._place, self._crew, self._tell, self._done = settings, place, crew, tell, done
        self._label_bytes = LabelMaker(settings.side_px, settings.encoding).label(0, 0).size_bytes
        self._rng = np.random.default_rng(shards)
        self._labels = self._step = 0
        self._full_save = Save()
        self._files: dict[str, int] = {}
        self._num_shards = shards
        self._shards = self._start()
        self._keeper = PoolKeeper(self._shards, place)

    def run(self) -> Series:
        """Measures everything."""
        self._say("warming up")
        self._empty()
        self._crew.offer(range(WARM_UP_LABELS), self._step)
        self._save()
        self._generation = self._empty()
        self._store_bytes, self._index_bytes = self._look()
        levels = tuple(self._level(labels) for labels in levels_to(self._settings.labels))
        in_memory, everything = self._numbers_in_memory(), range(self._labels)
        return Series(
            shards=self._num_shards,
            levels=levels,
            job=self._job(in_memory),
            job_in_lockstep=self._job(in_memory, is_lockstep=True),
            job_beyond_memory=self._job(everything) if len(in_memory) < len(everything) else None,
        )

    def end(self) -> None:
        """Frees what the pool takes in memory and in storage."""
        _kill(self._shards)
        self._place.delete()

    def _start(self) -> list[Any]:
        return start_pool(self._num_shards, self._place, self._settings.memory_mib)

    def _say(self, what: str) -> None:
        shards = f"{self._num_shards} shard{'s' * (self._num_shards > 1)}"
        self._tell(self._done + self._labels, f"{shards}: {what}")

    def _empty(self) -> int:
        """Makes the pool empty; returns its generation."""
        generation = self._keeper.restore(None)
        self._crew.join(self._shards, generation)
        return generation

    def _level(self, labels: int) -> Level:
        offers_per_s, offers_s = self._fill(labels)
        memory = self._memory()
        self._say("reading from memory")
        from_memory = self._crew.reads(self._some(self._numbers_in_memory(), READS))
        self._say("an incremental snapshot")
        self._crew.offer(self._some(range(labels), round(labels * REPLACED_SHARE)), self._step)
        small_save = self._save()
        self._say("restoring, reading from storage")
        restore, from_storage = self._restore()
        return Level(
            labels=labels,
            offers_per_s=offers_per_s,
            offer=latency(offers_s),
            memory=memory,
            from_memory=from_memory,
            from_storage=from_storage,
            full_save=self._full_save,
            small_save=small_save,
            restore=restore,
        )

    def _fill(self, labels: int) -> tuple[float, list[float]]:
        """Fills the pool up to so many labels, in rounds; returns offers per second, and latencies in seconds."""
        start = self._labels
        wall_s, times_s = 0.0, []
        while self._labels < labels:
            until = min(labels, (self._labels // ROUND_LABELS + 1) * ROUND_LABELS)
            while self._labels < until:
                self._say("offering")
                chunk = range(self._labels, min(until, self._labels + CHUNK_LABELS))
                start_s = time.perf_counter()
                times_s += self._crew.offer(chunk, self._step)
                wall_s += time.perf_counter() - start_s
                self._labels = chunk.stop
            self._say("saving")
            self._full_save += self._save()
        return (labels - start) / wall_s, times_s

    def _save(self) -> Save:
        """Ends the step with a snapshot, the only one to be kept."""
        self._step += 1
        start_s = time.perf_counter()
        parts = self._keeper.freeze()
        frozen_s = time.perf_counter()
        self._keeper.finish(self._step, parts)
        finished_s = time.perf_counter()
        before, self._files = self._files, bench_probe.sizes(self._place)
        written_bytes = sum(size for path, size in self._files.items() if path not in before)
        self._keeper.sweep([self._step])
        return Save(frozen_s - start_s, finished_s - frozen_s, written_bytes)

    def _restore(self) -> tuple[Restore, Reads]:
        """A second set of shards takes over the last snapshot: whatever it is asked for first comes from storage."""
        numbers = self._some(range(self._labels), FIRST_READ + READS)
        num_first = min(FIRST_READ, len(numbers) // 3)
        current = snapshots.read_current(self._place)
        start_s = time.perf_counter()
        shards = self._start()
        try:
            ray.get([shard.ping.remote() for shard in shards])
            started_s = time.perf_counter()
            generation = PoolKeeper(shards, self._place).restore(snapshots.format_name(self._step))
            restored_s = time.perf_counter()
            self._crew.join(shards, generation)
            (first_read_s,) = self._crew.read(numbers[:num_first], num_first)
            reads = self._crew.reads(numbers[num_first:])
        finally:
            _kill(shards)
        # The folder is the first set's again.
        snapshots.write_current(self._place, current)
        self._crew.join(self._shards, self._generation)
        return Restore(started_s - start_s, restored_s - started_s, num_first, first_read_s), reads

    def _job(self, numbers: Sequence[int], is_lockstep: bool = False) -> WorkerWaits:
        self._say(f"{self._settings.workers} workers with {len(numbers)} labels")
        self._crew.join(self._shards, self._generation, self._settings.workers)
        steps = max(1, round(self._settings.job_s / STEP_S))
        before_s = bench_probe.cpu_s(self._shards)
        ticks = self._crew.work(numbers, self._step, steps, is_lockstep)
        self._step += steps
        return job_of(ticks, steps, bench_probe.cpu_s(self._shards) - before_s)

    def _memory(self) -> Memory:
        store_bytes, index_bytes = self._look()
        return Memory(
            counted_bytes_per_label=self._resident_bytes() / self._labels,
            object_store_bytes_per_label=(store_bytes - self._store_bytes) / self._labels,
            index_bytes_per_label=(index_bytes - self._index_bytes) / self._labels,
        )

    def _look(self) -> tuple[float, float]:
        """Bytes in the object store, and of the shards' own memory."""
        return bench_probe.object_store_bytes(), bench_probe.private_bytes(self._shards)

    def _resident_bytes(self) -> float:
        return collect_counters(self._shards)["memory_mib"] * MIB

    def _numbers_in_memory(self) -> range:
        """Images whose labels are in memory: all, or, of those that are, the newer half."""
        in_memory = round(self._resident_bytes() / self._label_bytes)
        return range(0 if in_memory >= self._labels else self._labels - in_memory // 2, self._labels)

    def _some(self, numbers: Sequence[int], most: int) -> list[int]:
        """So many of the numbers in random order; at least one, at most all."""
        return self._rng.permutation(numbers)[: max(1, most)].tolist()


def _kill(shards: Sequence[Any]) -> None:
    for shard in shards:
        ray.kill(shard)
