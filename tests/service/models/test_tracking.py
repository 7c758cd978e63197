from pathlib import Path

import pytest

from corun_ray.config.loading import build_job
from corun_ray.service.models import tracking
from corun_ray.service.models.outbox import UNSENT_FOLDER, Entry
from corun_ray.service.models.tracking import (
    Tracker,
    TrackingError,
    check_tracking,
    connect_to_mlflow,
    send_unsent,
)
from corun_ray.service.storage import locate


def test_credentials_in_an_address_are_refused_and_not_repeated():
    with pytest.raises(TrackingError) as caught:
        connect_to_mlflow("https://me:word@mlflow:5000")
    assert "https://***@mlflow:5000 holds credentials" in str(caught.value) and "word@" not in str(caught.value)
    assert "MLFLOW_TRACKING_TOKEN" in str(caught.value)


def make_job(folder: Path, database: str = "mlflow.db"):
    """A job whose MLflow is an SQLite file."""
    data = {"clear": str(folder)}
    where = {"uri": f"sqlite:///{folder / database}"}
    return build_job({"kind": "pretrain", "name": "small", "storage": str(folder), "data": data, "tracking": where})


def test_a_run_is_the_jobs_own_and_goes_on_in_any_mlflow(tmp_path, monkeypatch):
    """A foreign run id in the environment, a lost database, a deleted experiment."""
    job, run, said = make_job(tmp_path), locate(str(tmp_path / "run")), []
    monkeypatch.setattr(tracking, "_reached", set())
    monkeypatch.setenv("MLFLOW_RUN_ID", "f" * 32)
    first = Tracker(job, "small-1", run=run, say=said.append)
    assert first.run_id != "f" * 32 and any("MLFLOW_RUN_ID" in line and "ignored" in line for line in said)
    first.log_metrics(1, {"loss": 2.0})
    run.child("a.txt").write(b"text")
    first.log_file("a.txt", b"text")
    assert first.read_curves() == {"loss": [(1, 2.0)]} and first.list_missing() == []
    first.finish(True)

    # The same MLflow has the run; another one begins a new run, and says so.
    same = Tracker(job, "small-1", first.run_id, run=run, say=said.append)
    assert same.run_id == first.run_id and same.read_curves() == {"loss": [(1, 2.0)]}
    same.finish(False)
    other = Tracker(make_job(tmp_path, "other.db"), "small-1", first.run_id, run=run, say=said.append)
    other.finish(True)
    assert other.run_id != first.run_id and f"has no run {first.run_id}: a new one begins" in said[-1]

    # A deleted experiment keeps its name.
    client = connect_to_mlflow(f"sqlite:///{tmp_path / 'mlflow.db'}").MlflowClient()
    assert client.get_run(first.run_id).info.status == "FAILED"
    client.delete_experiment(client.get_experiment_by_name(job.tracking.experiment).experiment_id)
    for ask in (lambda: check_tracking([job]), lambda: Tracker(job, "small-1", first.run_id, run=run, say=said.append)):
        with pytest.raises(TrackingError, match="mlflow experiments restore -x 1") as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_a_finished_run_sends_what_it_has_kept(tmp_path):
    job, run, said = make_job(tmp_path), locate(str(tmp_path / "run")), []
    tracker = Tracker(job, "small-1", run=run, say=said.append)
    tracker.finish(True)
    said.clear()
    assert send_unsent(job, run, tracker.run_id, said.append) is None and said == []

    # What an MLflow that was away has not taken.
    kept = Entry(1, 7, metrics={"loss": 0.5}).to_json()
    run.child(UNSENT_FOLDER).child("000001.jsonl").write(f"{kept}\n".encode())
    assert send_unsent(job, run, tracker.run_id, said.append) is None
    assert "1 metric" in said[0] and not run.child(UNSENT_FOLDER).exists()
    client = connect_to_mlflow(job.tracking.uri).MlflowClient()
    found = client.get_run(tracker.run_id)
    assert found.data.metrics == {"loss": 0.5} and found.info.status == "FINISHED"


def test_the_key_that_leads_to_a_database_is_named_where_there_can_be_none(tmp_path):
    (tmp_path / "file").write_text("")
    tree = {"kind": "pretrain", "name": "small", "storage": str(tmp_path / "file/runs"), "data": {"clear": "x"}}
    for key, more in (("storage", {}), ("tracking.uri", {"tracking": {"uri": f"sqlite:///{tmp_path}/file/m.db"}})):
        with pytest.raises(TrackingError, match=f"^{key}: MLflow's sqlite:///.* cannot be used: .*file"):
            check_tracking([build_job(tree | more)], print)
