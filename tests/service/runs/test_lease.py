"""Who drives a run, in a folder and in a bucket: one driver at a time, as long as it shows that it lives."""

import os
import subprocess
import sys
import threading
import time

import pytest

from corun_ray.service.runs import lease
from corun_ray.service.runs.lease import (
    DriverRecord,
    Lease,
    RunDriven,
    RunTaken,
    find_driver,
    refuse_driven,
    refuse_taken,
)
from corun_ray.service.storage import StorageError, locate


@pytest.fixture(params=["folder", "bucket"])
def run(request, tmp_path, monkeypatch):
    """A run's folder; what takes a driver seconds takes fractions here."""
    monkeypatch.setattr(lease, "SETTLE_S", 0.2)
    monkeypatch.setattr(lease, "RENEW_EVERY_S", 0.1)
    if request.param == "folder":
        return locate(str(tmp_path / "run"))
    return locate(f"{request.getfixturevalue('bucket')}/{tmp_path.name}/run")


def write_driver(run, number, age_s, **changes):
    """Writes the file of a driver that is not this process, last renewed so long ago."""
    record = lease.describe_this_process().model_copy(update={"host": "far", "machine": "other", "pid": 71, **changes})
    place = run.child(f"drivers/{number:06d}.json")
    place.write(record.model_dump_json().encode())
    if run.is_local:
        os.utime(place.path, (time.time() - age_s,) * 2)
    return place


def test_a_second_driver_is_refused_and_told_whose_the_run_is(run, monkeypatch):
    monkeypatch.setenv(lease.JOB_VARIABLE, '{"metadata": {"job_submission_id": "tiny-7"}}')
    with Lease.take(run) as first:
        assert first.place.exists()
        with pytest.raises(RunDriven) as refused:
            Lease.take(run)
        assert f"is in use by process {os.getpid()} of " in str(refused.value) and "\n" not in str(refused.value)
        assert "Ray job tiny-7" in str(refused.value) and "corun-ray jobs stop tiny-7" in str(refused.value)
        with pytest.raises(RunDriven):
            refuse_driven(run)
        assert [name for name in run.list_files() if name.startswith("drivers/")] == ["drivers/000001.json"]
    assert find_driver(run) is None
    Lease.take(run).release()


def test_of_many_that_reach_for_a_run_at_once_one_gets_it(run):
    write_driver(run, 1, age_s=3600) if run.is_local else None
    leases, refused = [], []

    def reach():
        try:
            leases.append(Lease.take(run))
        except RunDriven as error:
            refused.append(error)

    threads = [threading.Thread(target=reach) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(leases), len(refused)) == (1, 3)
    assert find_driver(run).number == (2 if run.is_local else 1)
    leases[0].release()


def test_a_driver_that_lost_its_run_says_so_and_writes_no_more(run):
    lost, told = threading.Event(), []
    first = Lease.take(run)
    first.call_on_loss(lambda error: (told.append(error), lost.set()))
    write_driver(run, 2, age_s=0)
    first.place.delete()

    assert lost.wait(20)
    assert isinstance(told[0], RunTaken) and "taken over by process 71 of" in str(told[0]), str(told[0])
    assert not first.place.exists(), "it is not written again"
    refuse_taken(first.place)
    run.child("run.json").write(b"")
    with pytest.raises(RunTaken):
        refuse_taken(first.place)

    # A renewal that was under way may write it after all; the run is the other's nevertheless.
    first.place.write(b"{}")
    with pytest.raises(RunTaken):
        refuse_taken(first.place)
    first.release()
    assert find_driver(run).number == 2, "the other's file stays"


@pytest.mark.parametrize(("age_s", "is_alive"), [(0, True), (50, True), (70, False)])
def test_the_store_s_clock_tells_who_lives(tmp_path, monkeypatch, age_s, is_alive):
    run = locate(str(tmp_path))
    write_driver(run, 3, age_s)
    monkeypatch.setattr("time.time", lambda: 0.0)  # the clock of this machine is wrong
    driver = find_driver(run)
    assert driver.number == 3 and driver.is_alive == is_alive and abs(driver.age_s - age_s) < 5
    if is_alive:
        with pytest.raises(RunDriven, match=rf"process 71 of \w+ on far, whose last sign of life is {age_s}"):
            refuse_driven(run)


def test_a_dead_process_of_this_machine_is_known_at_once(tmp_path):
    run = locate(str(tmp_path))
    code = "from corun_ray.service.runs.lease import describe_this_process as d; print(d().model_dump_json())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    dead = DriverRecord.model_validate_json(ended.stdout)
    assert dead.is_gone() and not lease.describe_this_process().is_gone()
    assert dead.model_copy(update={"pid": os.getpid()}).is_gone(), "another process has its number now"
    assert not dead.model_copy(update={"machine": "other"}).is_gone()

    # A process that was stopped renews nothing, and lives.
    place = write_driver(
        run, 1, age_s=3600, machine=lease.identify_machine(), pid=1, start_ticks=lease.read_start_ticks(1)
    )
    assert find_driver(run).is_alive
    place.delete()

    run.child("drivers/000001.json").write(dead.model_dump_json().encode())
    Lease.take(run).release()


def test_a_store_that_is_away_for_a_while_costs_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_EVERY_S", 0.05)
    run = locate(str(tmp_path))
    with Lease.take(run) as held:
        tried = threading.Event()

        def fail(place):
            tried.set()
            raise StorageError("away")

        with monkeypatch.context() as patched:
            patched.setattr("corun_ray.service.storage.Location.list_infos", fail)
            assert tried.wait(20)
        os.utime(held.place.path, (0, 0))
        deadline_s = time.monotonic() + 20
        while os.path.getmtime(held.place.path) == 0 and time.monotonic() < deadline_s:
            time.sleep(0.02)
        assert os.path.getmtime(held.place.path) > 0, "renewed again"
