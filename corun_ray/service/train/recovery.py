"""The checkpoint from which a restarted Ray Train resumes: by its own list of checkpoints, or by the run's folders."""

import json
import tempfile
from pathlib import Path

import ray

from corun_ray.core.training.checkpoint_record import CheckpointError, read_record
from corun_ray.service.runs.record import list_checkpoint_steps, name_checkpoint
from corun_ray.service.storage import Location, MissingFile

STATE_FILE = "checkpoint_manager_snapshot.json"
"""Ray Train's list of a run's checkpoints. Ray overwrites it in place: a full disk or a crash may leave half of it."""


def find_start_checkpoint(run: Location) -> str | None:
    """Find the checkpoint to resume from without Ray Train's own list.

    Returns its URI if the list is missing or unusable; None if the list is good, or if there is no whole checkpoint.
    An unusable list is deleted, since Ray Train would refuse to start.

    Raises `StorageError`.
    """
    if _has_usable_list(run):
        return None

    run.child(STATE_FILE).delete()
    step = find_last_step(run)
    return None if step is None else run.child(name_checkpoint(step)).uri


def find_last_step(run: Location) -> int | None:
    """Find the step of the run's last whole checkpoint.

    Raises `StorageError`.
    """
    for step in reversed(list_checkpoint_steps(run)):
        if _is_whole(run.child(name_checkpoint(step))):
            return step
    return None


def _has_usable_list(run: Location) -> bool:
    """Tell whether Ray Train's list of checkpoints can be used."""
    # Ray Train refuses a list of another version, or one that names folders that are gone.
    try:
        state = json.loads(run.child(STATE_FILE).read())
        names = {one["checkpoint_dir_name"] for one in state["checkpoint_results"]}
        return state["ray_version"] == ray.__version__ and names <= set(run.list_folders())
    except (MissingFile, KeyError, TypeError, ValueError):
        return False


def _is_whole(checkpoint: Location) -> bool:
    """Tell whether all files of a checkpoint are complete."""
    # Reading the record checks that no file is cut short.
    with tempfile.TemporaryDirectory() as folder:
        try:
            read_record(checkpoint.download(Path(folder)))
        except CheckpointError:
            return False
    return True
