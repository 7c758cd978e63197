"""A Colabator job on two machines, each a network namespace with its own address; then one's link is cut for 20 s."""

import re
import time
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest

from corun_ray.service.storage import locate
from tests.conftest import CREDENTIALS, make_dataset
from tests.faults.namespaces import STORE_URL, NotAllowed, two_machines
from tests.faults.rig import write_job
from tests.faults.verdict import last_labels, problems

CUT_S = 20.0
# Neither machine has room for two workers; what decodes images fits beside the one of the second.
HEAD_CPUS, WORKER_CPUS, CPUS_PER_WORKER = 2, 3, 1.6


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """Both with Ray on them, and in the store's bucket `haze` a small dataset."""
    environment = pytest.MonkeyPatch()
    try:
        with two_machines(HEAD_CPUS, WORKER_CPUS) as both:
            for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": STORE_URL}.items():
                environment.setenv(name, value)
            data = make_dataset(tmp_path_factory.mktemp("data"))
            store = boto3.client("s3")
            store.create_bucket(Bucket="haze")
            for file in data.rglob("*.*"):
                store.upload_file(str(file), "haze", f"data/{file.relative_to(data)}")
            yield both
    except NotAllowed as reason:
        pytest.skip(f"no network namespaces here: {reason}")
    finally:
        environment.undo()


@contextmanager
def job(machines, folder: Path, name: str, steps: int):
    """The job's driver, on the head, and the job's storage."""
    storage = f"s3://haze/{name}"
    sections = {"train": {"steps": steps}, "cluster": {"cpus_per_worker": CPUS_PER_WORKER}, "pool": {"shards": 1}}
    driver = machines.drive(write_job(folder, "s3://haze/data", storage, name, **sections))
    try:
        yield driver, locate(storage)
    finally:
        driver.kill()


@pytest.mark.slow
def test_two_machines_train_together_and_share_a_pool_on_one_of_them(machines, tmp_path):
    with job(machines, tmp_path, "together", steps=6) as (driver, storage):
        assert driver.reaches(1), driver.output[-3000:]
        both = (machines.net.head, machines.net.worker)
        assert [len(machines.processes("RayTrainWorker", one)) for one in both] == [1, 1]
        assert [len(machines.processes("PoolShard", one)) for one in both] == [0, 1]
        assert not list(problems(driver.finish(), storage, {}, steps=6)), driver.output[-3000:]
        assert "(2 nodes)" in driver.output and "restarted" not in driver.output


@pytest.mark.slow
def test_a_link_that_is_cut_for_20_s_costs_a_wait(machines, tmp_path):
    with job(machines, tmp_path, "cut", steps=48) as (driver, storage):
        held = labels_of_first_checkpoint(driver, storage)
        machines.net.cut(machines.net.worker)
        time.sleep(CUT_S)
        machines.net.mend(machines.net.worker)
        assert not list(problems(driver.finish(), storage, held, steps=48)), driver.output[-3000:]
        said = r"no step for 15 s after step \d+ \(2 nodes in the cluster\)"
        assert re.search(said, driver.output), driver.output[-3000:]
        assert "steps continue after" in driver.output or "workers restarted" in driver.output


@pytest.mark.slow
def test_a_node_that_ray_has_given_up_is_waited_for_until_it_is_started_again(machines, tmp_path):
    worker = machines.net.worker
    with job(machines, tmp_path, "given-up", steps=48) as (driver, storage):
        held = labels_of_first_checkpoint(driver, storage)
        machines.net.cut(worker)
        assert driver.says(f"(1 node in the cluster, lost: {worker.address})"), driver.output[-3000:]
        machines.net.mend(worker)
        assert driver.wait_for(lambda: not machines.processes("raylet", worker)), "a node that was given up ends itself"
        machines.start_ray(worker)
        assert not list(problems(driver.finish(), storage, held, steps=48)), driver.output[-3000:]
        (step,) = re.findall(r"workers restarted: resuming from step (\d+) with 2", driver.output)
        assert int(step) >= 6


def labels_of_first_checkpoint(driver, storage):
    """Waits until Ray Train has taken note of a checkpoint."""
    assert driver.reaches(1) and driver.wait_for(lambda: bool(last_labels(storage))), driver.output[-3000:]
    return last_labels(storage)
