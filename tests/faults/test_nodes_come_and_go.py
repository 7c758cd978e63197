"""Nodes that are announced to go, and an elastic job that takes what there is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from corun_ray.core.training.checkpoint_record import read_record
from corun_ray.service.runs.record import list_checkpoint_steps, name_checkpoint
from corun_ray.service.storage import locate
from corun_ray.service.train.recovery import STATE_FILE
from tests.faults.matrix import stage
from tests.faults.rig import Driver, write_job
from tests.faults.verdict import run_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def theatre():
    with stage() as (rig, _, folder):
        yield rig, folder


def is_noted(run, step):
    """Whether Ray Train's own list has the checkpoint: from then on workers start from it."""
    checkpoints = run.child(STATE_FILE)
    return checkpoints.exists() and name_checkpoint(step).encode() in checkpoints.read()


def drain(rig, node, deadline_s):
    """Announces what a cloud would: the node will be taken away."""
    ray = str(Path(sys.executable).with_name("ray"))
    options = ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
    deadline = ["--deadline-remaining-seconds", str(deadline_s)]
    subprocess.run([ray, "drain-node", "--address", rig.cluster.address, *options, *deadline], check=True)


def test_a_preemption_notice_is_answered_by_a_checkpoint_in_time(theatre, tmp_path):
    """No checkpoint is due before the end, so the run resumes from the one that the notice caused."""
    rig, folder = theatre
    train = {"steps": 150, "checkpoint_every": 1000}
    job = write_job(tmp_path, folder / "data", str(tmp_path / "runs"), "preempted", train=train)
    driver = Driver(job, rig.environment())
    assert driver.reaches(8), driver.output[-3000:]
    (node,) = [node for node in rig.nodes if rig.processes("RayTrainWorker", node)]
    drain(rig, node, 30)
    assert driver.says("will be taken away: saving step"), driver.output[-3000:]
    saved = int(re.findall(r"saving step (\d+)", driver.output)[-1])
    # The notice gives 30 s. The upload and its registration by Ray Train take a few of them.
    assert driver.wait_for(lambda: is_noted(run_folder(locate(str(tmp_path / "runs"))), saved)), driver.output[-3000:]
    if node in rig.cluster.worker_nodes:
        rig.cluster.remove_node(node, allow_graceful=False)
    assert driver.finish() == 0, driver.output[-3000:]
    resumed = [int(step) for step in re.findall(r"resuming from step (\d+)", driver.output)]
    assert saved % 5 == 0 and resumed[0] >= saved > 0
    rig.mend()


def test_an_elastic_job_grows_and_shrinks_with_the_cluster(theatre, tmp_path):
    rig, folder = theatre
    rig.num_nodes = 1
    while len(rig.cluster.worker_nodes) > 1:
        rig.cluster.remove_node(rig.nodes.pop())
    cluster = {"workers": [1, 2], "cpus_per_worker": 2, "resize_every_s": 5}
    train = {"steps": 60, "checkpoint_every": 6}
    job = write_job(tmp_path, folder / "data", str(tmp_path / "runs"), "elastic", cluster=cluster, train=train)
    driver = Driver(job, rig.environment())
    assert driver.reaches(8), driver.output[-3000:]
    assert len(rig.processes("RayTrainWorker")) == 1
    rig.num_nodes = 2
    rig.mend()
    assert driver.says("with 2"), driver.output[-3000:]
    after = driver.step
    assert driver.reaches(after + 8)
    rig.cluster.remove_node(rig.nodes[-1], allow_graceful=False)
    assert driver.says("with 1"), driver.output[-3000:]
    assert driver.finish() == 0, driver.output[-3000:]
    run = run_folder(locate(str(tmp_path / "runs")))
    assert list_checkpoint_steps(run)[-1] == 60
    record = read_record(Path(run.child(name_checkpoint(60)).path))
    # Two images a worker and step: somewhere between what one and two workers would have seen.
    assert record["step"] == 60 and 120 < record["num_images_seen"] < 240
    rig.mend()


def test_with_the_head_gone_the_job_goes_on_in_a_new_cluster(theatre, tmp_path):
    rig, folder = theatre
    job = write_job(tmp_path, folder / "data", str(tmp_path / "runs"), "beheaded")
    driver = Driver(job, rig.environment())
    assert driver.reaches(13), driver.output[-3000:]
    rig.close()
    assert driver.finish() != 0, "nothing is left to train on"
    rig.open()
    again = Driver(job, rig.environment(), "--resume")
    assert again.finish() == 0, again.output[-3000:]
    assert "resumes this run" in again.output
    record = read_record(Path(run_folder(locate(str(tmp_path / "runs"))).child(name_checkpoint(24)).path))
    assert (record["step"], record["num_images_seen"]) == (24, 96)
