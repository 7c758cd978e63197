"""Measures the making of training samples in this process, on one core, as a task of the stream does it."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from corun_ray.config.jobs import ColabatorJob, PretrainJob, TrainingJob
from corun_ray.core.choices import DepthKind
from corun_ray.core.timing import PHASES, PhaseTimes
from corun_ray.demo.dataset import DemoSize, write_demo
from corun_ray.service.data.manifest import build_manifest
from corun_ray.service.data.packing import pack_here, plan_pack
from corun_ray.service.data.sample_maker import SampleMaker

RENDERED = DemoSize(clear_images=4, hazy_images=0, width_px=1920, height_px=1088)
Tell = Callable[[int, str], None]
"""Takes how many samples have been made, of all that will be, and of which kind."""


@dataclass(frozen=True)
class StreamSettings:
    """What is asked for."""

    patch_px: int
    samples: int
    repeats: int


@dataclass(frozen=True)
class StreamResult:
    """One kind of sample: medians over the repeats."""

    data: dict[str, str | None]
    num_files: int
    images_per_s: float
    each_images_per_s: tuple[float, ...]
    """Of every repeat."""
    sample_s: float
    phases_s: dict[str, float]
    """Of a sample, by phase; `other` is what they leave."""
    bad_files: dict[str, str]
    """URI → reason, of those passed over."""


@dataclass(frozen=True)
class StreamReport:
    """Everything that was found out."""

    settings: StreamSettings
    machine: dict[str, str | int]
    kinds: dict[str, StreamResult]


def render_photographs(folder: Path, progress: Callable[[int, int], None]) -> None:
    """Four rendered photographs of 2 megapixels in `clear`, with their depth as .npy in `depth`; both in `pack`."""
    write_demo(folder / "demo", 0, RENDERED, progress)
    (folder / "demo" / "clear").rename(folder / "clear")
    (folder / "depth").mkdir()
    for file in (folder / "demo" / "depth").iterdir():
        depth = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        np.save(folder / "depth" / f"{file.stem}.npy", np.asarray(depth, np.float32))
    pack_here(plan_pack(str(folder / "clear"), str(folder / "pack"), str(folder / "depth"), 128, keep_png=False))


def job_of(clear: str, depth: str | None, depth_kind: DepthKind, hazy: str | None, patch_px: int) -> TrainingJob:
    """A job with such data: pre-training, or with real hazy images Colabator."""
    data = {"clear": clear, "depth": depth, "depth_kind": depth_kind, "patch_px": patch_px}
    if hazy is None:
        return PretrainJob.model_validate({"kind": "pretrain", "name": "bench", "data": data})
    # Of the coherence only the size of a block matters: it has to divide the patch.
    coherence = {"block_px": 16}
    return ColabatorJob.model_validate(
        {"kind": "colabator", "name": "bench", "data": {**data, "hazy": hazy}, "coherence": coherence}
    )


def bench_stream(jobs: Mapping[str, TrainingJob], settings: StreamSettings, tell: Tell) -> StreamReport:
    """Makes samples of each job; raises `StorageError`, `ManifestError` and `TooManyBadFiles`."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        kinds: dict[str, StreamResult] = {}
        for name, job in jobs.items():
            before = len(kinds) * settings.samples * settings.repeats
            kinds[name] = _measure(job, settings, lambda done, name=name, before=before: tell(before + done, name))  # type: ignore[misc]
    finally:
        cv2.setNumThreads(threads)
    return StreamReport(settings, _machine(), kinds)


def _measure(job: TrainingJob, settings: StreamSettings, tell: Callable[[int], None]) -> StreamResult:
    manifest = build_manifest(job)
    bad_files: dict[str, str] = {}
    make = SampleMaker(job, manifest, settings.patch_px, bad_files.update)
    make.sample(0)  # opens the connection to the store, fills tables
    whole_s, phases_s = [], []
    for repeat in range(settings.repeats):
        times, started_s = PhaseTimes(), time.perf_counter()
        with times.listen():
            for index in range(repeat * settings.samples, (repeat + 1) * settings.samples):
                make.sample(index)
                tell(index + 1)
        whole_s.append((time.perf_counter() - started_s) / settings.samples)
        phases_s.append([times.seconds[phase] / settings.samples for phase in PHASES])
    medians = dict(zip(PHASES, map(statistics.median, zip(*phases_s, strict=True)), strict=True))
    images = 2 if isinstance(job, ColabatorJob) else 1
    sample_s = statistics.median(whole_s)
    return StreamResult(
        data={key: getattr(job.data, key, None) for key in ("clear", "depth", "hazy")},
        num_files=manifest.num_images,
        images_per_s=images / sample_s,
        each_images_per_s=tuple(images / seconds for seconds in whole_s),
        sample_s=sample_s,
        phases_s={**medians, "other": max(0.0, sample_s - sum(medians.values()))},
        bad_files=bad_files,
    )


def table(report: StreamReport) -> str:
    """A column for each kind of sample."""
    kinds = report.kinds
    rows = {
        "images/s on one core": [f"{kind.images_per_s:.1f}" for kind in kinds.values()],
        "  slowest, fastest repeat": [
            f"{min(kind.each_images_per_s):.1f}, {max(kind.each_images_per_s):.1f}" for kind in kinds.values()
        ],
        "a sample, ms": [f"{1000 * kind.sample_s:.1f}" for kind in kinds.values()],
    }
    for phase in (*PHASES, "other"):
        rows[f"  {phase}"] = [f"{1000 * kind.phases_s[phase]:.1f}" for kind in kinds.values()]
    lines = [f"{name:<28}" + "".join(f"{cell:>22}" for cell in cells) for name, cells in rows.items()]
    notes = [
        f"{name}: {len(kind.bad_files)} files cannot be used, e.g. {': '.join(next(iter(kind.bad_files.items())))}"
        for name, kind in kinds.items()
        if kind.bad_files
    ]
    return "\n".join([" " * 28 + "".join(f"{name:>22}" for name in kinds), *lines, *notes])


def as_json(report: StreamReport) -> str:
    """Every figure, and the machine that it comes from."""
    return json.dumps(asdict(report), indent=1) + "\n"


def _machine() -> dict[str, str | int]:
    return {
        "cores": os.cpu_count() or 0,
        "opencv": cv2.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
