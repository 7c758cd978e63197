"""`python -m corun_ray.core.bench`: times the training step and the restoration of photographs, with torch alone."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from corun_ray.core.bench_dehaze import DehazeReport, DehazeSettings, bench_dehaze
from corun_ray.core.bench_options import add_core_benches
from corun_ray.core.bench_step import StepReport, StepSettings, bench_step
from corun_ray.core.bench_tables import dehaze_table, step_table


def run(args: argparse.Namespace, say: Callable[[str], object] = print) -> None:
    """Measures what `args` of `bench_options` ask for and says it as a table; `--json` is written too.

    Raises ValueError where that cannot be had: a device, a network, an image that does not fit into the memory.
    """
    device = _device(args.device)
    reports = [_step(args, device)] if hasattr(args, "method") else _dehaze(args, device)
    say(f"{_device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for report in reports:
        say(step_table(report) if isinstance(report, StepReport) else dehaze_table(report))
    if args.json:
        args.json.write_text(json.dumps([_plain(report) for report in reports], indent=2, default=str))


def _step(args: argparse.Namespace, device: torch.device) -> StepReport:
    settings = StepSettings(
        method=args.method,
        size_px=args.size,
        batch=args.batch,
        stages=args.stages,
        width=args.width,
        precision=args.precision,
        compile=args.compile,
        perceptual=not args.no_perceptual,
        win_rate=args.wins,
        checkpoint_activations=args.checkpoint_activations,
        repeats=args.repeats,
        device=device,
    )
    return bench_step(settings, trace=args.trace)


def _dehaze(args: argparse.Namespace, device: torch.device) -> list[DehazeReport]:
    sizes = [
        DehazeSettings(
            height_px=height_px,
            width_px=width_px,
            stages=args.stages,
            width=args.width,
            precision=args.precision,
            compile=args.compile,
            memory_mib=args.memory_mib,
            repeats=args.repeats,
            device=device,
        )
        for height_px, width_px in args.sizes
    ]
    return [bench_dehaze(size) for size in sizes]


def _plain(report: Any) -> dict[str, Any]:
    return {"torch": torch.__version__, "device": _device_name(report.settings.device), **dataclasses.asdict(report)}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name} cannot be used ({str(error).splitlines()[0]})") from None
    return device


def main(arguments: Sequence[str] | None = None) -> int:
    """The command of this module."""
    command = "python -m corun_ray.core.bench"
    parser = argparse.ArgumentParser(prog=command, description=__doc__)
    add_core_benches(parser.add_subparsers(title="commands", metavar="COMMAND", required=True), command)
    args = parser.parse_args(arguments)
    try:
        run(args)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
