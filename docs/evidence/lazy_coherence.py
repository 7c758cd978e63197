"""Compare the cost of a Colabator step in the published eager order with ours, on one image.

Both orders run by turns from the same weights on the same batches: CORUN of 4 stages and width 30, DA-CLIP
(ViT-B/32), MUSIQ and VGG-19 of the true size with random weights, one synthetic and one real image a step.
Prints a Markdown table:

    python docs/evidence/lazy_coherence.py --steps 50 --image tests/data/fade/lhd_4.png
    python docs/evidence/lazy_coherence.py --steps 7 --warm 3 --size 288 --plain --precision bf16

The second command compares the whole published step, including its plain network, with ours once the pool is warm.
`--json` also writes the figures: medians, the memory that a step takes beside what stays, and our step by part.

The eager order is that of the published code of arXiv 2406.07966. It rates every candidate's blocks before it decides,
computes features again for every term that needs them, and rates both restorations once more for a logged number.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from corun_ray.bench.machine import time_call, track_peak_memory
from corun_ray.core.data.depth import DepthMap
from corun_ray.core.data.haze import HazeRange
from corun_ray.core.data.images import decode_image
from corun_ray.core.data.samples import make_real_views, make_synthetic_pair
from corun_ray.core.networks.corun import CORUN, Restoration
from corun_ray.core.scoring.coherence import BlockScores, Coherence
from corun_ray.core.scoring.daclip import DACLIP_FILE, load_daclip
from corun_ray.core.scoring.quality import load_quality
from corun_ray.core.timing import SpanTimes
from corun_ray.core.training.acceleration import compile_network
from corun_ray.core.training.labels import Label, LocalPool, Scores, decode, encode
from corun_ray.core.training.losses import (
    COLABATOR_WEIGHTS,
    VGG_FILE,
    Losses,
    Vgg19Features,
    compute_contrastive,
    compute_perceptual,
    load_vgg19,
)
from corun_ray.core.training.state import TrainState
from corun_ray.core.training.steps import Colabator, RealBatch, SyntheticBatch
from corun_ray.core.training.streams import Columns

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.core.networks.plain_corun import PlainCORUN

ROOT = Path(__file__).parents[2]
KEY = "photograph"
MUSIQ_FILE = "musiq_koniq_ckpt-e95806b9.pth"
LR, EMA = 5e-5, 0.999
TIMED_STEPS = 3
"""Steps of ours whose parts are timed, after all others."""


@dataclass(frozen=True)
class EagerOrder:
    """The published step for batches of one image, made of the parts of `corun_ray.core`."""

    teacher: nn.Module
    coherence: Coherence
    features: Vgg19Features
    pool: LocalPool = field(default_factory=LocalPool)

    def step(
        self, student: nn.Module, synthetic: SyntheticBatch, real: RealBatch, step: int
    ) -> tuple[dict[str, Tensor], bool]:
        """Run one step up to its losses.

        Returns the losses, and whether the teacher's candidate became the label.
        """
        restored = student(synthetic.hazy)
        with torch.no_grad():
            candidate = self.teacher(real.weak)
        on_real = student(real.strong)
        label, trust, won = self.rate_then_decide(candidate, real.weak, step)

        # The published code rates both restorations without a gradient: the scores are only logged.
        with torch.no_grad():
            for scene in (restored.scene, on_real.scene):
                self.coherence.clarity(scene.clamp(0, 1))

        # All losses without features, then the two with features, which are computed again for every term.
        plain = Losses(replace(COLABATOR_WEIGHTS, perceptual=0, contrastive=0))
        losses = plain.compute_colabator(restored, synthetic.clear, on_real, real.strong, label, trust)
        vgg, weights = self.features, COLABATOR_WEIGHTS
        similar = compute_perceptual(vgg, vgg(restored.scene.clamp(0, 1)), vgg(synthetic.clear))
        contrasted = compute_contrastive(vgg, vgg(on_real.scene), vgg(label), vgg(real.strong))
        return losses | {"perceptual": weights.perceptual * similar, "contrastive": contrasted}, won

    def rate_then_decide(self, candidate: Restoration, hazy: Tensor, step: int) -> tuple[Tensor, Tensor, bool]:
        """Rate a candidate for a hazy image with its blocks, then offer it to the pool.

        Returns J* and w* of the label that the pool then holds, and whether that label is the candidate.
        """
        scene = candidate.scene.clamp(0, 1)
        blocks = self.coherence.score_blocks(scene, hazy)
        rated = self.coherence.score_images(scene, hazy)
        scores = Scores(rated.clarity.item(), rated.quality.item())

        # Offer the candidate.
        assert candidate.transmission is not None
        label, transmission = (encode(unit[0].cpu().numpy(), "uint8") for unit in (scene, candidate.transmission))
        clarity, quality = blocks.clarity[0].cpu().numpy(), blocks.quality[0].cpu().numpy()
        new = Label(KEY, scores, step, label, transmission, clarity, quality)
        self.pool.offer([new])

        # Take the label that the pool now holds, and build its trust map.
        kept = self.pool.labels[KEY]
        kept_blocks = BlockScores(*(torch.from_numpy(s)[None] for s in (kept.block_clarity, kept.block_quality)))
        trust = self.coherence.build_trust_map(kept_blocks, *scene.shape[-2:])
        return torch.from_numpy(decode(kept.scene))[None].to(hazy.device), trust.to(hazy.device), kept is new


def main() -> None:
    """Write random weights, load the networks and measure both orders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="more than --warm")
    parser.add_argument("--warm", type=int, default=1, help="first steps that are not counted, at least 1")
    parser.add_argument("--size", type=int, default=96, help="side of the image in pixels, a multiple of 32")
    parser.add_argument("--plain", action="store_true", help="the eager order runs the plain form of the network")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of our order's network")
    parser.add_argument("--compile", action="store_true", help="compile our order's networks")
    parser.add_argument("--cuda-graphs", action="store_true", help="replay them as CUDA graphs; with --compile")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--image", type=Path, default=ROOT / "tests/data/fade/lhd_4.png")
    parser.add_argument("--daclip-keys", type=Path, default=ROOT / "tests/data/daclip/daclip_keys.json")
    arguments = parser.parse_args()
    if not 1 <= arguments.warm < arguments.steps:
        parser.error("--steps: more than --warm expected, and --warm at least 1")

    photograph = decode_image(arguments.image.read_bytes())
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder), json.loads(arguments.daclip_keys.read_text()))
        clarity = load_daclip(Path(folder) / DACLIP_FILE)
        quality = load_quality("musiq", lambda name: Path(folder) / name)
        features = load_vgg19(Path(folder) / VGG_FILE)
        coherence = Coherence(clarity.to(arguments.device), quality.to(arguments.device))
        measure(photograph, coherence, features.to(arguments.device), arguments)


class PlainNetwork(nn.Module):
    """The plain form of a network, with its weights."""

    def __init__(self, network: CORUN) -> None:
        super().__init__()
        self.plain = PlainCORUN(network.stages, network.width)
        self.plain.load_state_dict(network.state_dict())

    def forward(self, hazy: Tensor) -> Restoration:
        return Restoration(*self.plain(hazy)[-1])


def measure(
    photograph: np.ndarray, coherence: Coherence, features: Vgg19Features, arguments: argparse.Namespace
) -> None:
    """Run both orders by turns, step by step; print the table."""
    # Both orders start from the same weights, each with a state of its own.
    network, steps, device = CORUN(stages=4, width=30), arguments.steps, arguments.device
    published = PlainNetwork(network) if arguments.plain else copy.deepcopy(network)
    states = [TrainState.start(published, device), TrainState.start(network, device)]
    student, teacher = states[1].student, states[1].teacher
    if arguments.compile:
        student = compile_network(student, arguments.cuda_graphs)
        teacher = compile_network(teacher, arguments.cuda_graphs)
    eager = EagerOrder(states[0].teacher, coherence, features)
    lazy = Colabator(teacher, coherence, LocalPool(), Losses(COLABATOR_WEIGHTS, features))

    rng = np.random.default_rng(0)
    times_s: list[list[float]] = [[], []]
    peaks_bytes: list[list[int]] = [[], []]
    wins: list[list[bool]] = [[], []]
    saved = 0

    def step_eagerly() -> None:
        """Take one step in the published order."""
        losses, won = eager.step(states[0].student, synthetic, real, step)
        states[0].backward(losses)
        states[0].update(LR, EMA, 1)
        wins[0].append(won)

    def step_lazily() -> None:
        """Take one step in our order."""
        nonlocal saved
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16"):
            output = lazy.step(student, synthetic, real, step)
        states[1].backward(output.losses)
        states[1].update(LR, EMA, 1)
        assert output.labels is not None
        wins[1] += output.labels.from_teacher
        saved += output.labels.block_ratings_saved

    # Each order goes first every other time.
    orders = (step_eagerly, step_lazily)
    for step in range(steps):
        synthetic, real = make_batch(make_images(photograph, arguments.size, rng), device)
        for which in (0, 1) if step % 2 else (1, 0):
            kept_bytes = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            with track_peak_memory(device) as read_peak_bytes:
                times_s[which].append(time_call(orders[which], device))
                peaks_bytes[which].append(read_peak_bytes() - kept_bytes)

    total = steps * (arguments.size // coherence.block_px) ** 2
    # The first steps also allocate memory and the optimizer's state, and fill the pool.
    counted = [times[arguments.warm :] for times in times_s]
    print_table(counted, arguments.warm, total, saved)

    same = sum(a == b for a, b in zip(*wins, strict=True))
    print(f"\n{same} of {steps} decisions were the same, {sum(wins[1])} of ours for the candidate.")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads on {os.cpu_count()} cores")
    if arguments.json is None:
        return
    share_saved = saved / total

    # A few more steps of ours, part by part.
    times = SpanTimes(device)
    with times.listen():
        for _ in range(TIMED_STEPS):
            step_lazily()
    parts_s = {name: total_s / TIMED_STEPS for name, total_s in times.seconds.items()}
    memory_mib = [statistics.median(peaks[arguments.warm :]) / 2**20 for peaks in peaks_bytes]
    figures = {
        "published_s": statistics.median(counted[0]),
        "ours_s": statistics.median(counted[1]),
        "published_mib": memory_mib[0],
        "ours_mib": memory_mib[1],
        "parts_s": parts_s,
        "block_ratings_saved": share_saved,
        "same_decisions": same / steps,
    }
    arguments.json.write_text(json.dumps(figures, indent=1))


def print_table(times_s: list[list[float]], warm: int, total: int, saved: int) -> None:
    """Print the times of both orders, their ratio and the block ratings saved."""
    medians = [statistics.median(times) for times in times_s]
    print(f"\n| order | median of steps {warm + 1} to {len(times_s[0]) + warm} | mean | block ratings |")
    print("| --- | --- | --- | --- |")
    for name, times, median, ratings in zip(("eager", "ours"), times_s, medians, (total, total - saved), strict=True):
        print(f"| {name} | {median:.2f} s | {statistics.mean(times):.2f} s | {ratings} |")

    ratio = statistics.mean(times_s[0]) / statistics.mean(times_s[1])
    print(f"| ratio, saved | {medians[0] / medians[1]:.2f} | {ratio:.2f} | {saved} ({saved / total:.0%}) |")


def make_images(photograph: np.ndarray, side_px: int, rng: np.random.Generator) -> dict[str, np.ndarray | Tensor]:
    """Make one synthetic and one real image, as the stream makes them: `1 H W C` uint8 by name, on the host.

    The depth is a ramp from the upper to the lower edge.
    """
    height_px, width_px = photograph.shape[:2]
    ramp = np.repeat(np.linspace(0, 1, height_px, dtype=np.float32)[:, None], width_px, 1)

    pair = make_synthetic_pair(
        photograph,
        DepthMap.from_pixels(ramp, "inverse"),
        rng,
        patch_px=side_px,
        haze_range=HazeRange(),
        random_resize=True,
    )
    views = make_real_views(photograph, rng, patch_px=side_px, jpeg_quality=pair.jpeg_quality)
    images = {"hazy": pair.hazy, "clear": pair.clear, "weak": views.weak, "strong": views.strong}
    return {name: image[None] for name, image in images.items()}


def make_batch(images: Columns, device: torch.device) -> tuple[SyntheticBatch, RealBatch]:
    """Make a batch of images that are on the host, or on the device already."""
    batches = []
    for name in ("hazy", "clear", "weak", "strong"):
        image = images[name]
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(image.copy()).to(device)
        # B H W C bytes to B C H W in [0, 1].
        batches.append(image.permute(0, 3, 1, 2) / 255)
    hazy, clear, weak, strong = batches
    return SyntheticBatch(hazy, clear), RealBatch(weak, strong, [KEY])


def write_weights(folder: Path, daclip_shapes: dict[str, list[int]]) -> None:
    """Write random weights of the true shapes under the published names."""
    from pyiqa.archs.musiq_arch import MUSIQ

    # The frozen visual tower takes no part in scoring, so it need not be written.
    scoring = {name: shape for name, shape in daclip_shapes.items() if not name.startswith("clip.visual.")}
    torch.save({name: random_weight(name, shape) for name, shape in scoring.items()}, folder / DACLIP_FILE)

    vgg = {name: random_weight(name, list(w.shape), gain=2**0.5) for name, w in Vgg19Features().state_dict().items()}
    torch.save(vgg, folder / VGG_FILE)

    # Scores as far apart as those of photographs, in the middle of the scale.
    musiq = MUSIQ(pretrained=False)
    nn.init.normal_(musiq.head.weight, std=0.5)
    nn.init.constant_(musiq.head.bias, 50.0)
    torch.save(musiq.state_dict(), folder / MUSIQ_FILE)


def random_weight(name: str, shape: list[int], gain: float = 1.0) -> Tensor:
    """Draw a random weight.

    A scale is 1 and a bias is small. Other weights keep the variance of a layer's input.
    """
    if len(shape) > 1:
        return gain * torch.randn(shape) / float(np.prod(shape[1:])) ** 0.5
    return torch.ones(shape) if name.endswith("weight") or not shape else 0.01 * torch.randn(shape)


if __name__ == "__main__":
    main()
