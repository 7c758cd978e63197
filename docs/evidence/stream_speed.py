"""Compare the cost of a training sample in the straightforward order with ours, on one core.

Both orders make the same samples by turns from the same files: JPEG photographs of 2 megapixels, with depth as 16-bit
PNG, as .npy and procedural. A last comparison reads the files with PNG, and for our order a pack of them
(`corun-ray pack`). The straightforward order decodes, synthesises and compresses the whole image and crops last
(tests/core/data/plain_samples.py). Prints a Markdown table for each, times in ms:

    python docs/evidence/stream_speed.py --samples 60

By default it renders four photographs of 1920 x 1088 px in 20 s. --photographs names a folder of photographs instead.
Smaller ones are enlarged to 2 megapixels, and their depth is procedural.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from corun_ray.config.jobs import ColabatorJob, PretrainJob, TrainingJob
from corun_ray.core.data.depth import DepthMap, draw_procedural_depth
from corun_ray.core.data.haze import HazeRange
from corun_ray.core.data.images import decode_depth, decode_image
from corun_ray.core.timing import PHASES, PhaseTimes, phase
from corun_ray.demo.dataset import DemoSize, write_demo
from corun_ray.service.data.manifest import Manifest, build_manifest
from corun_ray.service.data.packing import pack_here, plan_pack
from corun_ray.service.data.sample_maker import CLEAR, HAZY, SampleMaker, choose_image

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.core.data.plain_samples import plain_pair, plain_views

LEAST_PX, QUALITY, PATCH_PX = 2_000_000, 92, 288


class PlainMaker:
    """Makes the samples of a job in the straightforward order."""

    def __init__(self, job: TrainingJob, manifest: Manifest) -> None:
        self.job, self.manifest = job, manifest

    def sample(self, index: int) -> None:
        """Read and make one sample."""
        # The clear image.
        data, manifest, seed = self.job.data, self.manifest, self.job.seed
        image = choose_image(seed, CLEAR, index, len(manifest.clear))
        rng = np.random.default_rng([seed, CLEAR, index, 0])
        clear = decoded(data.clear, manifest.clear[image])

        # Its depth, procedural or from a file.
        if manifest.depth is None:
            with phase("depth"):
                depth_map = draw_procedural_depth(rng, *clear.shape[:2])
                depth = depth_map.to_inverse(depth_map.pixels)
        else:
            file = Path(data.depth, manifest.depth[image])
            content = read(file)
            with phase("depth"):
                depth_map = DepthMap.from_pixels(decode_depth(content, file.suffix), data.depth_kind)
                depth = depth_map.to_inverse(depth_map.pixels)

        # The synthetic pair, and for Colabator the views of a real image.
        options = {"patch_px": PATCH_PX, "random_resize": data.random_resize}
        pair = plain_pair(clear, depth, rng, haze_range=HazeRange(), **options)
        if isinstance(self.job, ColabatorJob):
            image = choose_image(seed, HAZY, index, len(manifest.hazy))
            hazy = decoded(self.job.data.hazy, manifest.hazy[image])
            rng = np.random.default_rng([seed, HAZY, index, 0])
            plain_views(hazy, rng, patch_px=PATCH_PX, jpeg_quality=pair.jpeg_quality)


def read(file: Path) -> bytes:
    """Read a file, timed as phase `read`."""
    with phase("read"):
        return file.read_bytes()


def decoded(root: str, key: str) -> np.ndarray:
    """Read and decode an image, timed as phases `read` and `decode`."""
    content = read(Path(root, key))
    with phase("decode"):
        return decode_image(content)


def main() -> None:
    """Prepare the photographs, compare the orders and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=60, help="samples of each order and kind (default 60)")
    parser.add_argument("--photographs", type=Path, help="a folder of photographs, instead of rendered ones")
    parser.add_argument("--size", type=int, nargs=2, default=(1920, 1088), metavar=("W", "H"), help="of rendered ones")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.photographs is None:
            render(folder, *arguments.size)
        else:
            enlarge(arguments.photographs, folder)

        # Both orders from the same files.
        rows = []
        depths = [folder / kind for kind in ("png", "npy") if (folder / kind).is_dir()]
        for depth, kind in itertools.product([*depths, None], ("pretrain", "colabator")):
            rows.append(compare(job_of(kind, folder, depth), arguments.samples))

        # Ours from packs of the files with PNG.
        if (folder / "png").is_dir():
            pack_here(plan_pack(str(folder / "clear"), str(folder / "pack"), str(folder / "png"), 128, False))
            pack_here(plan_pack(str(folder / "hazy"), str(folder / "hazy_pack"), None, 128, False))
            for kind in ("pretrain", "colabator"):
                rows.append(compare(job_of(kind, folder, folder / "png"), arguments.samples, packed_job(kind, folder)))

    print("\n| samples, depth | straightforward, samples/s | ours, samples/s | times as many |")
    print("| --- | --- | --- | --- |")
    for title, plain, ours in sorted(rows, key=lambda row: "pretrain" not in row[0]):
        print(f"| {title} | {plain:.1f} | {ours:.1f} | {ours / plain:.1f} |")
    print(f"\nOpenCV {cv2.__version__}, numpy {np.__version__}, one thread of {os.cpu_count()} cores")


def render(folder: Path, width_px: int, height_px: int) -> None:
    """Render four scenes to `clear` and again to `hazy`, with depth in `png` and `npy`."""
    write_demo(folder / "demo", 0, DemoSize(4, 0, width_px, height_px))
    (folder / "demo" / "depth").rename(folder / "png")
    (folder / "npy").mkdir()
    for file in (folder / "png").iterdir():
        np.save(folder / "npy" / f"{file.stem}.npy", cv2.imread(str(file), cv2.IMREAD_UNCHANGED).astype(np.float32))
    for file in (folder / "demo" / "clear").iterdir():
        write(cv2.imread(str(file)), folder, file.stem)


def enlarge(photographs: Path, folder: Path) -> None:
    """Enlarge at most sixteen photographs to `clear` and again to `hazy`."""
    for file in sorted(photographs.iterdir())[:16]:
        image = cv2.cvtColor(decode_image(file.read_bytes()), cv2.COLOR_RGB2BGR)
        factor = max(1.0, (LEAST_PX / (image.shape[0] * image.shape[1])) ** 0.5)
        write(cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_LANCZOS4), folder, file.stem)


def write(bgr: np.ndarray, folder: Path, stem: str) -> None:
    """Write an image as JPEG to `clear` and to `hazy`."""
    for group in ("clear", "hazy"):
        (folder / group).mkdir(exist_ok=True)
        cv2.imwrite(str(folder / group / f"{stem}.jpg"), bgr, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])


def job_of(kind: str, folder: Path, depth: Path | None) -> TrainingJob:
    """Make a job of a kind that reads the files; without `depth`, depth is procedural."""
    data = {"clear": str(folder / "clear"), "depth": None if depth is None else str(depth), "patch_px": PATCH_PX}
    if kind == "pretrain":
        return PretrainJob(kind=kind, name=kind, data=data)
    return ColabatorJob(kind=kind, name=kind, data={**data, "hazy": str(folder / "hazy")})


def packed_job(kind: str, folder: Path) -> TrainingJob:
    """Make a job of a kind that reads the packs."""
    job = job_of(kind, folder, folder / "pack")
    packs = {"clear": str(folder / "pack")} | ({"hazy": str(folder / "hazy_pack")} if kind == "colabator" else {})
    return job.model_copy(update={"data": job.data.model_copy(update=packs)})


def compare(job: TrainingJob, samples: int, packed: TrainingJob | None = None) -> tuple[str, float, float]:
    """Make samples in both orders by turns; print the table.

    With `packed`, our order reads packs. Returns what was made, and the samples per second of both orders.
    """
    ours = packed or job
    makers = (PlainMaker(job, build_manifest(job)), SampleMaker(ours, build_manifest(ours), PATCH_PX, fail))
    listeners, times_ms = (PhaseTimes(), PhaseTimes()), ([], [])

    # Each order goes first every other time. Sample -1 warms up and does not count.
    for index in range(-1, samples):
        for which in (0, 1) if index % 2 else (1, 0):
            with (listeners[which] if index >= 0 else PhaseTimes()).listen():
                start_s = time.perf_counter()
                makers[which].sample(max(index, 0))
            if index >= 0:
                times_ms[which].append(1000 * (time.perf_counter() - start_s))

    # Print one row for each order.
    kind = "procedural" if job.data.depth is None else Path(job.data.depth).name + (", packed" if packed else "")
    print(f"\n{job.kind}, depth {kind}: {samples} samples\n")
    print("| | " + " | ".join((*PHASES, "whole, mean", "median", "samples/s")) + " |")
    print("| --- " * (len(PHASES) + 4) + "|")
    means = [statistics.mean(times) for times in times_ms]
    for name, listener, times, mean in zip(("straightforward", "ours"), listeners, times_ms, means, strict=True):
        parts = [1000 * listener.seconds[part] / samples for part in PHASES]
        cells = [f"{value:.1f}" for value in (*parts, mean, statistics.median(times), 1000 / mean)]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(f"\n{means[0] / means[1]:.1f} times as many a second", flush=True)
    return f"{job.kind}, {kind}", 1000 / means[0], 1000 / means[1]


def fail(bad_files: dict[str, str]) -> None:
    """End with the reasons why files are unusable."""
    raise SystemExit(str(bad_files))


if __name__ == "__main__":
    main()
