"""The command lines of the benchmarks that need only torch and numpy; building them needs neither.

An option's value has the name of the setting that it is (`StepSettings`, `DehazeSettings`, `ScalingSettings`).
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

METHODS = ("pretrain", "colabator")
LINK_HELP = "between nodes, all cards of a node together; a table each (25 100 200)"
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

SCALING = """\
Works out what a training step would take on many GPUs, from what it takes on one: DDP's buckets of gradients in rings
and trees behind the backward pass, the label pool's answers behind the teacher's time, and the wait for the worker that
has most blocks to rate. Tells what costs most and which key of a job helps. The formulae are in
corun_ray.bench.scaling_model.

The step is --step-s with the shares of a CPU's, or a measured one. Links are taken for what they carry: give a measured
bandwidth, such as nccl-tests' bus bandwidth, for a forecast, the nominal one for a bound.

Then it measures gloo's all-reduce between processes of this machine and a backward pass with and without it, beside
what the same formulae say (a minute on 2 cores; --no-check leaves it out)."""

EXAMPLES = """\
examples:
  {command} step --size 96 --stages 2                    a first look, half a minute on 2 cores
  {command} step --precision bf16 --compile --batch 2 --json step.json
  {command} step --method pretrain --trace step.json.gz  for chrome://tracing or ui.perfetto.dev
  {command} dehaze --sizes 1080p 12mp --memory-mib 2816
  {command} scaling --step-s 0.3 --gpus 8 64 512 --link-gbit 100
  {command} scaling --step-json step.json --shards 8     the step that bench step measured"""


def add_core_benches(
    group: "argparse._SubParsersAction[argparse.ArgumentParser]", command: str
) -> list[argparse.ArgumentParser]:
    """Adds `step`, `dehaze` and `scaling` to the parsers of a command, which is named `command` in the examples."""
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
    _add_common(step, "step", repeats=10)
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
    _add_common(dehaze, "dehaze", repeats=3)
    return [step, dehaze, _add_scaling(group, epilog)]


def _add_scaling(group: "argparse._SubParsersAction[argparse.ArgumentParser]", epilog: str) -> argparse.ArgumentParser:
    scaling = group.add_parser(
        "scaling",
        help="work out a step on many GPUs",
        description=SCALING,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = scaling.add_argument
    step = scaling.add_mutually_exclusive_group()
    step.add_argument("--step-s", type=_above_0, default=0.3, metavar="S", help="on one GPU, candidates lose (0.3)")
    step.add_argument("--step-json", type=Path, metavar="FILE", help="of bench step --json: the step, by part")
    add("--rating-s", type=_above_0, metavar="S", help="what rating an image's blocks adds (0.9 of the step)")
    add("--method", choices=METHODS, default="colabator")
    add("--batch", type=at_least(1), default=1, metavar="B", help="images of each kind and GPU in a step (1)")
    add("--gpus", type=at_least(1), nargs="+", default=[8, 64, 512], metavar="N", help="(default 8 64 512)")
    add("--gpus-per-node", type=at_least(1), default=8, metavar="N", help="(default 8)")
    add("--link-gbit", type=_above_0, nargs="+", default=[25, 100, 200], metavar="G", help=LINK_HELP)
    add(
        "--link-latency-us",
        type=_above_0,
        default=14,
        metavar="US",
        help="a message between nodes (14, as NCCL counts)",
    )
    add("--node-gbit", type=_above_0, default=1880, metavar="G", help="within a node (1880: NCCL's for A100s)")
    add("--node-latency-us", type=_above_0, default=4, metavar="US", help="(default 4, as NCCL counts)")
    add("--stages", type=at_least(2), default=4, metavar="K", help="of the network (default 4)")
    add("--width", type=at_least(2), default=30, metavar="W", help="of the network (default 30)")
    add("--size", dest="size_px", type=multiple_of(32), default=288, metavar="PX", help="side of labels (default 288)")
    add("--encoding", choices=("uint8", "float16", "float32"), default="uint8", help="pool.encoding (default uint8)")
    add("--shards", type=at_least(1), default=1, metavar="S", help="pool.shards (default 1)")
    add("--wins", dest="win_rate", type=_share, default=0.1, metavar="SHARE", help="of the candidates (default 0.1)")
    add("--share-blocks", action="store_true", help="as with coherence.share_blocks")
    add("--samples-per-s", type=_above_0, default=36, metavar="R", help="a core's, of bench stream (default 36)")
    add("--no-check", dest="check", action="store_false", help="measure nothing")
    add("--processes", type=at_least(2), nargs="+", default=[2, 4], metavar="N", help="of the check (default 2 4)")
    add("--repeats", type=at_least(1), default=10, metavar="N", help="of the check (default 10)")
    add("--json", type=Path, metavar="FILE", help="also write every figure to a file")
    scaling.set_defaults(part="scaling", device="cpu")
    return scaling


def _add_common(parser: argparse.ArgumentParser, part: str, repeats: int) -> None:
    parser.set_defaults(part=part)
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


def _above_0(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
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
