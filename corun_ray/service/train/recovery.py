"""Where a run goes on when Ray Train is started again on its folder: Ray's own list of checkpoints, or the folders."""

import json
import tempfile
from pathlib import Path

import ray

from corun_ray.core.training.checkpoints import CheckpointError, read_record
from corun_ray.service.runs.record import list_checkpoint_steps, name_checkpoint
from corun_ray.service.storage import Location, MissingFile

STATE_FILE = "checkpoint_manager_snapshot.json"
"""Ray Train's list of a run's checkpoints. It is overwritten in place: a full disk or a crash may leave half of it."""


def find_start_checkpoint(run: Location) -> str | None:
    """The checkpoint to go on from where Ray Train's own list is not there or cannot be used; it is deleted then.

    None where the list is good, or there is no whole checkpoint. Raises `StorageError`.
    """
    if _is_usable(run):
        return None
    run.child(STATE_FILE).delete()
    for step in reversed(list_checkpoint_steps(run)):
        if _is_whole(run.child(name_checkpoint(step))):
            return run.child(name_checkpoint(step)).uri
    return None


def find_last_step(run: Location) -> int | None:
    """The step of the run's last whole checkpoint, None if there is none; raises `StorageError`."""
    steps = (step for step in reversed(list_checkpoint_steps(run)) if _is_whole(run.child(name_checkpoint(step))))
    return next(steps, None)


def _is_usable(run: Location) -> bool:
    try:
        state = json.loads(run.child(STATE_FILE).read())
        names = {one["checkpoint_dir_name"] for one in state["checkpoint_results"]}
        return state["ray_version"] == ray.__version__ and names <= set(run.list_folders())
    except (MissingFile, KeyError, TypeError, ValueError):
        return False


def _is_whole(checkpoint: Location) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            read_record(checkpoint.download(Path(folder)))
        except CheckpointError:
            return False
    return True
