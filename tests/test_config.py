"""The schema: defaults by kind, and what it refuses."""

import pytest
from pydantic import ValidationError

from corun_ray.config import (
    CLARITY_NAMES,
    QUALITY_NAMES,
    ColabatorJob,
    EvaluateJob,
    PretrainJob,
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
