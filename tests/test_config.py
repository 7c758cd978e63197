"""The schema: defaults by kind, what it refuses, and the list of keys made from it."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from corun_ray.config import (
    CLARITY_NAMES,
    KINDS,
    ORDER,
    QUALITY_NAMES,
    ColabatorJob,
    EvaluateJob,
    PretrainJob,
    keys,
    reference,
)

PRETRAIN = {"kind": "pretrain", "name": "p", "data": {"clear": "clear"}}
COLABATOR = {"kind": "colabator", "name": "c", "data": {"clear": "clear", "hazy": "hazy"}}
EVALUATE = {"kind": "evaluate", "name": "e", "evaluate": {"hazy": "hazy"}}


def test_defaults_of_pretraining() -> None:
    job = PretrainJob.model_validate(PRETRAIN)
    assert (job.seed, job.storage) == (0, "runs")
    assert (job.train.steps, job.train.batch_per_worker) == (30_000, 2)
    assert (job.optim.lr, job.optim.min_lr, job.optim.schedule_steps) == (1e-4, 1e-4, 30_000)
    assert (job.data.random_resize, job.data.patch_px) == (False, 288)
    assert (job.data.depth, job.data.validation) == (None, None)
    assert (job.haze.beta, job.haze.airlight, job.haze.airlight_tint) == ((0.2, 2.8), (0.25, 1.0), 0.025)


def test_defaults_of_colabator() -> None:
    job = ColabatorJob.model_validate(COLABATOR)
    assert (job.train.steps, job.train.batch_per_worker) == (5_000, 1)
    assert (job.optim.lr, job.optim.min_lr, job.optim.schedule_steps) == (5e-5, 1e-6, 50_000)
    assert job.data.random_resize
    assert (job.pool.shards, job.pool.encoding, job.coherence.block_px) == (1, "uint8", 32)
    assert job.coherence.clarity in CLARITY_NAMES
    assert job.coherence.quality in QUALITY_NAMES


def test_lowest_learning_rate_follows_the_first() -> None:
    assert PretrainJob.model_validate(PRETRAIN | {"optim": {"lr": 3e-4}}).optim.min_lr == 3e-4
    assert ColabatorJob.model_validate(COLABATOR | {"optim": {"lr": 3e-4}}).optim.min_lr == 1e-6
    assert ColabatorJob.model_validate(COLABATOR | {"optim": {"lr": 1e-7}}).optim.min_lr == 1e-7


def test_metrics_are_those_that_can_be_measured() -> None:
    assert EvaluateJob.model_validate(EVALUATE).evaluate.metrics == ("fade",)
    with_truth = EVALUATE | {"evaluate": {"hazy": "hazy", "clear": "truth"}}
    assert EvaluateJob.model_validate(with_truth).evaluate.metrics == ("psnr", "ssim", "fade")


def test_jobs_and_their_sections_are_frozen() -> None:
    job = ColabatorJob.model_validate(COLABATOR)
    for part, name in [(job, "seed"), (job.optim, "lr"), (job.data, "clear"), (job.pool, "shards")]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, name, 1)


def test_every_key_is_described_and_listed() -> None:
    text = reference()
    for kind, job in KINDS.items():
        assert set(job.model_fields) <= set(ORDER)
        for path, field in keys(job).items():
            assert path == "kind" or field.description, f"{path} of {kind} says nothing"
            assert f"\n{path}: " in text or f"  {path} " in text


def test_reference_gives_defaults_ranges_and_kinds() -> None:
    lines = [" ".join(line.split()) for line in reference().splitlines()]
    assert "optim.lr 0.0001 in pretrain, 5e-05 in colabator" in lines
    assert "train.steps 30000 in pretrain, 5000 in colabator" in lines
    assert "whole number, at least 2, at most 16; number of unfolding stages" in lines
    assert "pool: the optimal label pool (colabator only)" in lines
    assert "text; a folder or URI of real hazy images (colabator only)" in lines
    assert (
        lines[lines.index("cluster.workers 1") + 1] == "whole number, at least 1; number of training workers"
    )


def test_importing_is_light() -> None:
    heavy = "torch", "ray", "mlflow", "numpy", "cv2"
    code = f"import sys, corun_ray.config, corun_ray.jobfile; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "[]\n"
