"""Measure the label pool on this machine: offers, reads, memory, snapshots and restoration.

One pool after another, each with its number of shards, is filled with synthetic labels in rounds. Every round ends
with an incremental snapshot, after which saved labels may leave memory. So a pool can be far larger than memory.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import ray
from ray.actor import ActorProxy

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
    list_levels,
    summarise_job,
    summarise_latency,
)
from corun_ray.bench.label_pool.load import Crew, LabelMaker, kill_actors
from corun_ray.bench.label_pool.probe import (
    describe_machine,
    list_file_sizes,
    measure_cpu_s,
    measure_object_store_bytes,
    measure_private_bytes,
)
from corun_ray.service.pool import snapshots
from corun_ray.service.pool.keeper import MIB, PoolKeeper, collect_counters, start_pool
from corun_ray.service.pool.shard import PoolShard
from corun_ray.service.storage import Location

ROUND_LABELS = 5000
"""Labels between two snapshots."""
CHUNK_LABELS = 256
"""Labels between two lines of progress."""
WARM_UP_LABELS = 128
MAX_READ_LABELS = 600
"""Most labels of one measurement of reading."""
FIRST_READ_LABELS = 100
"""Most labels of the first read after a restoration."""
REPLACED_SHARE = 0.01
"""Share of the labels that are replaced before the small snapshot."""

ReportProgress = Callable[[int, str], None]
"""Takes the number of labels filled in so far, of all pools, and the current activity."""


def bench_pool(settings: PoolSettings, folder: Location, report_progress: ReportProgress) -> Iterator[PoolReport]:
    """Measure one pool after another below `folder`.

    Yields a report of all pools so far after each. Ray must be running.

    Raises `PoolError` where labels are missing or a shard does not come back, and `StorageError`.
    """
    start_s = time.monotonic()
    crew = Crew(settings.side_px, settings.encoding)
    series: list[Series] = []

    try:
        # One pool at a time: the memory and the files of one are freed before the next starts.
        for shards in settings.shards:
            place = folder.child(f"pool_{shards}")
            labels_before = len(series) * settings.labels
            trial = PoolTrial(settings, shards, place, crew, report_progress, labels_before)
            try:
                series.append(trial.run())
            finally:
                trial.end()
            yield PoolReport(settings, describe_machine(), time.monotonic() - start_s, tuple(series))
    finally:
        crew.end()


class PoolTrial:
    """One pool with its number of shards, filled and measured level by level."""

    def __init__(
        self,
        settings: PoolSettings,
        num_shards: int,
        place: Location,
        crew: Crew,
        report_progress: ReportProgress,
        labels_before: int,
    ) -> None:
        """Start the pool's shards.

        `labels_before` counts the labels of the pools before this one.
        """
        self._settings = settings
        self._num_shards = num_shards
        self._place = place
        self._crew = crew
        self._report_progress = report_progress
        self._labels_before = labels_before
        self._rng = np.random.default_rng(num_shards)
        self._label_bytes = LabelMaker(settings.side_px, settings.encoding).make(0, 0).size_bytes

        # What the pool holds: labels so far, the step of the newest, files in storage, the rounds' saves.
        self._labels = 0
        self._step = 0
        self._files: dict[str, int] = {}
        self._full_save = Save()

        self._shards = self._start_shards()
        self._keeper = PoolKeeper(self._shards, place)

    def run(self) -> Series:
        """Measure the pool at every level, then simulated jobs."""
        # Warm up with a few labels, then note the memory of the empty pool.
        self._announce("warming up")
        self._empty_pool()
        self._crew.offer(range(WARM_UP_LABELS), self._step)
        self._save()
        self._generation = self._empty_pool()
        self._empty_store_bytes, self._empty_index_bytes = self._measure_bytes()

        # The levels, each on top of the one before.
        levels = [self._measure_level(labels) for labels in list_levels(self._settings.labels)]

        # Jobs that read from memory, and one that reads from storage too, where storage has labels of its own.
        in_memory = self._list_numbers_in_memory()
        everything = range(self._labels)
        job = self._run_job(in_memory)
        job_in_lockstep = self._run_job(in_memory, is_lockstep=True)
        job_beyond_memory = None
        if len(in_memory) < len(everything):
            job_beyond_memory = self._run_job(everything)
        return Series(self._num_shards, tuple(levels), job, job_in_lockstep, job_beyond_memory)

    def end(self) -> None:
        """Free the pool's memory and delete its files."""
        kill_actors(self._shards)
        self._place.delete()

    # --- Steps of a trial ---

    def _measure_level(self, labels: int) -> Level:
        """Fill the pool up to `labels` and measure everything."""
        # Offers, and the memory that they take.
        offers_per_s, offers_s = self._fill(labels)
        memory = self._measure_memory()

        # Reads of labels in memory.
        self._announce("reading from memory")
        from_memory = self._crew.measure_reads(self._choose(self._list_numbers_in_memory(), MAX_READ_LABELS))

        # An incremental snapshot after a few labels were replaced.
        self._announce("an incremental snapshot")
        self._crew.offer(self._choose(range(labels), round(labels * REPLACED_SHARE)), self._step)
        small_save = self._save()

        # Restoration by new shards, whose first reads are from storage.
        self._announce("restoring, reading from storage")
        restore, from_storage = self._measure_restore()

        return Level(
            labels=labels,
            offers_per_s=offers_per_s,
            offer=summarise_latency(offers_s),
            memory=memory,
            from_memory=from_memory,
            from_storage=from_storage,
            full_save=self._full_save,
            small_save=small_save,
            restore=restore,
        )

    def _fill(self, labels: int) -> tuple[float, list[float]]:
        """Fill the pool up to `labels` in rounds.

        Returns the offers per second and the seconds of single offers.
        """
        start = self._labels
        wall_s = 0.0
        times_s: list[float] = []
        while self._labels < labels:
            # A round: offers in chunks, with a line of progress for each.
            round_end = min(labels, (self._labels // ROUND_LABELS + 1) * ROUND_LABELS)
            while self._labels < round_end:
                self._announce("offering")
                chunk = range(self._labels, min(round_end, self._labels + CHUNK_LABELS))
                start_s = time.perf_counter()
                times_s += self._crew.offer(chunk, self._step)
                wall_s += time.perf_counter() - start_s
                self._labels = chunk.stop

            # Its snapshot.
            self._announce("saving")
            self._full_save += self._save()
        return (labels - start) / wall_s, times_s

    def _save(self) -> Save:
        """End the step with a snapshot, and delete the snapshots before."""
        # Time both parts: the first delays the step, the second does not.
        self._step += 1
        start_s = time.perf_counter()
        parts = self._keeper.freeze()
        frozen_s = time.perf_counter()
        self._keeper.finish(self._step, parts)
        finished_s = time.perf_counter()

        # Files that were not there before are what was written.
        files_before = self._files
        self._files = list_file_sizes(self._place)
        written_bytes = 0
        for path, size in self._files.items():
            if path not in files_before:
                written_bytes += size

        self._keeper.sweep([self._step])
        return Save(frozen_s - start_s, finished_s - frozen_s, written_bytes)

    def _measure_restore(self) -> tuple[Restore, Reads]:
        """Restore the last snapshot into a second set of shards.

        All labels are read for the first time, so they come from storage.
        """
        numbers = self._choose(range(self._labels), FIRST_READ_LABELS + MAX_READ_LABELS)
        num_first = min(FIRST_READ_LABELS, len(numbers) // 3)
        current = snapshots.read_current(self._place)

        # Start the processes.
        start_s = time.perf_counter()
        shards = self._start_shards()
        try:
            ray.get([shard.ping.remote() for shard in shards])
            started_s = time.perf_counter()

            # Restore the index.
            generation = PoolKeeper(shards, self._place).restore(snapshots.format_name(self._step))
            restored_s = time.perf_counter()

            # Read labels, none of them in memory yet.
            self._crew.join(shards, generation)
            (first_read_s,) = self._crew.read(numbers[:num_first], num_first)
            reads = self._crew.measure_reads(numbers[num_first:])
        finally:
            kill_actors(shards)

        # Return the folder and the crew to the first set of shards.
        snapshots.write_current(self._place, current)
        self._crew.join(self._shards, self._generation)
        return Restore(started_s - start_s, restored_s - started_s, num_first, first_read_s), reads

    def _run_job(self, numbers: Sequence[int], is_lockstep: bool = False) -> WorkerWaits:
        """Run a simulated job whose workers read the labels of `numbers`."""
        self._announce(f"{self._settings.workers} workers with {len(numbers)} labels")
        self._crew.join(self._shards, self._generation, self._settings.workers)
        steps = max(1, round(self._settings.job_s / STEP_S))

        # The shards' processor time within the job.
        cpu_before_s = measure_cpu_s(self._shards)
        ticks = self._crew.work(numbers, self._step, steps, is_lockstep)
        self._step += steps
        return summarise_job(ticks, steps, measure_cpu_s(self._shards) - cpu_before_s)

    # --- The pool ---

    def _start_shards(self) -> list[ActorProxy[PoolShard]]:
        return start_pool(self._num_shards, self._place, self._settings.memory_mib)

    def _empty_pool(self) -> int:
        """Empty the pool; return its generation."""
        generation = self._keeper.restore(None)
        self._crew.join(self._shards, generation)
        return generation

    def _measure_memory(self) -> Memory:
        """Return the memory per label.

        The object store and the shards' processes are compared with those of the empty pool.
        """
        store_bytes, index_bytes = self._measure_bytes()
        return Memory(
            counted_bytes_per_label=self._count_resident_bytes() / self._labels,
            object_store_bytes_per_label=(store_bytes - self._empty_store_bytes) / self._labels,
            index_bytes_per_label=(index_bytes - self._empty_index_bytes) / self._labels,
        )

    def _measure_bytes(self) -> tuple[float, float]:
        """Return the bytes in object stores and in shards."""
        return measure_object_store_bytes(), measure_private_bytes(self._shards)

    def _count_resident_bytes(self) -> float:
        """Return the bytes in memory by the pool's counters."""
        return collect_counters(self._shards)["memory_mib"] * MIB

    def _list_numbers_in_memory(self) -> range:
        """Return images whose labels are in memory.

        These are all images, or the newer half of those in memory.
        """
        num_in_memory = round(self._count_resident_bytes() / self._label_bytes)
        if num_in_memory >= self._labels:
            return range(self._labels)
        return range(self._labels - num_in_memory // 2, self._labels)

    def _choose(self, numbers: Sequence[int], most: int) -> list[int]:
        """Return up to `most` random numbers, at least one."""
        return self._rng.permutation(numbers)[: max(1, most)].tolist()

    def _announce(self, activity: str) -> None:
        """Report the labels so far and the current activity."""
        shards = "1 shard" if self._num_shards == 1 else f"{self._num_shards} shards"
        self._report_progress(self._labels_before + self._labels, f"{shards}: {activity}")
