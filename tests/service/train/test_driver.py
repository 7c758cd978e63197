"""Whole training jobs, small, through the driver: real Ray Train workers, pool, MLflow file, registry."""

from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from corun_ray.core.training.checkpoint_record import TRAINING_FILE, read_record
from corun_ray.service.data.manifest import ManifestError, build_manifest
from corun_ray.service.errors import JobFailed
from corun_ray.service.models.sources import ModelSourceError, fetch_model
from corun_ray.service.pool import snapshots
from corun_ray.service.runs.held_out import ValidationLog, find_pictured_steps
from corun_ray.service.storage import locate
from corun_ray.service.telemetry.console import Console
from corun_ray.service.train.driver import prepare, run_training
from tests.conftest import write_image
from tests.service.jobs import assert_plain_pyfunc_runs, small_job
from tests.unusable import draw_damaged_validation

FOLDER = Path()
"""Where a network's own class would lie."""


def run_folder(job):
    """The folder of the job's only run, in a folder or a bucket."""
    storage = locate(job.storage)
    (name,) = {file.partition("/")[0] for file in storage.list_files() if file.startswith(job.name)}
    return storage.child(name)


def labels_of(job, snapshot):
    """The labels of a snapshot of the job's run, by key."""
    pool = run_folder(job).child("pool")
    return {label.key: label for label in snapshots.read_labels(pool, snapshots.read(pool.child(snapshot)))}


@pytest.fixture(scope="module")
def last_checkpoint(colabator, tmp_path_factory) -> Path:
    """A copy of the run's last checkpoint."""
    run = run_folder(colabator[0])
    last = max(file for file in run.list_files() if file.endswith(TRAINING_FILE))
    return run.child(last.removesuffix(f"/{TRAINING_FILE}")).download(tmp_path_factory.mktemp("last"))


def test_leaves_a_registered_model_that_plain_pyfunc_runs(colabator, tmp_path):
    """In a fresh process that imports MLflow alone."""
    job, uri = colabator
    assert uri == "models:/watched/1"
    assert_plain_pyfunc_runs(job.tracking.uri, "models:/watched@champion", tmp_path)


def test_the_registered_model_is_the_last_checkpoint_s_teacher(colabator, last_checkpoint):
    job, uri = colabator
    registered = fetch_model(uri, job.tracking.uri).params
    checkpoint = torch.load(last_checkpoint / "network.pth", weights_only=True)
    for name, value in checkpoint["params_ema"].items():
        assert torch.equal(registered[name], value), name
    assert any(not torch.equal(checkpoint["params"][n], v) for n, v in checkpoint["params_ema"].items())


def test_the_checkpoint_names_a_snapshot_with_one_label_per_hazy_image(colabator, last_checkpoint):
    job, _ = colabator
    record = read_record(last_checkpoint)
    assert (record["step"], record["num_images_seen"]) == (6, 12)
    content = labels_of(job, record["extra"]["pool_snapshot"])
    assert sorted(content) == [f"photo_{i}.png" for i in range(6)]
    assert all(0 <= label.step <= 5 for label in content.values())


def test_mlflow_has_params_metrics_pictures_and_the_job_file(colabator):
    job, _ = colabator
    client = mlflow.MlflowClient(job.tracking.uri)
    experiment = client.get_experiment_by_name("corun").experiment_id
    (run,) = client.search_runs([experiment], f"attributes.run_name LIKE '{job.name}%'")
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
    again = small_job("pretrain", dataset, tmp_path, network={"init": uri}, tracking={"uri": job.tracking.uri})
    params = prepare(again, FOLDER)[1].params
    reference = fetch_model(uri, job.tracking.uri).params
    assert all(torch.equal(params[name], value) for name, value in reference.items())
    other = small_job(
        "pretrain", dataset, tmp_path, network={"init": uri, "stages": 3}, tracking={"uri": job.tracking.uri}
    )
    with pytest.raises(ModelSourceError, match="network.stages: 3, but models:/watched/1 has 2"):
        prepare(other, FOLDER)


def test_too_many_bad_images_fail_the_job_and_are_named(local_ray, dataset, tmp_path, monkeypatch, capsys):
    """Before it starts, or, where images were damaged since, at the next line of metrics."""
    data = tmp_path / "data"
    for i in range(4):
        write_image(data / f"clear/ok_{i}.png", np.full((48, 48, 3), 40 * i + 20, np.uint8))
    for i in range(2):
        (data / f"clear/bad_{i}.png").write_text("no picture")
    sections = {"data": {"depth": None, "max_bad_fraction": 0.2}, "train": {"steps": 12, "checkpoint_every": 12}}
    job = small_job("pretrain", data, tmp_path, **sections)
    expected = r"2 of 6 images cannot be used, more than data.max_bad_fraction \(0.2\) allows; the first: "
    expected += f"{data}/clear/bad_0.png: not an image"
    with pytest.raises(ManifestError, match=expected):
        prepare(job, FOLDER)

    monkeypatch.setattr("corun_ray.service.train.driver.prepare_data", build_manifest)
    with pytest.raises(JobFailed, match="2 of 6 images cannot be used") as error:
        run_training(job, Console(shows_start=True), FOLDER)
    assert "restart" not in str(error.value)
    assert b"bad_1.png\tnot an image" in run_folder(job).child("bad_files.tsv").read()
    said = capsys.readouterr().out
    assert f"  skipped: {data}/clear/bad_0.png: not an image" in said

    # Which phases the start had, in every process.
    phases = ("Ray Train's controller starts", "worker processes start", "worker: first batch", "worker: first step")
    assert all(said.count(f" {phase} ") == 1 for phase in phases), said


def test_a_mistake_in_a_network_s_code_is_told_once_and_restarts_nothing(local_ray, tmp_path, capsys):
    root = draw_damaged_validation(tmp_path)
    network = {"type": "stubborn:Stubborn", "args": {"last_step": 4}}
    data = {"depth": None, "validation": {"hazy": str(root / "hazy")}}
    train = {"steps": 6, "checkpoint_every": 2, "validate_every": 2}
    cluster = {"max_failures": 3}
    job = small_job("pretrain", root, tmp_path, network=network, data=data, train=train, cluster=cluster)
    with pytest.raises(JobFailed) as error:
        run_training(job, Console(), Path(__file__).parent)
    failed, cause, rest = str(error.value).splitlines()
    assert failed == "training failed; not restarted, for it would fail again:"
    assert cause.startswith("  worker 0: RuntimeError: The size of tensor a (32) must match")
    assert rest.endswith("its last checkpoint is of step 2; once the cause is mended, --resume continues it")

    # The validation before it left one image out.
    output = capsys.readouterr().out
    assert output.count("worker 0 failed: RuntimeError: The size of") == 1 and "restarted" not in output
    assert output.count(f"  left out of val: {root}/hazy/0002.jpg: truncated JPEG\n") == 1
    log = ValidationLog.from_csv(run_folder(job).child("validation.csv").read())
    assert list(log.at(2)["val", "fade"]) == ["0000.jpg", "0001.jpg", "0003.jpg"]
