"""What must hold at the end of a run that something went wrong in: step, checkpoint, and no label lost."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from corun_ray.core.training.checkpoint_record import read_record
from corun_ray.core.training.checkpoints import load_network
from corun_ray.core.training.labels import supersedes
from corun_ray.service.pool import snapshots
from corun_ray.service.pool.index import Head
from corun_ray.service.runs.record import RUN_FILE
from corun_ray.service.runs.record import read_record as read_run
from corun_ray.service.storage import Location
from corun_ray.service.train.recovery import STATE_FILE
from tests.faults.rig import STEPS

DONE = 0


def run_folder(storage: Location) -> Location:
    """The folder of the only run that began there."""
    (name,) = [name for name in storage.list_folders() if storage.child(name).child(RUN_FILE).exists()]
    return storage.child(name)


def _registered(place: Location) -> list[str]:
    """The checkpoints that Ray Train has taken note of, in order."""
    if not place.child(STATE_FILE).exists():
        return []
    return [one["checkpoint_dir_name"] for one in json.loads(place.child(STATE_FILE).read())["checkpoint_results"]]


def last_labels(storage: Location) -> dict[str, Head]:
    """The labels that the last checkpoint holds, by key."""
    place = run_folder(storage)
    checkpoints = _registered(place)
    if not checkpoints:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        return _labels(place, place.child(checkpoints[-1]).download(Path(folder)))


def _labels(place: Location, checkpoint: Path) -> dict[str, Head]:
    pool = place.child("pool")
    snapshot = snapshots.read(pool.child(read_record(checkpoint)["extra"]["pool_snapshot"]))
    assert sum(1 for _ in snapshots.read_labels(pool, snapshot)) == snapshot.labels, "every label has its images"
    return {key: head for key, (head, _) in snapshots.read_index(pool, snapshot).items()}


def problems(code: int, storage: Location, held: dict[str, Head], steps: int = STEPS) -> Iterator[str]:
    """What does not hold at the end of a run of so many steps, which had the labels `held` before."""
    if code != DONE:
        yield f"exit code {code}"
        return
    place = run_folder(storage)
    if read_run(place).model is None:
        yield "the run's record names no model"
    checkpoints = _registered(place)
    with tempfile.TemporaryDirectory() as folder:
        last = place.child(checkpoints[-1]).download(Path(folder))
        if (step := read_record(last)["step"]) != steps:
            yield f"the last checkpoint is of step {step}, not {steps}"
        load_network(last)
        labels = _labels(place, last)
    lost = [key for key, head in held.items() if key not in labels or not supersedes(labels[key].scores, head.scores)]
    if lost:
        yield f"labels lost or worse than before: {', '.join(lost)}"
    if len(labels) != 6:
        yield f"{len(labels)} labels for 6 hazy images"
