"""One rank's part in a checkpoint: everything needed to resume the run, as of one step.

The label pool and a copy of the state are fixed while all ranks stand still. A background thread then writes, beside
further steps, segments, snapshot and checkpoint in this order, and Ray Train registers the checkpoint last. So a crash
on the way leaves the last good one.
"""

import contextlib
import math
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ray
import ray.train
from ray.actor import ActorProxy
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.collective import barrier

from corun_ray.core.networks.spec import NetworkSpec
from corun_ray.core.training import checkpoints
from corun_ray.core.training.state import TrainState
from corun_ray.service.pool import snapshots
from corun_ray.service.pool.client import PoolClient, PoolError
from corun_ray.service.pool.keeper import PoolKeeper
from corun_ray.service.pool.shard import ShardSave
from corun_ray.service.runs.lease import RunTaken, refuse_taken
from corun_ray.service.runs.record import list_checkpoint_steps, name_checkpoint
from corun_ray.service.storage import Location, StorageError
from corun_ray.service.telemetry.logs import Log
from corun_ray.service.train.board import BoardState
from corun_ray.service.train.failures import describe_cause

PREEMPTION_EVERY_STEPS = 5
"""Steps between two looks for preemption notices. Each look is a round trip of all ranks."""


@dataclass(frozen=True)
class FrozenPool:
    """The label pool as of a step, and the keeper that finishes saving it."""

    keeper: PoolKeeper
    parts: list[ShardSave]


class Checkpointer:
    """Saves the state of a run on rank 0, with the labels of all ranks. All ranks call `save` at the same steps."""

    def __init__(
        self,
        run: Location,
        state: TrainState,
        spec: NetworkSpec,
        seed: int,
        rank: int,
        board: ActorProxy[BoardState],
        log: Log,
        best: str | None = None,
        lease: Location | None = None,
    ) -> None:
        """Prepare to save `state`; `best` is the metric by which Ray Train chooses the checkpoints to keep.

        Without the file `lease`, if one is given, the run belongs to another driver, and nothing is written or deleted.
        """
        self._lease = lease
        self._run, self._state, self._spec, self._seed = run, state, spec, seed
        self._rank, self._board, self._log, self._best = rank, board, log, best
        self._last_step = -1
        self._is_idle = threading.Event()
        """Set while no upload is under way."""
        self._is_idle.set()

    def save(self, client: PoolClient | None, keeper: PoolKeeper | None, scores: Mapping[str, float]) -> None:
        """Save the run as of now, once a step, in the background.

        `scores` are the finite means of a validation after this step, if there was one. The snapshot holds every label
        that any rank has offered so far. Waits for the save before this one.

        Raises `PoolError`.
        """
        step = self._state.step
        if step == self._last_step:
            return
        self._last_step = step

        # 1. One save at a time: two would each need a copy of the state.
        self._is_idle.wait()

        # 2. Fix the label pool, once the shards have decided on the offers of all ranks.
        if client is not None:
            client.settle()
            barrier()
        pool = None if keeper is None else FrozenPool(keeper, keeper.freeze())

        # 3. Report the step. Ray Train waits for the report of every rank; only rank 0 has a checkpoint to add.
        # Every score goes into Ray Train's list, so that a resumed run may choose by another. NaN ranks last.
        metrics = {"step": step, "num_images_seen": self._state.num_images_seen, **scores}
        if self._best is not None:
            metrics.setdefault(self._best, math.nan)
        if self._rank != 0:
            ray.train.report(metrics, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
            return

        # 4. Copy the state to a local folder, and start the upload beside further steps.
        folder = self._write_locally(step, has_pool=keeper is not None)
        self._is_idle.clear()
        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_dir_name=name_checkpoint(step),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=lambda checkpoint, name: self._upload(step, checkpoint, name, pool),
        )

    def discard_later(self) -> None:
        """Delete checkpoints of later steps than the state's.

        Their run crashed before Ray Train registered them.

        Raises `RunTaken`.
        """
        refuse_taken(self._lease)
        for step in list_checkpoint_steps(self._run):
            if step > self._state.step:
                self._run.child(name_checkpoint(step)).delete()

    def _write_locally(self, step: int, has_pool: bool) -> str:
        """Write the state, with the name of its pool snapshot, to a local folder."""
        folder = tempfile.mkdtemp(prefix="corun-checkpoint-")
        extra = {"pool_snapshot": snapshots.format_name(step) if has_pool else None, "seed": self._seed}
        checkpoints.save_run(Path(folder), self._state, self._spec, extra)
        return folder

    def _upload(self, step: int, checkpoint: Checkpoint, name: str, pool: FrozenPool | None) -> Checkpoint:
        """Write pool and checkpoint to storage, or report the failure.

        Runs in a thread of Ray Train's, which calls again if an object store asks for a retry.
        """
        try:
            refuse_taken(self._lease)
        except Exception:
            self._is_idle.set()
            raise

        try:
            return self._write_to_storage(step, checkpoint, name, pool)
        except Exception as error:
            self._log.error("checkpoint failed", step=step)
            ray.get(self._board.post_error.remote(self._rank, describe_cause(error), traceback.format_exc()))
            # Half of a checkpoint only takes room. What lies there may be of another driver by now.
            with contextlib.suppress(RunTaken, StorageError):
                refuse_taken(self._lease)
                self._run.child(name).delete()
            raise
        finally:
            self._is_idle.set()

    def _write_to_storage(self, step: int, checkpoint: Checkpoint, name: str, pool: FrozenPool | None) -> Checkpoint:
        """Write segments, snapshot and checkpoint, then sweep the pool."""
        started_s = time.monotonic()

        # The snapshot comes before the checkpoint that names it.
        if pool is not None:
            pool.keeper.finish(step, pool.parts)
        persisted = ray.train.get_context().get_storage().persist_current_checkpoint(checkpoint, name)

        # A failed sweep is no failure of the checkpoint: the next sweep deletes the rest.
        refuse_taken(self._lease)
        if pool is not None:
            try:
                pool.keeper.sweep([*list_checkpoint_steps(self._run), step])
            except (PoolError, StorageError) as error:
                self._board.post_note.remote(f"old labels could not be deleted yet: {error}")

        self._log.info("checkpoint saved", step=step, seconds=round(time.monotonic() - started_s, 3))
        self._board.post_saved.remote(step)
        return persisted


class PreemptionWatch:
    """One rank's part in looking for notices that nodes will be taken away."""

    def __init__(self, rank: int, board: ActorProxy[BoardState], log: Log) -> None:
        self._rank, self._board, self._log = rank, board, log
        self._nodes: list[str] = []

    def is_due(self, step: int) -> bool:
        """Tell all ranks alike whether a preemption has just been announced."""
        if step % PREEMPTION_EVERY_STEPS:
            return False

        # All ranks ask together, and Ray Train gives all the same answer.
        info = ray.train.get_preemption_info()
        if info is None or info.preempted_node_ids == self._nodes:
            return False
        self._nodes = info.preempted_node_ids

        if self._rank == 0:
            self._log.warning("preemption announced", step=step, nodes=self._nodes)
            text = f"{len(self._nodes)} of the workers' nodes will be taken away: saving step {step}"
            self._board.post_note.remote(text)
        return True
