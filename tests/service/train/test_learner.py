"""From a batch to gradients: parts of a step count as workers of their own."""

import copy

import numpy as np
import pytest
import torch

from corun_ray.core.networks.corun import CORUN
from corun_ray.core.scoring.coherence import Coherence
from corun_ray.core.training.labels import LocalPool
from corun_ray.core.training.losses import COLABATOR_WEIGHTS, PRETRAIN_WEIGHTS, Losses
from corun_ray.core.training.precision import PrecisionChoice
from corun_ray.core.training.state import TrainState
from corun_ray.core.training.streams import copy_ahead
from corun_ray.service.data.manifest import build_manifest
from corun_ray.service.data.sample_maker import SampleMaker
from corun_ray.service.train.learner import Learner
from tests.service.jobs import small_job
from tests.streams import LateStream

STEP_IMAGES = 8
CPU = torch.device("cpu")


class Loud(torch.nn.Module):
    """A network whose every restoration depends on random numbers, too."""

    def __init__(self):
        super().__init__()
        self.inner = CORUN(2, 2)
        with torch.no_grad():
            self.inner.last.dehaze_net.mapping.weight.normal_(std=0.02)

    def forward(self, hazy):
        return self.inner((hazy + 0.1 * torch.rand_like(hazy)).clamp(0, 1))


def gradients(kind, dataset, folder, network, workers, batch, *, loss=None, keys=None, **data):
    """The mean over the ranks of the gradients of one step of eight images, and the losses in the images' order."""
    accumulate = STEP_IMAGES // workers // batch
    train = {"batch_per_worker": batch, "accumulate": accumulate}
    job = small_job(kind, dataset, folder, train=train, data=data, loss=loss or {}, **(keys or {}))
    batch_of_all = SampleMaker(job, build_manifest(job), job.data.patch_px, print)({"id": np.arange(STEP_IMAGES)})
    losses = Losses(COLABATOR_WEIGHTS if kind == "colabator" else PRETRAIN_WEIGHTS)
    found, of_parts, pool = [], [], LocalPool()
    for rank in range(workers):
        state = TrainState.start(copy.deepcopy(network))
        learner = Learner(job, state, losses, Coherence(block_px=16), pool, rank, CPU, PrecisionChoice("fp32"))
        share = slice(rank * batch * accumulate, (rank + 1) * batch * accumulate)
        outputs = [*learner.learn({name: column[share] for name, column in batch_of_all.items()})]
        assert len(outputs) == accumulate
        of_parts += [{name: loss.item() for name, loss in output.losses.items()} for output in outputs]
        found.append([parameter.grad for parameter in state.student.parameters()])
    return [torch.stack(of_ranks).mean(0) for of_ranks in zip(*found, strict=True) if None not in of_ranks], of_parts


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("pretrain", {}),
        ("pretrain", {"mixup": 0.5}),
        ("colabator", {}),
        ("colabator", {"synthesis": "worker"}),
    ],
)
def test_parts_of_a_worker_are_as_workers_of_their_own(kind, data, dataset, tmp_path):
    torch.manual_seed(1)
    network = Loud()
    expected, losses = gradients(kind, dataset, tmp_path, network, workers=4, batch=2, **data)
    assert max(gradient.abs().max() for gradient in expected) > 1e-3
    assert len(losses) == 4
    assert all(len({part[name] for part in losses}) == 4 for name in losses[0]), "each part has losses of its own"
    for workers in (1, 2):
        ours, of_parts = gradients(kind, dataset, tmp_path, network, workers, batch=2, **data)
        torch.testing.assert_close(of_parts, losses, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)


def test_a_step_in_one_part_is_the_whole_batch(dataset, tmp_path):
    torch.manual_seed(1)
    _, losses = gradients("colabator", dataset, tmp_path, Loud(), workers=1, batch=8)
    assert len(losses) == 1


def test_samples_made_by_the_learner_lie_in_memory_as_those_of_the_stream(dataset, tmp_path):
    for place in ("stream", "worker"):
        job = small_job("colabator", dataset, tmp_path, data={"synthesis": place})
        batch = SampleMaker(job, build_manifest(job), 32, print)({"id": np.arange(2)})
        state, coherence = TrainState.start(CORUN(2, 2)), Coherence(block_px=16)
        losses, precision = Losses(COLABATOR_WEIGHTS), PrecisionChoice("fp32")
        synthetic, real = Learner(job, state, losses, coherence, LocalPool(), 0, CPU, precision).load(batch, 0)
        for images in (synthetic.hazy, synthetic.clear, real.weak, real.strong):
            assert images.is_contiguous(memory_format=torch.channels_last), place


@pytest.mark.parametrize("kind", ["pretrain", "colabator"])
def test_samples_made_by_the_learner_teach_as_those_of_the_stream(kind, dataset, tmp_path):
    """Without a camera's faults nothing is drawn after what both draw alike."""
    torch.manual_seed(1)
    network, data = Loud(), {"camera": "none", "mixup": 0.5 if kind == "pretrain" else 0.0}
    for loss in ({}, {"transmission": 0.2}) if kind == "colabator" else ({},):
        expected, losses = gradients(kind, dataset, tmp_path, network, 1, batch=8, loss=loss, **data)
        ours, of_parts = gradients(kind, dataset, tmp_path, network, 1, batch=8, loss=loss, synthesis="worker", **data)
        # Single pixels are a level apart, and L1 losses have signs for gradients.
        torch.testing.assert_close(of_parts, losses, rtol=5e-3, atol=1e-4)
        mine, theirs = (torch.cat([gradient.flatten() for gradient in side]) for side in (ours, expected))
        assert torch.cosine_similarity(mine, theirs, dim=0) > 0.99
        assert mine.norm().item() == pytest.approx(theirs.norm().item(), rel=0.03)


@pytest.mark.parametrize(("kind", "mixup"), [("pretrain", 0.5), ("colabator", 0.0)])
def test_batches_copied_ahead_train_the_very_same(kind, mixup, dataset, tmp_path):
    train = {"batch_per_worker": 2, "accumulate": 2}
    job = small_job(kind, dataset, tmp_path, train=train, data={"mixup": mixup})
    make_samples = SampleMaker(job, build_manifest(job), job.data.patch_px, print)
    batches = [make_samples({"id": np.arange(4 * step, 4 * step + 4)}) for step in range(3)]
    torch.manual_seed(1)
    network = Loud()

    found = []
    for side in (None, LateStream()):
        state, pool = TrainState.start(copy.deepcopy(network)), LocalPool()
        losses = Losses(COLABATOR_WEIGHTS if kind == "colabator" else PRETRAIN_WEIGHTS)
        learner = Learner(job, state, losses, Coherence(block_px=16), pool, 0, CPU, PrecisionChoice("fp32"))
        # A stop within a run has taken a batch ahead, but its position counts steps alone.
        for batch in copy_ahead(iter(batches), side):
            assert isinstance(batch["hazy"], np.ndarray if side is None else torch.Tensor)
            for _ in learner.learn(batch):
                pass
            state.update(1e-3, 0.9, len(batch["index"]))
            if state.step == 2:
                break
        assert (state.step, state.num_images_seen) == (2, 8)
        found.append(state.collect_tensors())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("gpu", [[], ["stream"]])
def test_the_key_gives_teacher_and_scorers_a_stream_of_their_own(gpu, dataset, tmp_path, monkeypatch):
    """Where a GPU would have a stream, a stand-in opens; the gradients are the same."""
    stream = LateStream()
    monkeypatch.setattr("corun_ray.service.train.learner.open_stream", lambda device: stream)
    torch.manual_seed(1)
    network = Loud()
    keys = {"coherence": {"gpu": gpu}, "cluster": {"workers": 1, "gpus_per_worker": 1}}
    found, _ = gradients("colabator", dataset, tmp_path, network, 1, batch=4, keys=keys)
    assert stream.notes == ["side waits for main", "main waits for side"] * 2 * bool(gpu)

    expected, _ = gradients("colabator", dataset, tmp_path, network, 1, batch=4)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_both_networks_are_compiled_and_tried_on_images_of_the_job_s_size(dataset, tmp_path, monkeypatch):
    tried = []

    def check(compiled, network, images, key):
        assert compiled.inner is network and images.is_contiguous(memory_format=torch.channels_last)
        tried.append((tuple(images.shape), torch.is_grad_enabled()))

    class Compiled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    monkeypatch.setattr("corun_ray.service.train.learner.compile_network", Compiled)
    monkeypatch.setattr("corun_ray.service.train.learner.check_compiled", check)
    train = {"batch_per_worker": 2, "accumulate": 2, "steps": 4}
    job = small_job("colabator", dataset, tmp_path, train=train, optim={"compile": True})
    state, losses = TrainState.start(CORUN(2, 2)), Losses(COLABATOR_WEIGHTS)
    Learner(job, state, losses, Coherence(block_px=16), LocalPool(), 0, CPU, PrecisionChoice("fp32"))
    px = job.data.patch_px
    assert tried == [((4, 3, px, px), True), ((2, 3, px, px), False)]
