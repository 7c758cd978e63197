"""Measure what each part of Colabator is worth, on rendered photographs with hidden truth.

Every way continues from the same model, for the same number of steps, on the same draws of a seed. The control
continues on synthetic pairs alone. `DEMO` is a folder of `corun-ray demo`, `MODEL` a checkpoint, a plain model folder
or a .pth. Prints one line for each way and seed, and writes every image's values to `OUT` (.json):

    corun-ray demo demo
    python docs/evidence/colabator_parts.py demo MODEL parts.json --steps 60 --seeds 0 1 2
"""

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from corun_ray.core.data.augment import CAMERA_FAULTS
from corun_ray.core.data.depth import DepthMap
from corun_ray.core.data.haze import HazeRange
from corun_ray.core.data.images import ImageU8, decode_image
from corun_ray.core.data.samples import make_real_views, make_synthetic_pair
from corun_ray.core.inference.restore import restore
from corun_ray.core.metrics.fade import fade
from corun_ray.core.metrics.measure import psnr, ssim
from corun_ray.core.networks.corun import CORUN
from corun_ray.core.scoring.coherence import BlockScores, Coherence, GlobalScores
from corun_ray.core.scoring.reference import ReferenceCoherence
from corun_ray.core.scoring.scorers import CLARITY_SCORERS, DEFAULT_CLARITY
from corun_ray.core.training.checkpoints import load_network
from corun_ray.core.training.labels import Label, LocalPool, ReadyLabels
from corun_ray.core.training.losses import COLABATOR_WEIGHTS, LaplacianFeatures, Losses, LossWeights
from corun_ray.core.training.state import Cycle, TrainState, compute_learning_rate
from corun_ray.core.training.steps import Colabator, RealBatch, SyntheticBatch, run_pretraining_step
from corun_ray.service.models.sources import SHIPPED_FOLDER

HAZE = HazeRange(beta=(0.1, 1.6), airlight=(0.65, 1.0), nearest=(0.0, 0.25))
BATCH = 2
"""Synthetic and real images of a step, each."""
LOSSES = replace(COLABATOR_WEIGHTS, contrastive=0.0, perceptual=0.0, transmission=1.0)


@dataclass(frozen=True)
class Way:
    """One setting of Colabator, or the control."""

    control: bool = False
    pool: bool = True
    by: Literal["contrast and clean", "clarity", "reference", "truth"] = "contrast and clean"
    """What rates candidates. By `clarity`, contrast takes the place of cleanness too: one score decides."""
    trust: bool = True
    strong: bool = True
    weights: LossWeights = LOSSES
    ema: float = 0.97
    lr: float = 1e-4
    patch_px: int = 96


WAYS: dict[str, Way] = {
    "control": Way(control=True),
    "colabator": Way(),
    "last candidate, no pool": Way(pool=False),
    "clarity alone": Way(by="clarity"),
    "rated by corun-small": Way(by="reference"),
    "rated by the truth": Way(by="truth"),
    "no trust map": Way(trust=False),
    "no strong view": Way(strong=False),
    "contrastive 0.1": Way(weights=replace(LOSSES, contrastive=0.1)),
    "contrastive 1": Way(weights=replace(LOSSES, contrastive=1.0)),
    "decay 0.9": Way(ema=0.9),
    "decay 0.99": Way(ema=0.99),
    "control, decay 0.99": Way(control=True, ema=0.99),
    "lr 5e-5": Way(lr=5e-5),
    "control, lr 5e-5": Way(control=True, lr=5e-5),
    "lr 2e-4": Way(lr=2e-4),
    "control, lr 2e-4": Way(control=True, lr=2e-4),
}


class Data:
    """The demo in memory."""

    def __init__(self, folder: Path) -> None:
        self.clear: list[tuple[ImageU8, DepthMap]] = []
        for path in sorted((folder / "clear").iterdir()):
            depth_file = folder / "depth" / f"{path.stem}.png"
            depth = cv2.imread(str(depth_file), cv2.IMREAD_UNCHANGED)
            assert depth is not None
            self.clear.append((read(path), DepthMap.from_pixels(depth, "inverse")))

        self.names, self.hazy, self.truth = [], [], []
        for path in sorted((folder / "hazy").iterdir()):
            truth = next((folder / "hazy_truth").glob(f"{path.stem}.*"))
            self.names.append(path.stem)
            self.hazy.append(read(path))
            self.truth.append(read(truth))

    def draw_synthetic(self, rng: np.random.Generator, patch_px: int) -> SyntheticBatch:
        """Draw hazy patches of clear images."""
        hazy, clear, transmission = [], [], []
        for index in rng.choice(len(self.clear), BATCH, replace=False):
            image, depth = self.clear[index]
            pair = make_synthetic_pair(
                image,
                depth,
                rng,
                patch_px=patch_px,
                haze_range=HAZE,
                random_resize=True,
                camera_faults=CAMERA_FAULTS["mild"],
                with_transmission=True,
            )
            assert pair.transmission is not None
            hazy.append(pair.hazy)
            clear.append(pair.clear)
            transmission.append(pair.transmission[..., None])
        return SyntheticBatch(*map(to_batch, (hazy, clear, transmission)))

    def draw_real(self, rng: np.random.Generator, chosen: Sequence[int], way: Way) -> RealBatch:
        """Make the two views of hazy images."""
        views = [make_real_views(self.hazy[index], rng, patch_px=way.patch_px, jpeg_quality=None) for index in chosen]
        weak = to_batch([view.weak for view in views])
        strong = to_batch([view.strong for view in views]) if way.strong else weak
        return RealBatch(weak, strong, [self.names[index] for index in chosen])


class NoPool(LocalPool):
    """A pool that keeps nothing: every candidate wins."""

    def prefetch(self, keys: Sequence[str]) -> ReadyLabels:
        """Find no labels."""
        return ReadyLabels([None] * len(keys))

    def offer(self, labels: Sequence[Label]) -> None:
        """Forget the labels."""


class TruthCoherence(Coherence):
    """The true error as clarity, and one quality for all: what a perfect scorer would be worth."""

    def __init__(self, data: Data, patch_px: int) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        views = [make_real_views(image, rng, patch_px=patch_px, jpeg_quality=None).weak for image in data.truth]
        self.truth = to_batch(views)

    def score_images(self, images: Tensor, hazy: Tensor) -> GlobalScores:
        """Score whole restorations by their true error: a restoration is nearest to the truth of its own scene."""
        error = (images[:, None] - self.truth[None]).square().mean((2, 3, 4)).amin(1)
        return GlobalScores(1 - error.sqrt(), torch.ones_like(error))


class Untrusting(Coherence):
    """A trust of one half everywhere: the weight of the real half of the pixel loss is then that of no map."""

    def build_trust_map(self, blocks: BlockScores, height_px: int, width_px: int) -> Tensor:
        """Trust every pixel alike."""
        return torch.full((len(blocks.clarity), 1, height_px, width_px), 0.5)


def main() -> None:
    """Run the ways with each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    data, start = Data(arguments.demo), load_network(arguments.model).network
    assert isinstance(start, CORUN)
    found = {"start": {"-": measure(start, data)}}
    show("start", "-", found["start"]["-"], None)
    for seed in arguments.seeds:
        for name in arguments.ways:
            values = measure(train(start, data, WAYS[name], seed, arguments.steps), data)
            found.setdefault(name, {})[str(seed)] = values
            show(name, str(seed), values, found.get("control", {}).get(str(seed)))
            arguments.output.write_text(json.dumps(found))


def train(start: CORUN, data: Data, way: Way, seed: int, steps: int) -> CORUN:
    """Continue from a model; return the teacher."""
    torch.manual_seed(seed)
    state = TrainState.start(copy.deepcopy(start).requires_grad_(True))
    losses = Losses(way.weights, LaplacianFeatures() if way.weights.contrastive or way.weights.perceptual else None)
    colabator = Colabator(state.teacher, build_coherence(way, data), LocalPool() if way.pool else NoPool(), losses)

    # The learning rate falls to a tenth, as in the demo's job.
    cycle = Cycle(steps, way.lr, way.lr / 10)
    # Synthetic pairs are the same in every way.
    rng, real_rng, order = (np.random.default_rng((seed, stream)) for stream in range(3))
    queue: list[int] = []
    for step in range(steps):
        if len(queue) < BATCH:
            queue += order.permutation(len(data.hazy)).tolist()
        chosen, queue = queue[:BATCH], queue[BATCH:]

        synthetic = data.draw_synthetic(rng, way.patch_px)
        if way.control:
            output = run_pretraining_step(state.student, synthetic, losses)
        else:
            output = colabator.step(state.student, synthetic, data.draw_real(real_rng, chosen, way), step)
        state.backward(output.losses)
        state.update(compute_learning_rate(step, [cycle]), way.ema, BATCH, clip_norm=0.3)
    teacher = state.teacher
    assert isinstance(teacher, CORUN)
    return teacher


def build_coherence(way: Way, data: Data) -> Coherence:
    """Build the scorers of a way."""
    if way.by == "truth":
        return TruthCoherence(data, way.patch_px)
    if way.by == "reference":
        return ReferenceCoherence(load_network(SHIPPED_FOLDER / "corun-small").network)
    if way.by == "clarity":
        return Coherence(quality=CLARITY_SCORERS[DEFAULT_CLARITY])
    return Coherence() if way.trust else Untrusting()


@torch.no_grad()
def measure(network: CORUN, data: Data) -> dict[str, list[float]]:
    """Measure PSNR, SSIM and FADE of the restored hazy images."""
    values: dict[str, list[float]] = {"psnr": [], "ssim": [], "fade": []}
    network = network.eval()
    for hazy, truth in zip(data.hazy, data.truth, strict=True):
        scene = restore(network, to_batch([hazy])).scene.clamp(0, 1)
        scene, true = (scene * 255).round() / 255, to_batch([truth])
        values["psnr"].append(psnr(scene, true).item())
        values["ssim"].append(ssim(scene, true).item())
        values["fade"].append(fade(scene).item())
    return values


def show(name: str, seed: str, values: dict[str, list[float]], control: dict[str, list[float]] | None) -> None:
    """Print the means, and the difference to the control."""
    from corun_ray.service.report.statistics import compare

    cells = [f"{np.mean(values[metric]):.3f}" for metric in ("psnr", "ssim", "fade")]
    text = f"| {name} | {seed} | {' | '.join(cells)} |"
    if control is not None and control is not values:
        against = compare(np.array(values["psnr"]), np.array(control["psnr"]), lower_better=False)
        text += f" {against.difference.mean:+.3f} dB, p {against.p_value:.4f}, better on {against.better} |"
    print(text, flush=True)


def read(path: Path) -> ImageU8:
    """Read an image as RGB."""
    return decode_image(path.read_bytes())


def to_batch(images: Sequence[np.ndarray]) -> Tensor:
    """Convert images `H W C` uint8 to a batch `B C H W` in [0, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


if __name__ == "__main__":
    main()
