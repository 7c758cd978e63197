"""Rating only the winners' blocks against the published order, which rates every candidate's."""

import copy

import numpy as np
import torch
from torch import Tensor, nn

from corun_ray.core.networks.corun import CORUN
from corun_ray.core.scoring.coherence import Coherence
from corun_ray.core.training.labels import LocalPool
from corun_ray.core.training.losses import COLABATOR_WEIGHTS, Losses
from corun_ray.core.training.state import TrainState
from corun_ray.core.training.steps import Colabator, RealBatch, SyntheticBatch
from tests.core.training.test_steps import trust_of

SIDE_PX, BLOCK_PX = 32, 16
LOSSES = Losses(COLABATOR_WEIGHTS)


class EagerColabator:
    """The published order, kept simple: every candidate is rated in blocks, then the scores decide.

    Its pool is a dict from a key to (clarity, quality, J*, T*, w*), all in float32.
    """

    def __init__(self, teacher: nn.Module, coherence: Coherence) -> None:
        self.teacher, self.coherence = teacher, coherence
        self.pool: dict[str, tuple[float, float, Tensor, Tensor, Tensor]] = {}
        self.block_ratings = 0

    def losses(
        self, student: nn.Module, synthetic: SyntheticBatch, real: RealBatch
    ) -> tuple[dict[str, Tensor], list[bool]]:
        with torch.no_grad():
            scene, transmission = self.teacher(real.weak)
            scene = scene.clamp(0, 1)
        rated = self.coherence.score_images(scene, real.weak)
        blocks = self.coherence.score_blocks(scene, real.weak)
        trust = self.coherence.build_trust_map(blocks, SIDE_PX, SIDE_PX)
        self.block_ratings += blocks.clarity.numel()
        wins = []
        for i, key in enumerate(real.keys):
            clarity, quality = rated.clarity[i].item(), rated.quality[i].item()
            wins.append(key not in self.pool or (clarity >= self.pool[key][0] and quality >= self.pool[key][1]))
            if wins[-1]:
                self.pool[key] = (clarity, quality, scene[i], transmission[i], trust[i])
        label = torch.stack([self.pool[key][2] for key in real.keys])
        trust = torch.stack([self.pool[key][4] for key in real.keys])
        restored, transmission = student(torch.cat([synthetic.hazy, real.strong]))
        half = len(synthetic.hazy)
        rehazed = restored[half:] * transmission[half:] + 1 - transmission[half:]
        return {
            "pixel_synthetic": 5 * 0.5 * (restored[:half].clamp(0, 1) - synthetic.clear).abs().mean(),
            "pixel_real": 5 * 0.5 * (2 * trust * (restored[half:] - label).abs()).mean(),
            "scattering": 0.01 * 0.5 * (trust * (rehazed - real.strong).abs()).mean(),
        }, wins


def random_batches(step: int) -> tuple[SyntheticBatch, RealBatch]:
    """Two synthetic pairs, and three of four real images that come again with other crops."""
    generator = torch.Generator().manual_seed(step)
    hazy, clear = torch.rand(2, 2, 3, SIDE_PX, SIDE_PX, generator=generator)
    chosen = torch.randperm(4, generator=generator)[:3].tolist()
    coarse = 0.3 + 0.6 * torch.rand(2, 3, 3, 8, 8, generator=generator)
    weak, strong = (nn.functional.interpolate(views, SIDE_PX, mode="bilinear") for views in coarse)
    return SyntheticBatch(hazy, clear), RealBatch(weak, strong, [f"photo_{i}" for i in chosen])


def test_lazy_local_coherence_trains_exactly_as_the_eager_order() -> None:
    torch.manual_seed(0)
    network = CORUN(2, 4)
    for cpmm in (network.first.trans_net, network.first.dehaze_net, network.last.dehaze_net):
        nn.init.normal_(cpmm.mapping.weight, std=0.1)
    ours, theirs = TrainState.start(network), TrainState.start(copy.deepcopy(network))
    coherence, pool = Coherence(block_px=BLOCK_PX), LocalPool()
    lazy, eager = Colabator(ours.teacher, coherence, pool, LOSSES, "float32"), EagerColabator(theirs.teacher, coherence)
    all_wins, ratings, saved = [], 0, 0
    for step in range(8):
        synthetic, real = random_batches(step)
        output = lazy.step(ours.student, synthetic, real, step)
        expected, wins = eager.losses(theirs.student, synthetic, real)
        assert output.labels is not None and output.labels.from_teacher == wins
        torch.testing.assert_close(output.losses, expected, rtol=1e-7, atol=1e-7)
        for state, losses in ((ours, output.losses), (theirs, expected)):
            state.backward(losses)
            state.update(lr=1e-3, ema=0.8, batch_images=5)
        all_wins += wins
        ratings, saved = ratings + output.labels.block_ratings, saved + output.labels.block_ratings_saved

    assert 4 < sum(all_wins) < 20, "both outcomes happen, also for images with a stored label"
    assert (ratings, ratings + saved) == (4 * sum(all_wins), eager.block_ratings)
    assert pool.labels.keys() == eager.pool.keys()
    for key, label in pool.labels.items():
        clarity, quality, scene, transmission, trust = eager.pool[key]
        assert label.scores == (clarity, quality)
        np.testing.assert_array_equal(label.scene, scene)
        assert label.transmission is not None
        np.testing.assert_array_equal(label.transmission, transmission)
        ours_trust = trust_of(torch.from_numpy(label.block_clarity), torch.from_numpy(label.block_quality))
        torch.testing.assert_close(ours_trust, trust, rtol=0, atol=1e-7)
    for mine, other in ((ours.student, theirs.student), (ours.teacher, theirs.teacher)):
        torch.testing.assert_close(mine.state_dict(), other.state_dict(), rtol=0, atol=1e-7)
