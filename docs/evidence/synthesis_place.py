"""Compare the two places of a sample's pixel work: the stream's processes and the training worker's device.

For `data.synthesis: stream` and `worker`, by turns in one process and of the same photographs (1920 x 1088 px, JPEG,
depth as .npy): samples a second that one core of the stream makes, the bytes of a sample, the time until a batch is on
the device and ready, and the time of a step. The scorers need no weights. Prints a Markdown table:

    python docs/evidence/synthesis_place.py --samples 60 --steps 12
    python docs/evidence/synthesis_place.py --samples 60 --steps 12 --kind pretrain
    python docs/evidence/synthesis_place.py --device cuda --batch 8 --stages 4 --width 30 --json FIGURES.json
"""

import argparse
import json
import pickle
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import torch

from corun_ray.bench.stream import build_job, render_photographs
from corun_ray.config.jobs import TrainingJob
from corun_ray.core.choices import SynthesisPlace
from corun_ray.core.networks.corun import CORUN
from corun_ray.core.scoring.coherence import Coherence
from corun_ray.core.timing import synchronize
from corun_ray.core.training.labels import LocalPool
from corun_ray.core.training.losses import COLABATOR_WEIGHTS, PRETRAIN_WEIGHTS, Losses
from corun_ray.core.training.state import TrainState
from corun_ray.service.data.manifest import build_manifest
from corun_ray.service.data.sample_maker import Batch, SampleMaker
from corun_ray.service.train.learner import Learner
from corun_ray.service.train.precision import agree_on_precision

PLACES: tuple[SynthesisPlace, ...] = ("stream", "worker")
COLUMNS = ("samples/s and core", "MB a sample", "ms until a batch is ready", "ms a step")
BLOCK_PX = 16

Times = dict[tuple[str, str], list[float]]
"""Seconds by what was timed and the place of the pixel work."""


def main() -> None:
    """Measure both places and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("colabator", "pretrain"), default="colabator")
    parser.add_argument("--device", default="cpu", help="the training worker's (default cpu)")
    parser.add_argument("--size", type=int, default=288, metavar="PX", help="side of a patch (default 288)")
    parser.add_argument("--samples", type=int, default=40, help="timed samples of each place (default 40)")
    parser.add_argument("--steps", type=int, default=4, help="timed batches and steps of each place (default 4)")
    parser.add_argument("--batch", type=int, default=2, help="samples of a step (default 2)")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, too")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        render_photographs(folder, lambda done, total: None)
        makers = build_makers(folder, arguments.kind, arguments.size)
        times: Times = defaultdict(list)
        batches = time_samples(makers, arguments.samples, arguments.batch, times)

    device = torch.device(arguments.device)
    learners = {place: build_learner(maker.job, device, arguments) for place, maker in makers.items()}
    time_steps(learners, batches, arguments.steps, device, times)
    figures = summarise(times, batches, arguments.batch)
    print_table(figures, device)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures))


def build_makers(folder: Path, kind: str, patch_px: int) -> dict[str, SampleMaker]:
    """Build the maker of samples for each place; clear images serve as real ones, too."""
    clear = str(folder / "clear")
    makers = {}
    for place in PLACES:
        hazy = clear if kind == "colabator" else None
        job = build_job(clear, str(folder / "depth"), "metres", hazy, patch_px, place)
        makers[place] = SampleMaker(job, build_manifest(job), patch_px, fail)
    return makers


def fail(bad_files: dict[str, str]) -> None:
    """End with the reasons why files are unusable."""
    raise SystemExit(str(bad_files))


def time_samples(
    makers: dict[str, SampleMaker], samples: int, batch_images: int, times: Times
) -> dict[str, list[Batch]]:
    """Time single samples by turns; return all that were made, as batches of each place."""
    batches: dict[str, list[Batch]] = {place: [] for place in PLACES}
    for number in range(-1, samples // batch_images):
        indices = np.arange(batch_images) + batch_images * max(number, 0)
        # Each place goes first every other time. Batch -1 warms up and does not count.
        for place in PLACES if number % 2 else PLACES[::-1]:
            started_s = time.perf_counter()
            batch = makers[place]({"id": indices})
            if number >= 0:
                times["sample", place].append((time.perf_counter() - started_s) / batch_images)
                batches[place].append(batch)
    return batches


def build_learner(job: TrainingJob, device: torch.device, arguments: argparse.Namespace) -> Learner:
    """Build the learner of a job, with a pool of its own."""
    torch.manual_seed(0)
    state = TrainState.start(CORUN(arguments.stages, arguments.width), device)
    precision, _ = agree_on_precision(arguments.precision, device)
    losses = Losses(COLABATOR_WEIGHTS if arguments.kind == "colabator" else PRETRAIN_WEIGHTS)
    coherence = Coherence(block_px=BLOCK_PX)
    return Learner(job, state, losses, coherence, LocalPool(), 0, device, precision)


def time_steps(
    learners: dict[str, Learner], batches: dict[str, list[Batch]], steps: int, device: torch.device, times: Times
) -> None:
    """Time how a batch gets ready on the device, and whole steps, by turns."""
    for number in range(-1, steps):
        for place in PLACES if number % 2 else PLACES[::-1]:
            batch = batches[place][max(number, 0) % len(batches[place])]
            synchronize(device)
            started_s = time.perf_counter()
            learners[place].load(batch, 0)
            synchronize(device)
            ready_s = time.perf_counter()
            for _ in learners[place].learn(batch):
                pass
            synchronize(device)
            if number >= 0:
                times["batch", place].append(ready_s - started_s)
                times["step", place].append(time.perf_counter() - ready_s)


def summarise(times: Times, batches: dict[str, list[Batch]], batch_images: int) -> dict[str, float]:
    """Return the figures of both places by their names."""
    figures: dict[str, float] = {}
    for place in PLACES:
        sample_bytes = (
            statistics.mean([len(pickle.dumps(batch, protocol=5)) for batch in batches[place]]) / batch_images
        )
        columns = (
            1 / statistics.mean(times["sample", place]),
            sample_bytes / 1e6,
            1000 * statistics.median(times["batch", place]),
            1000 * statistics.median(times["step", place]),
        )
        figures |= {f"{place}: {column}": value for column, value in zip(COLUMNS, columns, strict=True)}
    return figures


def print_table(figures: dict[str, float], device: torch.device) -> None:
    """Print a row for each place."""
    print(f"device {device}, torch {torch.__version__}, OpenCV {cv2.__version__}\n")
    print(f"| `data.synthesis` | {' | '.join(COLUMNS)} |")
    print("| --- " * (len(COLUMNS) + 1) + "|")
    for place in PLACES:
        cells = [f"{figures[f'{place}: {column}']:.4g}" for column in COLUMNS]
        print(f"| {place} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
