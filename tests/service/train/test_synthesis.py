"""Trainings whose workers make the pixels of their samples: small, through the driver, to their end."""

from pathlib import Path

import pytest
import torch

from corun_ray.service.telemetry.console import Console
from corun_ray.service.train.driver import run_training
from tests.service.jobs import small_job


@pytest.mark.parametrize("kind", [pytest.param("pretrain", marks=pytest.mark.slow), "colabator"])
def test_a_training_whose_workers_make_the_haze(kind, local_ray, dataset, tmp_path):
    data = {"synthesis": "worker", "patch_px": 48, "resize": "cubic", "rotation": True, "random_resize": True}
    train = {"steps": 2, "checkpoint_every": 1, "log_every": 1, "validate_every": 2, "keep_checkpoints": 3}
    sections = {"data": data, "train": train | {"batch_per_worker": 2}, "coherence": {"block_px": 16}}
    if kind == "pretrain":
        del sections["coherence"]
        sections["train"]["progressive"] = [{"from_step": 1, "patch_px": 64, "batch_per_worker": 1}]
    job = small_job(kind, dataset, tmp_path, optim={"lr": 1e-3}, haze={"density_variation": [0, 0.5]}, **sections)
    assert run_training(job, Console(), tmp_path)
    checkpoints = sorted(Path(job.storage).glob("test-*/checkpoint_*/network.pth"))
    first, last = (torch.load(file, weights_only=True)["params"] for file in checkpoints)
    assert all(torch.isfinite(value).all() for value in last.values())
    assert any(not torch.equal(value, last[name]) for name, value in first.items())
