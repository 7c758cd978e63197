"""The command lines of the benchmarks that need only torch and numpy; building them needs neither.

An option's value has the name of the setting that it is (`StepSettings`, `DehazeSettings`).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

METHODS = ("pretrain", "colabator")
SIZES_PX = {"1080p": (1088, 1920), "12mp": (3008, 4000), "24mp": (4000, 6000)}
"""Names of sizes: height and width, multiples of 16."""

STEP = """\
Times training steps on random images, by part: teacher, global and local scores, pool, student, losses, backward,
optimizer and moving average. The scorers are those without weights; VGG-19 has random ones.

The floor says what the counted arithmetic would take at the measured rate of large matrix products, and what the
memory traffic would take at that of a copy if every operation had its own pass. Compiled code may need fewer."""

DEHAZE = """\
Times the restoration of photographs by a network with random weights: megapixels a second and the most memory, of the
GPU's tensors or of the whole process."""

EXAMPLES = """\
examples:
  {command} step --size 96 --stages 2                    a first look, half a minute on 2 cores
  {command} step --precision bf16 --compile --batch 2 --json step.json
  {command} step --method pretrain --trace step.json.gz  for chrome://tracing or ui.perfetto.dev
  {command} dehaze --sizes 1080p 12mp --memory-mib 2816"""


def add_core_benches(
    group: "argparse._SubParsersAction[argparse.ArgumentParser]", command: str
) -> list[argparse.ArgumentParser]:
    """Adds `step` and `dehaze` to the parsers of a command, which is named `command` in the examples."""
    raw = argparse.RawDescriptionHelpFormatter
    epilog = EXAMPLES.format(command=command)
    step = group.add_parser(
        "step", help="measure a training step", description=STEP, epilog=epilog, formatter_class=raw
    )
    step.add_argument("--method", choices=METHODS, default="colabator")
    step.add_argument(
        "--size", dest="size_px", type=multiple_of(32), default=288, metavar="PX", help="side of images (default 288)"
    )
    step.add_argument("--batch", type=at_least(1), default=1, metavar="B", help="images of each kind (default 1)")
    step.add_argument(
        "--wins",
        dest="win_rate",
        type=_share,
        default=0.1,
        metavar="SHARE",
        help="of the candidates; their blocks are rated (0.1)",
    )
    step.add_argument("--no-perceptual", dest="perceptual", action="store_false", help="leave VGG-19 out of the losses")
    step.add_argument("--checkpoint-activations", action="store_true", help="less memory, more time")
    step.add_argument("--trace", type=Path, metavar="FILE", help="also write a profiler's trace of one step")
    _add_common(step, repeats=10)
    dehaze = group.add_parser(
        "dehaze", help="measure the restoration of photographs", description=DEHAZE, epilog=epilog, formatter_class=raw
    )
    names = ", ".join(SIZES_PX)
    dehaze.add_argument(
        "--sizes",
        nargs="+",
        type=_size,
        default=[SIZES_PX["1080p"]],
        metavar="S",
        help=f"{names} or WIDTHxHEIGHT (default 1080p)",
    )
    dehaze.add_argument(
        "--memory-mib",
        type=at_least(1),
        metavar="M",
        help="for an image at work, else bands or tiles (default: whole)",
    )
    _add_common(dehaze, repeats=3)
    return [step, dehaze]


def _add_common(parser: argparse.ArgumentParser, repeats: int) -> None:
    parser.add_argument("--stages", type=at_least(2), default=4, metavar="K", help="of the network (default 4)")
    parser.add_argument("--width", type=at_least(2), default=30, metavar="W", help="of the network (default 30)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="by torch.compile; takes minutes at first")
    parser.add_argument("--repeats", type=at_least(1), default=repeats, metavar="N", help=f"(default {repeats})")
    parser.add_argument("--device", metavar="D", help="cpu, cuda or cuda:1 (default: cuda where there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure to a file")


def _size(text: str) -> tuple[int, int]:
    """`1080p` or `1920x1080` → height and width."""
    if text in SIZES_PX:
        return SIZES_PX[text]
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and min(int(width), int(height)) >= 16):
        expected = f"{', '.join(SIZES_PX)} or WIDTHxHEIGHT of 16 px and more"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
    return int(height), int(width)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {text}")
    return value


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option: a whole number, `least` or more."""

    def whole(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is too few (at least {least})")
        return int(text)

    whole.__name__ = "whole number"
    return whole


def multiple_of(divisor: int) -> Callable[[str], int]:
    """The type of an option: a whole number that `divisor` divides."""

    def whole(text: str) -> int:
        if int(text) <= 0 or int(text) % divisor:
            raise argparse.ArgumentTypeError(f"expected a multiple of {divisor}, got {text}")
        return int(text)

    whole.__name__ = "whole number"
    return whole
