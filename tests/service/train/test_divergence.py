"""A training that diverges ends at once, leaves good checkpoints, and resumes with smaller steps."""

import mlflow
import pytest

from corun_ray.core.networks.finite import find_bad_weight
from corun_ray.core.training.checkpoints import load_network
from corun_ray.service.errors import JobFailed
from corun_ray.service.models.tracking import get_tracking_uri
from corun_ray.service.runs.record import find_last_run, list_checkpoint_steps, name_checkpoint
from corun_ray.service.telemetry.console import Console
from corun_ray.service.train.driver import run_training
from tests.service.jobs import small_job

STEPS = 6


def make_job(dataset, folder, lr):
    """Make a pre-training job that saves every step and registers its model."""
    return small_job(
        "pretrain",
        dataset,
        folder,
        optim={"lr": lr, "min_lr": lr},
        train={"steps": STEPS, "checkpoint_every": 1, "keep_checkpoints": STEPS},
        loss={"contrastive_weight": 0.0},
        tracking={"register": "diverging"},
    )


def test_a_diverging_run_ends_with_its_term_and_resumes_with_smaller_steps(local_ray, dataset, tmp_path, capsys):
    job = make_job(dataset, tmp_path, lr=1.0)
    with Console() as console, pytest.raises(JobFailed) as failure:
        run_training(job, console, tmp_path)

    # One start, which names the step, the term and the way out.
    printed = capsys.readouterr().out
    assert "workers restarted" not in printed
    assert "not restarted, for it would fail again" in str(failure.value)
    assert ", not finite; --resume with a lower optim.lr or with optim.clip_norm" in str(failure.value)
    assert "worker 0: step " in str(failure.value)

    # What was saved is finite, and nothing was registered.
    run = find_last_run(job)
    steps = list_checkpoint_steps(run)
    assert steps and steps[-1] < STEPS
    for step in steps:
        network = load_network(run.child(name_checkpoint(step)).download(tmp_path / f"saved{step}")).network
        assert find_bad_weight(network.state_dict(), network) is None
    assert mlflow.MlflowClient(get_tracking_uri(job)).search_registered_models() == []

    # Steps of that size have spoilt later checkpoints, so the first one goes on.
    for step in steps[1:]:
        run.child(name_checkpoint(step)).delete()
    smaller = make_job(dataset, tmp_path, lr=1e-5)
    with Console() as console:
        assert run_training(smaller, console, tmp_path, resume=True).startswith("models:/diverging/")
    printed = capsys.readouterr().out
    assert "optim.lr 1.0 -> 1e-05" in printed
    assert list_checkpoint_steps(run)[-1] == STEPS
