"""The faults of the matrix: what each does to a run that is under way, and what a person does after it, if anything."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import numpy as np

from tests.faults.rig import Driver, Rig, kill
from tests.faulty_s3 import FaultyS3

OUTAGE_S = 20.0
DISK_MIB = 96
FULL_TEXT = "No space left on device"
WRONG_REQUEST = 2


@dataclass
class Scene:
    """A run and everything around it that a fault may break."""

    rig: Rig
    driver: Driver
    rng: np.random.Generator
    store: FaultyS3
    disk: Path
    """A small disk of its own, where the run keeps its checkpoints if the fault is about that."""
    job: Path
    problems: list[str] = field(default_factory=list)
    """What a fault that can see it by itself found wrong."""


@dataclass(frozen=True)
class Fault:
    """`strike` breaks something; the run's storage is a folder, a bucket or a small disk."""

    name: str
    strike: Callable[[Scene], None]
    storage: str = "folder"


def _one_of(scene: Scene, title: str) -> None:
    found = scene.rig.processes(title)
    if found:
        kill(found[scene.rng.integers(len(found))])


def training_worker(scene: Scene) -> None:
    """kill -9 of one of the two training workers."""
    _one_of(scene, "RayTrainWorker")


def pool_shard(scene: Scene) -> None:
    """kill -9 of one of the pool's two shards."""
    _one_of(scene, "PoolShard")


def worker_node(scene: Scene) -> None:
    """Every process of a node that runs training workers or a shard, at once."""
    busy = [node for node in scene.rig.nodes if scene.rig.processes("RayTrainWorker", node)]
    idle = [node for node in scene.rig.nodes if node not in busy and scene.rig.processes("PoolShard", node)]
    nodes = busy + idle
    if nodes:
        scene.rig.cluster.remove_node(nodes[scene.rng.integers(len(nodes))], allow_graceful=False)


def controller(scene: Scene) -> None:
    """kill -9 of Ray Train's controller."""
    _one_of(scene, "TrainController")


def driver(scene: Scene) -> None:
    """kill -9 of the process that the user started."""
    scene.driver.kill()


def store_outage(scene: Scene) -> None:
    """Nothing answers where the object store was, for 20 s."""
    scene.store.fault("outage")
    time.sleep(OUTAGE_S)
    scene.store.fault(None)


def disk_full(scene: Scene) -> None:
    """No room on the disk of the checkpoints, until the run has said so."""
    balloon = scene.disk / "balloon"
    with contextlib.suppress(OSError), balloon.open("wb") as file:
        while True:
            file.write(bytes(2**16))
            file.flush()
    scene.driver.says(FULL_TEXT)
    balloon.unlink()


def second_driver(scene: Scene) -> None:
    """The same job started again with --resume while it runs, as in another terminal; it must be refused."""
    second = Driver(scene.job, scene.rig.environment(), "--resume")
    code = second.finish()
    if code != WRONG_REQUEST or "is in use by process" not in second.output:
        scene.problems.append(f"the second driver ended with {code}: {second.output[-300:]}")


def reader_gone(scene: Scene) -> None:
    """Nobody reads what the driver prints any more, as behind a closed terminal."""
    scene.driver.stop_reading()


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("training worker", training_worker),
        Fault("pool shard", pool_shard),
        Fault("worker node", worker_node),
        Fault("controller", controller),
        Fault("driver", driver),
        Fault("object store outage", store_outage, "bucket"),
        Fault("disk full", disk_full, "disk"),
        Fault("second driver", second_driver, "bucket"),
        Fault("reader gone", reader_gone),
    )
}


@contextlib.contextmanager
def storage_for(fault: Fault, folder: Path, name: str) -> Iterator[str]:
    """Where a run keeps its things: a folder, a new bucket, or a small disk; raises OSError where none can be had."""
    if fault.storage == "bucket":
        boto3.client("s3").create_bucket(Bucket=name)
        yield f"s3://{name}/runs"
    elif fault.storage == "disk":
        disk = folder / "disk"
        disk.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs"]
        if subprocess.run(["mount", *options, str(disk)], capture_output=True, check=False).returncode:
            raise OSError("a small disk cannot be mounted here")
        try:
            yield str(disk / "runs")
        finally:
            shutil.rmtree(disk / "runs", ignore_errors=True)
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
    else:
        yield str(folder / "runs")
