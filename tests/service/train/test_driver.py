"""Whole training jobs, small, through the driver: real Ray Train workers, pool, MLflow file, registry."""

import os
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from corun_ray.core.training.checkpoints import TRAINING_FILE, read_record
from corun_ray.service.models.sources import ModelSourceError, fetch_model
from corun_ray.service.pool import snapshots
from corun_ray.service.runs.held_out import ValidationLog, find_pictured_steps
from corun_ray.service.storage import locate
from corun_ray.service.telemetry.console import Console
from corun_ray.service.train.driver import JobFailed, prepare, run_training
from tests.conftest import write_image
from tests.service.jobs import assert_plain_pyfunc_runs, small_job

FOLDER = Path()
"""Where a network's own class would lie."""


def tracking(job):
    return f"sqlite:///{job.storage}/mlflow.db"


def run_folder(job):
    (folder,) = (p for p in os.scandir(job.storage) if p.name.startswith(job.name))
    return locate(folder.path)


def labels_of(job, snapshot):
    """The labels of a snapshot of the job's run, by key."""
    pool = run_folder(job).child("pool")
    return {label.key: label for label in snapshots.read_labels(pool, snapshots.read(pool.child(snapshot)))}


def last_checkpoint(job):
    run = run_folder(job)
    return run.child(max(f for f in run.list_files() if f.endswith(TRAINING_FILE))).path.removesuffix(
        f"/{TRAINING_FILE}"
    )


def test_leaves_a_registered_model_that_plain_pyfunc_runs(colabator, dataset, tmp_path):
    """In a fresh process that imports MLflow alone."""
    job, uri = colabator
    assert uri == "models:/corun-test/1"
    assert_plain_pyfunc_runs(tracking(job), "corun-test", tmp_path)


def test_the_registered_model_is_the_last_checkpoint_s_teacher(colabator):
    job, uri = colabator
    registered = fetch_model(uri, tracking(job)).params
    checkpoint = torch.load(f"{last_checkpoint(job)}/network.pth", weights_only=True)
    for name, value in checkpoint["params_ema"].items():
        assert torch.equal(registered[name], value), name
    assert any(not torch.equal(checkpoint["params"][n], v) for n, v in checkpoint["params_ema"].items())


def test_the_checkpoint_names_a_snapshot_with_one_label_per_hazy_image(colabator):
    job, _ = colabator
    record = read_record(Path(last_checkpoint(job)))
    assert (record["step"], record["num_images_seen"]) == (6, 12)
    content = labels_of(job, record["extra"]["pool_snapshot"])
    assert sorted(content) == [f"photo_{i}.png" for i in range(6)]
    assert all(0 <= label.step <= 5 for label in content.values())


def test_mlflow_has_params_metrics_pictures_and_the_job_file(colabator):
    job, _ = colabator
    client = mlflow.MlflowClient(tracking(job))
    (run,) = client.search_runs([client.get_experiment_by_name("corun").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["network.stages"] == "2" and run.data.params["pool.encoding"] == "uint8"
    for name in ("loss/total", "pool/labels", "pool/wins", "rate/steps_per_s", "val/psnr", "val/ssim", "val/fade"):
        assert np.isfinite(run.data.metrics[name]), name
    assert run.data.metrics["pool/labels"] == 6
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "loss/total")]
    assert steps == [2, 4, 6]
    artifacts = {a.path for folder in ("", "pictures") for a in client.list_artifacts(run.info.run_id, folder)}
    pictures = {f"pictures/restorations_{step:08d}.png" for step in (3, 6)}
    assert {"job.yaml", "report.html", *pictures} <= artifacts
    assert {"report.html", *pictures} <= set(run_folder(job).list_files())


def test_the_run_keeps_every_held_out_image_of_every_validation(colabator):
    job, _ = colabator
    run = run_folder(job)
    log = ValidationLog.from_csv(run.child("validation.csv").read())
    assert {step for step, *_ in log.values} == {3, 6}
    last = log.at(6)
    assert last.keys() == {("val", "fade"), ("val", "psnr"), ("val", "ssim")}
    assert all(sorted(images) == [f"photo_{i}.png" for i in range(6)] for images in last.values())
    assert {"val/photo_0.png", "val/photo_1.png"} <= find_pictured_steps(run).keys()
    report = run.child("report.html").read().decode()
    assert "Before and after" in report and "Labels in the pool" in report and "step 3" in report


def test_pretraining_starts_from_a_registered_model(colabator, dataset, tmp_path):
    job, uri = colabator
    again = small_job("pretrain", dataset, tmp_path, network={"init": uri}, tracking={"uri": tracking(job)})
    params = prepare(again, FOLDER)[1].params
    reference = fetch_model(uri, tracking(job)).params
    assert all(torch.equal(params[name], value) for name, value in reference.items())
    other = small_job(
        "pretrain", dataset, tmp_path, network={"init": uri, "stages": 3}, tracking={"uri": tracking(job)}
    )
    with pytest.raises(ModelSourceError, match="network.stages: 3, but models:/corun-test/1 has 2"):
        prepare(other, FOLDER)


def test_too_many_bad_images_fail_the_job_and_are_named(local_ray, dataset, tmp_path):
    data = tmp_path / "data"
    for i in range(4):
        write_image(data / f"clear/ok_{i}.png", np.full((48, 48, 3), 40 * i + 20, np.uint8))
    for i in range(2):
        (data / f"clear/bad_{i}.png").write_text("no picture")
    sections = {"data": {"depth": None, "max_bad_fraction": 0.2}, "train": {"steps": 12, "checkpoint_every": 12}}
    job = small_job("pretrain", data, tmp_path, **sections)
    with pytest.raises(
        JobFailed, match=r"2 of 6 images cannot be used, more than data.max_bad_fraction \(0.2\)"
    ) as error:
        run_training(job, Console(), FOLDER)
    assert f"{data}/clear/bad_0.png: not an image" in str(error.value)
    assert b"bad_1.png\tnot an image" in run_folder(job).child("bad_files.tsv").read()
