"""What ends a training from outside its workers: nobody follows it any more, or another driver has taken its run."""

from pathlib import Path

import mlflow
import pytest
from ray.util import placement_group_table

from corun_ray.service.errors import JobFailed
from corun_ray.service.runs import lease
from corun_ray.service.runs.lease import RunTaken
from corun_ray.service.runs.record import find_last_run, list_checkpoint_steps, read_record
from corun_ray.service.telemetry.console import Console
from corun_ray.service.train.driver import run_training
from tests.service.jobs import small_job

FOLDER = Path()


def long_job(dataset, folder):
    """A job that would take minutes."""
    train = {"steps": 5000, "log_every": 2, "checkpoint_every": 2, "keep_checkpoints": 2, "validate_every": 2}
    return small_job("pretrain", dataset, folder, train=train)


def list_pictures(run):
    """The pictures of validations that the follower has written."""
    folder = run.child("pictures")
    return folder.list_files() if folder.is_folder() else []


def find_held_room():
    """The states of the placement groups that hold room, or wait for it."""
    return [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]


def read_status(job):
    client = mlflow.MlflowClient(f"sqlite:///{job.storage}/mlflow.db")
    return client.get_run(read_record(find_last_run(job)).mlflow_run).info.status


def test_a_training_that_nobody_can_follow_fails_with_the_reason(local_ray, dataset, tmp_path):
    job = long_job(dataset, tmp_path)

    def fail(step, metrics):
        if list_checkpoint_steps(find_last_run(job)):
            raise SystemExit("no room for this line")

    with pytest.raises(JobFailed) as failed:
        run_training(job, Console(), FOLDER, listen=fail)
    text = str(failed.value)
    assert text.startswith("the training cannot be followed any more: SystemExit: no room for this line\nthe run: ")
    assert "--resume continues it" in text and read_status(job) == "FAILED"
    assert not find_last_run(job).child("drivers").exists()
    assert find_held_room() == [], "what comes next in this process has room"


def test_a_driver_whose_run_was_taken_ends_and_deletes_nothing(local_ray, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_EVERY_S", 0.1)
    job, seen, pictures = long_job(dataset, tmp_path), [], []

    def take_over(step, metrics):
        run = find_last_run(job)
        if seen or not list_checkpoint_steps(run):
            return
        other = lease.describe_this_process().model_copy(update={"host": "far", "pid": 71, "machine": "other"})
        run.child("drivers/000002.json").write(other.model_dump_json().encode())
        run.child("drivers/000001.json").delete()
        seen.append(list_checkpoint_steps(run)[-1])
        pictures.extend(list_pictures(run))

    with pytest.raises(
        RunTaken, match=r"has been taken over by process 71 of \w+ on far: this process ends, and deletes"
    ):
        run_training(job, Console(), FOLDER, listen=take_over)
    run = find_last_run(job)
    assert run.child("drivers").list_files() == ["000002.json"]
    assert read_status(job) == "RUNNING", "the other driver has the run in MLflow, too"
    assert list_pictures(run) == pictures, "what comes later is no longer this driver's to write"
    # What its workers tried to write after that is not there: a checkpoint may have been under way.
    assert list_checkpoint_steps(run)[-1] - seen[0] <= 4
    assert find_held_room() == []
