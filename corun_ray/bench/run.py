"""Run the benchmarks that need torch and numpy alone.

With typer and rich for the command line, `python -m corun_ray bench step` runs on a bare GPU machine.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from corun_ray.bench.dehaze import DehazeSettings, bench_dehaze
from corun_ray.bench.machine import MATRIX_SIDE, choose_device
from corun_ray.bench.scaling import ScalingSettings, bench_scaling, read_measured_step
from corun_ray.bench.scaling_model import WorkerStep
from corun_ray.bench.step import StepSettings, bench_step
from corun_ray.bench.tables import format_dehaze, format_scaling, format_step
from corun_ray.core.choices import Precision
from corun_ray.core.errors import format_error
from corun_ray.core.training.precision import choose_precision, judge_bfloat16, read_processor


def run_step(settings: StepSettings, json_file: Path | None = None, trace: Path | None = None) -> None:
    """Measure a training step and print its parts.

    `trace` is the file for a profiler's trace of one more step.
    """
    report = bench_step(settings, trace=trace)

    print_machine(settings.device)
    print(format_step(report))
    write_json([report], settings.device, json_file)


def run_dehaze(sizes: Sequence[DehazeSettings], json_file: Path | None = None) -> None:
    """Measure the restoration of photographs; print a table a size.

    All are measured on the same device.
    Raises ValueError where an image does not fit into the memory that it is given.
    """
    reports = [bench_dehaze(settings) for settings in sizes]

    # The tables come together, when all sizes are measured.
    device = sizes[0].device
    print_machine(device)
    for report in reports:
        print(format_dehaze(report))
    write_json(reports, device, json_file)


def run_scaling(settings: ScalingSettings, alone: WorkerStep, check: bool, json_file: Path | None = None) -> None:
    """Work out a step on many GPUs from the step `alone` on one.

    With `check`, the formulae are compared with measurements on this machine.
    """
    report = bench_scaling(settings, alone, check)

    # The formulae need no device; the check is of CPU processes.
    device = torch.device("cpu")
    print_machine(device)
    print(format_scaling(report))
    write_json([report], device, json_file)


def read_step(
    file: Path, settings: ScalingSettings, rating_s: float | None = None
) -> tuple[ScalingSettings, WorkerStep]:
    """Return settings and step of a file of `bench step --json`.

    The method and the network are those that were measured; the other settings stay.
    Raises ValueError where the file holds no such step.
    """
    # A file of one report, with all figures of the step by part.
    try:
        (report,) = json.loads(file.read_text())
        step = read_measured_step(report, rating_s)
        measured = {name: report["settings"][name] for name in ("method", "stages", "width", "size_px")}
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--step-json: {file}: {error}") from None
    return dataclasses.replace(settings, **measured), step


def find_device(name: str | None) -> torch.device:
    """Return the named device, by default a GPU if any.

    Raises ValueError where the device cannot be used.
    """
    if name is None:
        return choose_device()

    # Only a tensor there shows that a device can be used.
    try:
        device = torch.device(name)
        if device.type not in MATRIX_SIDE:
            raise RuntimeError(f"expected {' or '.join(MATRIX_SIDE)}")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name} cannot be used ({format_error(error)})") from None
    return device


def resolve_precision(asked: Precision, device: torch.device) -> str:
    """Return the precision to measure; one that is chosen for the device is printed, with the reason."""
    choice = choose_precision(asked, judge_bfloat16(read_processor(device)))
    if asked == "auto":
        print(f"precision {choice}")
    return choice.name


def name_device(device: torch.device) -> str:
    """Return the name of a GPU, or `CPU`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def print_machine(device: torch.device) -> None:
    """Print what the figures below were measured on."""
    print(f"{name_device(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads")


def write_json(reports: Iterable[Any], device: torch.device, file: Path | None) -> None:
    """Write every figure of some reports, and the machine, to a file.

    Without a file, nothing is written.
    """
    if file is None:
        return

    # Each report by itself says what it was measured on.
    machine = {"torch": torch.__version__, "device": name_device(device)}
    plain = [machine | dataclasses.asdict(report) for report in reports]
    file.write_text(json.dumps(plain, indent=2, default=str))
