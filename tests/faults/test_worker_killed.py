"""kill -9 of one training worker, on the session's local Ray; `make faults` has the other faults, at random moments."""

import re
from pathlib import Path

from corun_ray.core.training.checkpoint_record import read_record
from corun_ray.service.pool import snapshots
from corun_ray.service.runs.record import find_last_run, list_checkpoint_steps, name_checkpoint
from corun_ray.service.telemetry.console import Console
from corun_ray.service.train.driver import run_training
from tests.service.jobs import small_job

HERE = Path(__file__).parent


def test_the_workers_go_on_from_the_last_checkpoint_when_one_is_killed(local_ray, dataset, tmp_path, capsys):
    job = small_job(
        "colabator",
        dataset,
        tmp_path,
        network={"type": "mortal:Mortal", "args": {"storage": str(tmp_path / "runs"), "last_step": 6}},
        train={"steps": 8, "checkpoint_every": 4},
        cluster={"workers": 2, "max_failures": 1},
    )
    run_training(job, Console(), HERE)
    output, run = capsys.readouterr().out, find_last_run(job)
    assert re.findall(r"workers restarted: resuming from step (\d+) with (\d+)", output) == [("4", "2")], output
    # The killed one says nothing; Ray Train's controller names it.
    assert "worker 1 failed: its process has ended: killed, out of memory, or with its node" in output, output
    assert "worker process has died" in run.child("errors.log").read().decode()
    assert list_checkpoint_steps(run) == [4, 8]
    record = read_record(Path(run.path) / name_checkpoint(8))
    assert (record["step"], record["num_images_seen"]) == (8, 16)
    snapshot = snapshots.read(run.child("pool").child(record["extra"]["pool_snapshot"]))
    assert {label.key for label in snapshots.read_labels(run.child("pool"), snapshot)} == {
        f"photo_{i}.png" for i in range(6)
    }
