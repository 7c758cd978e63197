"""Times the training step and the restoration of photographs, and scales the step to many GPUs.

Torch and numpy are enough: `python -m corun_ray bench step` runs on a bare GPU machine.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import torch

from corun_ray.bench.dehaze import DehazeReport, DehazeSettings, bench_dehaze
from corun_ray.bench.machine import MATRIX_SIDE
from corun_ray.bench.scaling import ScalingReport, ScalingSettings, assumed_step, bench_scaling, measured_step
from corun_ray.bench.step import StepReport, StepSettings, bench_step
from corun_ray.bench.tables import dehaze_table, scaling_table, step_table


def run(args: argparse.Namespace) -> None:
    """Measures what `args` of `bench_options` ask for and prints it as a table; `--json` is written too.

    Raises ValueError where that cannot be had: a device, a network, an image that does not fit into the memory.
    """
    args = argparse.Namespace(**{**vars(args), "device": _device(args.device)})
    measure, table = PARTS[args.part]
    reports = measure(args)
    print(f"{_device_name(args.device)}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for report in reports:
        print(table(report))
    if args.json:
        about = {"torch": torch.__version__, "device": _device_name(args.device)}
        plain = [about | dataclasses.asdict(report) for report in reports]
        args.json.write_text(json.dumps(plain, indent=2, default=str))


def _step(args: argparse.Namespace) -> list[StepReport]:
    return [bench_step(StepSettings(**_options(args, StepSettings)), trace=args.trace)]


def _dehaze(args: argparse.Namespace) -> list[DehazeReport]:
    options = _options(args, DehazeSettings)
    return [bench_dehaze(DehazeSettings(height_px=height, width_px=width, **options)) for height, width in args.sizes]


def _scaling(args: argparse.Namespace) -> list[ScalingReport]:
    options = _options(args, ScalingSettings)
    if args.step_json is None:
        alone = assumed_step(args.step_s, args.batch, args.rating_s)
    else:
        try:
            (measured,) = json.loads(args.step_json.read_text())
            alone = measured_step(measured, args.rating_s)
            options |= {name: measured["settings"][name] for name in ("method", "stages", "width", "size_px")}
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"--step-json: {args.step_json}: {error}") from None
    return [bench_scaling(ScalingSettings(**options), alone, args.check)]


PARTS: dict[str, tuple[Callable[[argparse.Namespace], list[Any]], Callable[[Any], str]]] = {
    "step": (_step, step_table),
    "dehaze": (_dehaze, dehaze_table),
    "scaling": (_scaling, scaling_table),
}


def _options(args: argparse.Namespace, settings: type) -> dict[str, Any]:
    """Those that have a field of their name."""
    names = {field.name for field in dataclasses.fields(settings)}
    return {name: value for name, value in vars(args).items() if name in names}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in MATRIX_SIDE:
            raise RuntimeError(f"expected {' or '.join(MATRIX_SIDE)}")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name} cannot be used ({str(error).splitlines()[0]})") from None
    return device
