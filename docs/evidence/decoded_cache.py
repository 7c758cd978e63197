"""Compare samples from decoded files with samples from the cache in Ray's object store (`data.cache_mib`).

One task on one core makes both by turns, once the cache holds all images. The files are JPEG photographs of 2
megapixels; depth is .npy, 16-bit PNG or procedural. A row between shows the cost of offering images in the first epoch.
Then a whole stream is read through Ray Data with all of the machine's CPUs, without the cache and with it. Prints
Markdown, times in ms:

    python docs/evidence/decoded_cache.py --samples 90

The photographs are four rendered ones, each eight times, shifted.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import ray

from corun_ray.config.jobs import ClusterSection, TrainingJob
from corun_ray.core.timing import PHASES, PhaseTimes
from corun_ray.service.cluster.connect import connect
from corun_ray.service.data.cache import CacheView, start_cache
from corun_ray.service.data.manifest import build_manifest
from corun_ray.service.data.sample_maker import SampleMaker
from corun_ray.service.data.stream import StreamTask, iterate_batches, plan_remaining_phases, split_stream
from corun_ray.service.train.board import start_board

sys.path.insert(0, str(Path(__file__).parents[2]))
from docs.evidence.stream_speed import PATCH_PX, QUALITY, fail, job_of, render

COPIES = 8
"""Of each rendered photograph."""


def main() -> None:
    """Render the photographs, measure every kind of job and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=90, help="of each kind and way; a stream has four times as many")
    parser.add_argument("--size", type=int, nargs=2, default=(1920, 1088), metavar=("W", "H"), help="of a photograph")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        # Few photographs take long to render, so most are shifted copies.
        render(folder, *arguments.size)
        for file in sorted((folder / "clear").iterdir()):
            shift(folder, file.stem)

        connect(ClusterSection(workers=1, cpus_per_worker=1, data_cpus=1))

        # One task on one core makes samples both ways, by turns.
        jobs = []
        for kind in ("pretrain", "colabator"):
            for depth in depths(folder):
                jobs.append(job_of(kind, folder, depth))
        rates = []
        for job in jobs:
            keeper = start_cache(4096, start_board())
            rates.append(print_table(job, arguments.samples, ray.get(by_turns.remote(job, keeper, arguments.samples))))
            ray.kill(keeper)

        # The whole stream, with all cores.
        print("\nThrough Ray Data, samples/s after the first epoch\n")
        print("| | decoded | from the cache |\n| --- | --- | --- |")
        for job in jobs:
            cells = [f"{streamed(job, cache_mib, arguments.samples):.1f}" for cache_mib in (0, 4096)]
            print(f"| {title(job)} | " + " | ".join(cells) + " |", flush=True)

        print(
            "\nOne task by turns\n\n| samples | decoded | from the cache | times as many |\n| --- | --- | --- | --- |"
        )
        for job, (decoded, cached) in zip(jobs, rates, strict=True):
            print(f"| {title(job)} | {decoded:.1f} | {cached:.1f} | {cached / decoded:.1f} |")


def depths(folder: Path) -> tuple[Path | None, ...]:
    """Return the folders of depth; None stands for procedural depth."""
    return folder / "npy", folder / "png", None


def title(job: TrainingJob) -> str:
    """Name a job by its kind and depth."""
    return f"{job.kind}, depth {'procedural' if job.data.depth is None else Path(job.data.depth).name}"


def shift(folder: Path, stem: str) -> None:
    """Write copies of a photograph and its depth, with the columns rotated."""
    bgr = cv2.imread(str(folder / "clear" / f"{stem}.jpg"))
    depth = cv2.imread(str(folder / "png" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
    for copy in range(1, COPIES):
        columns, name = copy * bgr.shape[1] // COPIES, f"{stem}_{copy}"
        for group in ("clear", "hazy"):
            moved = np.roll(bgr, columns, axis=1)
            cv2.imwrite(str(folder / group / f"{name}.jpg"), moved, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
        cv2.imwrite(str(folder / "png" / f"{name}.png"), np.roll(depth, columns, axis=1))
        np.save(folder / "npy" / f"{name}.npy", np.roll(depth, columns, axis=1).astype(np.float32))


@ray.remote(num_cpus=1)
def by_turns(job: TrainingJob, keeper: ray.actor.ActorHandle, samples: int) -> dict[str, tuple[list[float], dict]]:
    """Make samples both ways by turns on one core.

    Returns for each row of the table the time of every sample in ms, and the sums of their phases in s.
    """
    cv2.setNumThreads(1)
    manifest, view = build_manifest(job), CacheView(keeper)
    epoch = len(manifest.clear)

    # The maker without a name decodes files; the other one takes images from the cache.
    makers = {name: SampleMaker(job, manifest, PATCH_PX, fail, cache) for name, cache in (("", None), ("cache", view))}
    listeners, times_ms = defaultdict(PhaseTimes), defaultdict(list)

    def measured(row: str, maker: str, index: int) -> dict[str, np.ndarray]:
        """Make a sample and note its time and phases under `row`."""
        with listeners[row].listen():
            start_s = time.perf_counter()
            made = makers[maker].sample(index)
            times_ms[row].append(1000 * (time.perf_counter() - start_s))
        return made

    # Warm up, and wait for the cache to start.
    makers[""].sample(0)
    while view._cache is None:
        view.refresh()

    # Fill the cache. It takes several epochs: a process offers at most two images at a time.
    for index in range(4 * epoch):
        view.refresh()
        measured("decoded and offered", "cache", index) if index < epoch else makers["cache"].sample(index)
        time.sleep(0.02)
    view.refresh()

    # Measure. Each way goes first every other time, and both must make the same sample.
    for index in range(samples):
        rows = [("decoded", ""), ("from the cache", "cache")]
        one, other = (measured(*row, index) for row in (rows if index % 2 else rows[::-1]))
        assert all(np.array_equal(one[name], other[name]) for name in one)
    return {row: (times, dict(listeners[row].seconds)) for row, times in times_ms.items()}


def print_table(job: TrainingJob, samples: int, measured: dict[str, tuple[list[float], dict]]) -> tuple[float, float]:
    """Print a table with one row for each way, times in ms.

    Returns the samples per second, decoded and from the cache.
    """
    print(f"\n{title(job)}: {samples} samples\n")
    print("| | " + " | ".join((*PHASES, "whole, mean", "median", "samples/s")) + " |")
    print("| --- " * (len(PHASES) + 4) + "|")

    for name in ("decoded", "decoded and offered", "from the cache"):
        times, seconds = measured[name]
        mean = statistics.mean(times)
        parts = [1000 * seconds.get(part, 0.0) / len(times) for part in PHASES]
        cells = [f"{value:.1f}" for value in (*parts, mean, statistics.median(times), 1000 / mean)]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    decoded, cached = (1000 / statistics.mean(measured[name][0]) for name in ("decoded", "from the cache"))
    return decoded, cached


def streamed(job: TrainingJob, cache_mib: int, samples: int) -> float:
    """Measure the samples per second of a stream after its first epochs."""
    board, manifest = start_board(), build_manifest(job)
    keeper, warm = start_cache(cache_mib, board), 6 * len(manifest.clear)

    # A job of one worker, with enough steps for the warm-up and the measurement.
    steps = job.train.model_copy(update={"steps": warm + 4 * samples})
    job = job.model_copy(update={"train": steps})

    # Read the stream as a worker does.
    ((phase, layout),) = plan_remaining_phases(job, 0, 0, 1)
    task = StreamTask(job, ray.put(manifest), board, layout, phase.patch_px, cache=keeper)
    (shard,) = split_stream(task)
    ends_s = [time.perf_counter() for _ in iterate_batches(shard, layout, 0)]
    if keeper is not None:
        ray.kill(keeper)
    return (len(ends_s) - warm) / (ends_s[-1] - ends_s[warm - 1])


if __name__ == "__main__":
    main()
