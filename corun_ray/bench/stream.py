"""Measure how fast one core makes training samples, as a task of the sample stream does, in this process."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from corun_ray.config.jobs import ColabatorJob, PretrainJob, TrainingJob
from corun_ray.core.choices import DepthKind, SynthesisPlace
from corun_ray.core.timing import PHASES, PhaseTimes
from corun_ray.demo.dataset import DemoSize, write_demo
from corun_ray.service.data.manifest import build_manifest
from corun_ray.service.data.packing import pack_here, plan_pack
from corun_ray.service.data.sample_maker import SampleMaker
from corun_ray.service.telemetry.tables import format_table

RENDERED = DemoSize(clear_images=4, hazy_images=0, width_px=1920, height_px=1088)
"""The photographs that are rendered where no data is given."""
PACK_SHARD_MIB = 128
BLOCK_PX = 16
"""Size of a block of the coherence, which has to divide the patch; nothing else of the coherence matters here."""
OTHER = "other"
"""Name of the time that no phase accounts for."""

ReportProgress = Callable[[int, str], None]
"""Takes the number of samples made so far, of all kinds, and the kind of the current one."""


@dataclass(frozen=True)
class StreamSettings:
    """The size of a sample, and how many are made."""

    patch_px: int
    samples: int
    repeats: int


@dataclass(frozen=True)
class StreamResult:
    """The results for one kind of sample: medians over the repeats."""

    data: dict[str, str | None]
    num_files: int
    images_per_s: float
    each_images_per_s: tuple[float, ...]
    """Rate of every repeat."""
    sample_s: float
    phases_s: dict[str, float]
    """Seconds of a sample by phase; `other` is the remaining time."""
    bad_files: dict[str, str]
    """URI → reason, of skipped files."""


@dataclass(frozen=True)
class StreamReport:
    """The results for all kinds of samples."""

    settings: StreamSettings
    machine: dict[str, str | int]
    kinds: dict[str, StreamResult]


# --- Data and jobs ---


def render_photographs(folder: Path, report_progress: Callable[[int, int], None]) -> None:
    """Render four photographs of 2 megapixels below `folder`.

    `clear` holds the images, `depth` their depth as .npy, `pack` both as a pack.
    """
    # Render the demo dataset and keep its clear images.
    write_demo(folder / "demo", 0, RENDERED, report_progress)
    (folder / "demo" / "clear").rename(folder / "clear")

    # The demo's depth maps are images; store them as float32 arrays.
    (folder / "depth").mkdir()
    for file in (folder / "demo" / "depth").iterdir():
        depth = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        np.save(folder / "depth" / f"{file.stem}.npy", np.asarray(depth, np.float32))

    # Pack both.
    plan = plan_pack(str(folder / "clear"), str(folder / "pack"), str(folder / "depth"), PACK_SHARD_MIB, keep_png=False)
    pack_here(plan)


def build_job(
    clear: str,
    depth: str | None,
    depth_kind: DepthKind,
    hazy: str | None,
    patch_px: int,
    synthesis: SynthesisPlace = "stream",
) -> TrainingJob:
    """Return a job on such data.

    The job is Colabator where there are real hazy images, else pre-training.
    """
    data = {"clear": clear, "depth": depth, "depth_kind": depth_kind, "patch_px": patch_px, "synthesis": synthesis}
    if hazy is None:
        return PretrainJob.model_validate({"kind": "pretrain", "name": "bench", "data": data})
    data["hazy"] = hazy
    coherence = {"block_px": BLOCK_PX}
    return ColabatorJob.model_validate({"kind": "colabator", "name": "bench", "data": data, "coherence": coherence})


# --- Measurement ---


def bench_stream(
    jobs: Mapping[str, TrainingJob], settings: StreamSettings, report_progress: ReportProgress
) -> StreamReport:
    """Measure the samples of each job, on one thread.

    Raises `StorageError`, `ManifestError`, and `TooManyBadFiles` where too few files can be used.
    """
    # OpenCV's own threads would count for more than one core.
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        kinds: dict[str, StreamResult] = {}
        for name, job in jobs.items():
            samples_before = len(kinds) * settings.samples * settings.repeats
            kinds[name] = _measure_job(job, settings, partial(_add_samples, report_progress, samples_before, name))
    finally:
        cv2.setNumThreads(threads)
    return StreamReport(settings, _describe_machine(), kinds)


def _add_samples(report_progress: ReportProgress, samples_before: int, name: str, done: int) -> None:
    """Report progress over all kinds of samples."""
    report_progress(samples_before + done, name)


def _measure_job(job: TrainingJob, settings: StreamSettings, report_done: Callable[[int], None]) -> StreamResult:
    """Measure the samples of one job."""
    # The first sample, not counted, opens the connection to the store and fills tables.
    manifest = build_manifest(job)
    bad_files: dict[str, str] = {}
    maker = SampleMaker(job, manifest, settings.patch_px, bad_files.update)
    maker.sample(0)

    # Each repeat makes samples of its own.
    samples_s: list[float] = []
    phases_s: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for repeat in range(settings.repeats):
        # The phases are listened to while whole samples are timed.
        times = PhaseTimes()
        started_s = time.perf_counter()
        with times.listen():
            for index in range(repeat * settings.samples, (repeat + 1) * settings.samples):
                maker.sample(index)
                report_done(index + 1)

        # Seconds of one sample.
        samples_s.append((time.perf_counter() - started_s) / settings.samples)
        for phase in PHASES:
            phases_s[phase].append(times.seconds[phase] / settings.samples)

    # Medians over the repeats; the time that no phase accounts for comes last.
    sample_s = statistics.median(samples_s)
    medians_s = {phase: statistics.median(repeats_s) for phase, repeats_s in phases_s.items()}
    medians_s[OTHER] = max(0.0, sample_s - sum(medians_s.values()))

    # A sample of Colabator is a synthetic pair and a real hazy image.
    images = 2 if isinstance(job, ColabatorJob) else 1
    return StreamResult(
        data={key: getattr(job.data, key, None) for key in ("clear", "depth", "hazy", "synthesis")},
        num_files=manifest.num_images,
        images_per_s=images / sample_s,
        each_images_per_s=tuple([images / repeat_s for repeat_s in samples_s]),
        sample_s=sample_s,
        phases_s=medians_s,
        bad_files=bad_files,
    )


def _describe_machine() -> dict[str, str | int]:
    """Return this machine's cores and versions of software."""
    return {
        "cores": os.cpu_count() or 0,
        "opencv": cv2.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


# --- Presentation ---


def format_report(report: StreamReport) -> str:
    """Return a table with a column for each kind.

    Notes on files that cannot be used follow.
    """
    # All columns have the same rows.
    columns = [*map(_list_cells, report.kinds.values())]
    rows = []
    for name in columns[0]:
        rows.append([name, *(column[name] for column in columns)])
    # Figures stand flush right.
    header = ["", *report.kinds]
    lines = [format_table(rows, header, right=range(1, len(header)))]

    # A note for each kind, with one of its files.
    for name, kind in report.kinds.items():
        if kind.bad_files:
            uri, reason = next(iter(kind.bad_files.items()))
            lines.append(f"{name}: {len(kind.bad_files)} files cannot be used, e.g. {uri}: {reason}")
    return "\n".join(lines)


def _list_cells(kind: StreamResult) -> dict[str, str]:
    """Return a column as row name → cell."""
    slowest, fastest = min(kind.each_images_per_s), max(kind.each_images_per_s)
    cells = {
        "images/s on one core": f"{kind.images_per_s:.1f}",
        "  slowest, fastest repeat": f"{slowest:.1f}, {fastest:.1f}",
        "a sample, ms": f"{1000 * kind.sample_s:.1f}",
    }
    for phase, phase_s in kind.phases_s.items():
        cells[f"  {phase}"] = f"{1000 * phase_s:.1f}"
    return cells


def format_json(report: StreamReport) -> str:
    """Return every figure and a description of the machine, as JSON."""
    return json.dumps(asdict(report), indent=1) + "\n"
