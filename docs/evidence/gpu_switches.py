"""Compare our Colabator step with each of its switches for GPUs and without any, by turns, from bytes to new weights.

    python docs/evidence/gpu_switches.py --device cuda --precision bf16
    python docs/evidence/gpu_switches.py --steps 3 --warm 2 --size 64       # without a GPU: proves the script

CORUN has 4 stages and width 30; DA-CLIP, MUSIQ and VGG-19 have their true size and random weights. Switches are
`copies` (the next batch is copied while a step runs, as every job on a GPU does), `stream` (teacher and scorers beside
the student) and `graphs` (scorers as CUDA graphs), of `coherence.gpu`, and `fp32`, `fp16` and `bf16`, of
`coherence.precision`. Joined by + they are on together.

Prints a Markdown table. Losses say how far a switch moves the numbers of a step. Without a GPU stand-ins take its
part: all runs in one stream, and a graph is a call on memory of its own.
"""

import argparse
import contextlib
import copy
import json
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lazy_coherence import COLABATOR_WEIGHTS, EMA, LR, MUSIQ_FILE, ROOT, make_batch, make_images, write_weights
from torch import Tensor

from corun_ray.bench.machine import time_call, track_peak_memory
from corun_ray.core.data.images import decode_image
from corun_ray.core.networks.corun import CORUN
from corun_ray.core.scoring.arithmetic import Capture, CudaCapture, Function
from corun_ray.core.scoring.coherence import Coherence
from corun_ray.core.scoring.daclip import DACLIP_FILE, load_daclip
from corun_ray.core.scoring.quality import load_quality
from corun_ray.core.training.labels import LocalPool
from corun_ray.core.training.losses import VGG_FILE, Losses, Vgg19Features, load_vgg19
from corun_ray.core.training.state import TrainState
from corun_ray.core.training.steps import Colabator
from corun_ray.core.training.streams import Columns, SideStream, copy_ahead, open_stream

PRECISIONS = ("fp32", "fp16", "bf16")
SWITCHES = ("copies", "stream", "graphs", *PRECISIONS)
NONE = "no switch"
ASKED = ("copies", "stream", "graphs", "copies+stream+graphs", *PRECISIONS)


class OneStream:
    """Stands for a second stream on a device that has one alone: all is done at once."""

    def use(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def follow(self) -> None: ...

    def mark(self) -> None: ...

    def join(self, mark: None) -> None: ...

    def borrow(self, tensors: Iterable[Tensor]) -> None: ...

    def lend(self, tensors: Iterable[Tensor]) -> None: ...

    def copy(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.copy())


def capture_by_copy(function: Function, images: Tensor) -> Function:
    """Stand for the capture of a CUDA graph: call the function on memory of its own."""
    given = images.clone()

    def replay(images: Tensor) -> Tensor:
        return function(given.copy_(images))

    return replay


@dataclass
class Way:
    """A training of its own with some switches on, and what was measured of it."""

    name: str
    state: TrainState
    colabator: Colabator
    batches: Iterator[Columns]
    times_s: list[float] = field(default_factory=list)
    peaks_mib: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def take_step(self, device: torch.device, precision: str) -> None:
        """Take a step, from the batch's bytes on the host."""
        synthetic, real = make_batch(next(self.batches), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = self.colabator.step(self.state.student, synthetic, real, self.state.step)
        self.state.backward(output.losses)
        self.state.update(LR, EMA, 1)
        self.losses.append(float(sum(loss.item() for loss in output.losses.values())))


def main() -> None:
    """Load the networks, run all ways by turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--switches", nargs="+", default=ASKED, help=f"of {', '.join(SWITCHES)}, joined by +")
    parser.add_argument("--steps", type=int, default=23, help="of each way, more than --warm")
    parser.add_argument("--warm", type=int, default=8, help="first steps that are not counted")
    parser.add_argument("--size", type=int, default=288, help="side of the image in pixels, a multiple of 32")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of student and teacher")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--image", type=Path, default=ROOT / "tests/data/fade/lhd_4.png")
    parser.add_argument("--daclip-keys", type=Path, default=ROOT / "tests/data/daclip/daclip_keys.json")
    arguments = parser.parse_args()
    if not 1 <= arguments.warm < arguments.steps:
        parser.error("--steps: more than --warm expected, and --warm at least 1")
    unknown = {one for switches in arguments.switches for one in switches.split("+")} - {*SWITCHES}
    if unknown:
        parser.error(f"--switches: {', '.join(sorted(unknown))}: expected some of {', '.join(SWITCHES)}")

    # All ways see the same batches, which are made before anything is timed.
    photograph, rng = decode_image(arguments.image.read_bytes()), np.random.default_rng(0)
    batches = [make_images(photograph, arguments.size, rng) for _ in range(arguments.steps)]

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder), json.loads(arguments.daclip_keys.read_text()))
        scorers = load_daclip(Path(folder) / DACLIP_FILE), load_quality("musiq", lambda name: Path(folder) / MUSIQ_FILE)
        features = load_vgg19(Path(folder) / VGG_FILE).to(arguments.device)
    coherence = Coherence(*(scorer.to(arguments.device) for scorer in scorers))

    network = CORUN(stages=4, width=30)
    ways = []
    for name in (NONE, *arguments.switches):
        ways.append(build_way(name, copy.deepcopy(network), coherence, features, batches, arguments.device))
    measure(ways, arguments)
    figures = summarise(ways, arguments.warm)
    print_table(figures)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1))


def build_way(
    name: str,
    network: CORUN,
    coherence: Coherence,
    features: Vgg19Features,
    batches: list[Columns],
    device: torch.device,
) -> Way:
    """Build a training with the switches that `name` joins by +."""
    switches = set(name.split("+")) & {*SWITCHES}
    coherence = set_up_scorers(coherence, switches, CudaCapture(device) if device.type == "cuda" else capture_by_copy)
    state = TrainState.start(network, device)
    losses = Losses(COLABATOR_WEIGHTS, features)
    side = open_side(device) if "stream" in switches else None
    colabator = Colabator(state.teacher, coherence, LocalPool(), losses, side=side)
    return Way(name, state, colabator, copy_ahead(iter(batches), open_side(device) if "copies" in switches else None))


def open_side(device: torch.device) -> SideStream:
    """Open a second stream, or what stands for it."""
    return open_stream(device) or OneStream()


def set_up_scorers(coherence: Coherence, switches: set[str], capture: Capture) -> Coherence:
    """Return scorers with their switches on: copies, since other ways have them off."""
    precisions = [one for one in PRECISIONS if one in switches]
    if not precisions and "graphs" not in switches:
        return coherence

    scorers: list[Any] = [copy.deepcopy(coherence.clarity), copy.deepcopy(coherence.quality)]
    for scorer in scorers:
        if precisions:
            scorer.precision = precisions[0]
        if "graphs" in switches:
            scorer.use_graphs(capture)
    return Coherence(*scorers)


def measure(ways: list[Way], arguments: argparse.Namespace) -> None:
    """Take the steps of all ways by turns, each step in another order."""
    device = arguments.device
    for step in range(arguments.steps):
        turn = step % len(ways)
        for way in ways[turn:] + ways[:turn]:
            kept_bytes = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            with track_peak_memory(device) as read_peak_bytes:
                way.times_s.append(time_call(lambda way=way: way.take_step(device, arguments.precision), device))
                way.peaks_mib.append((read_peak_bytes() - kept_bytes) / 2**20)


def summarise(ways: list[Way], warm: int) -> dict[str, dict[str, float]]:
    """Return for each way: the median of the steps after the first ones, memory, and how far its losses are moved.

    Losses are compared with those without a switch, in parts of their sum, at the first step, where the weights are the
    same, and in the mean of all steps.
    """
    plain = np.array(ways[0].losses)
    figures = {}
    for way in ways:
        moved = np.abs(np.array(way.losses) / plain - 1)
        figures[way.name] = {
            "step_s": statistics.median(way.times_s[warm:]),
            "mib": statistics.median(way.peaks_mib[warm:]),
            "first_loss_moved": float(moved[0]),
            "losses_moved": float(moved.mean()),
        }
    return figures


def print_table(figures: dict[str, dict[str, float]]) -> None:
    """Print the ways, the one without switches first."""
    print("| with | ms | times as fast | MiB | first loss moved | losses moved |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, found in figures.items():
        ratio = figures[NONE]["step_s"] / found["step_s"]
        moved = f"{found['first_loss_moved']:.1g} | {found['losses_moved']:.1g}"
        print(f"| {name} | {1000 * found['step_s']:.1f} | {ratio:.2f} | {found['mib']:.0f} | {moved} |")


if __name__ == "__main__":
    main()
