"""The best checkpoint of a run, from its validations."""

import math

import mlflow
import pytest

from corun_ray.service.runs.held_out import MeasuredImage, ValidationLog
from corun_ray.service.runs.record import find_last_run, list_checkpoint_steps
from corun_ray.service.storage import locate
from corun_ray.service.telemetry.console import Console
from corun_ray.service.train.best import find_best_checkpoint
from corun_ray.service.train.driver import run_training
from tests.service.jobs import small_job


def make_log(metric, *steps):
    log = ValidationLog()
    for step, values in enumerate(steps, 1):
        log.add(step, [MeasuredImage("val", image, {metric: value}) for image, value in values.items()])
    return log


def find_step(folder, metric, log, steps):
    for step in steps:
        (folder / f"checkpoint_{step:08d}").mkdir(exist_ok=True)
    best = find_best_checkpoint(f"val/{metric}", locate(str(folder)), log)
    return None if best is None else (best.step, best.value)


def test_the_metric_decides_the_direction_among_checkpoints_that_are_there(tmp_path):
    rows = ({"a": 20.0}, {"a": 22.0}, {"a": 21.0})
    assert find_step(tmp_path, "psnr", make_log("psnr", *rows), [1, 3]) == (3, 21.0)
    assert find_step(tmp_path, "psnr", make_log("psnr", *rows), [2]) == (2, 22.0)
    assert find_step(tmp_path, "brisque", make_log("brisque", *rows), []) == (1, 20.0)
    assert find_step(tmp_path, "ssim", make_log("psnr", *rows), []) is None


def test_steps_are_compared_over_the_same_images(tmp_path):
    # Step 2 lacks the hard image, step 3 was measured on another set, step 4 has no value at all.
    log = make_log(
        "psnr",
        {"easy": 30.0, "hard": 10.0},
        {"easy": 29.0, "hard": math.nan},
        {"easy": 40.0},
        {"easy": math.nan, "hard": math.nan},
        {"easy": 28.0, "hard": 11.0},
    )
    assert log.compare_steps("val/psnr") == {1: 30.0, 2: 29.0, 5: 28.0}
    assert find_step(tmp_path, "psnr", log, [1, 2, 3, 4, 5]) == (1, 30.0)


def test_a_run_without_the_key_has_no_best(tmp_path):
    assert find_best_checkpoint(None, locate(str(tmp_path)), make_log("psnr", {"a": 1.0})) is None


def job_of(dataset, folder, tracking, steps):
    """A training that leaves the network as it was in the first step, and spoils it by its rate in the others."""
    return small_job(
        "pretrain",
        dataset,
        folder,
        data={"validation": {"hazy": str(dataset / "hazy"), "clear": str(dataset / "hazy_truth")}},
        optim={"ema": 0.0, "cycles": [{"steps": 1, "lr": 1e-9, "min_lr": 0.0}, {"steps": 9, "lr": 0.3, "min_lr": 0.3}]},
        train={
            "steps": steps,
            "checkpoint_every": 3,
            "validate_every": 1,
            "keep_checkpoints": 1,
            "validation_images": 1,
            "validation_metrics": ["psnr", "fade"],
            "best": "val/psnr",
        },
        tracking={"uri": tracking, "register": "watched-best"},
    )


def test_the_best_checkpoint_is_kept_registered_and_found_again_by_a_resumed_run(
    local_ray, mlflow_server, dataset, tmp_path, capsys
):
    for steps, resume in ((3, False), (5, True)):
        job = job_of(dataset, tmp_path, mlflow_server, steps)
        run_training(job, Console(), tmp_path, resume)
        output = capsys.readouterr().out

        # The best of all validations so far still has its checkpoint, beside the last.
        run = find_last_run(job)
        log = ValidationLog.from_csv(run.child("validation.csv").read())
        means = log.compare_steps("val/psnr")
        best = max(means, key=means.__getitem__)
        assert means.keys() == set(range(1, steps + 1)) and best == 1
        assert list_checkpoint_steps(run) == [best, steps]
        outcome = "the alias best stays" if resume else "models:/watched-best/2, has the alias best"
        assert f"step {best}, val/psnr {means[best]:.4f}: " in output and outcome in output

        # Its version has the values of its step; the candidate is the last step's.
        client = mlflow.MlflowClient(job.tracking.uri)
        version = client.get_model_version_by_alias("watched-best", "best")
        assert version.tags["corun_ray.steps"] == str(best) and "the best by val/psnr" in version.description
        assert float(version.tags["val/psnr"]) == pytest.approx(means[best], rel=1e-4)
        candidate = client.get_model_version_by_alias("watched-best", "candidate")
        assert candidate.tags["corun_ray.steps"] == str(steps)
        assert float(candidate.tags["val/psnr"]) == pytest.approx(means[steps], rel=1e-4)
        assert f"The best checkpoint: step {best}, val/psnr" in run.child("report.html").read().decode()
