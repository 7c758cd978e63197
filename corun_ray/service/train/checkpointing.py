"""One rank's part in a checkpoint: everything that continuing the run needs, as of one step, written beside the steps.

The pool's content and a copy of the state are fixed while all ranks stand still; segments, snapshot and checkpoint are
then written in the background, in this order, and Ray Train takes note of the checkpoint last. A crash on the way
leaves the last good one.


Notices that nodes are about to be taken away, as all ranks of a training learn of them."""

import contextlib
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.collective import barrier

from corun_ray.core.networks.spec import NetworkSpec
from corun_ray.core.training import checkpoints
from corun_ray.core.training.state import TrainState
from corun_ray.service.pool import snapshots
from corun_ray.service.pool.client import PoolClient, PoolError
from corun_ray.service.pool.keeper import PoolKeeper
from corun_ray.service.pool.shard import ShardSave
from corun_ray.service.runs.record import list_checkpoint_steps, name_checkpoint, parse_checkpoint_step
from corun_ray.service.storage import Location, StorageError
from corun_ray.service.telemetry.logs import Log


class Checkpointer:
    """Saves the state of a run on rank 0, with all ranks' labels; every rank calls `save` at the same steps."""

    def __init__(
        self, run: Location, state: TrainState, spec: NetworkSpec, seed: int, rank: int, board: Any, log: Log
    ) -> None:
        self._run, self._state, self._spec, self._seed, self._rank = run, state, spec, seed, rank
        self._board, self._log = board, log
        self._last_step = -1
        self._is_idle = threading.Event()
        self._is_idle.set()

    def save(self, client: PoolClient | None, keeper: PoolKeeper | None) -> None:
        """Fixes the run as of now and starts writing it; the snapshot holds every label offered by any rank so far.

        Once for a step, however often it is called. Waits for the save before it. Raises `PoolError`.
        """
        step = self._state.step
        if step == self._last_step:
            return
        self._last_step = step
        self._is_idle.wait()
        parts = None
        if client is not None:
            client.settle()
            barrier()
        if keeper is not None:
            parts = keeper.freeze()
        metrics = {"step": step, "num_images_seen": self._state.num_images_seen}
        if self._rank != 0:
            ray.train.report(metrics, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
            return
        folder = tempfile.mkdtemp(prefix="corun-checkpoint-")
        snapshot = None if keeper is None else snapshots.format_name(step)
        extra = {"pool_snapshot": snapshot, "seed": self._seed}
        checkpoints.save_run(Path(folder), self._state, self._spec, extra)
        self._is_idle.clear()

        def upload(checkpoint: Checkpoint, name: str) -> Checkpoint:
            try:
                return self._upload(checkpoint, name, keeper, parts)
            except Exception:
                self._log.error("checkpoint failed", step=step)
                ray.get(self._board.post_error.remote(self._rank, traceback.format_exc()))
                with contextlib.suppress(StorageError):  # half of a checkpoint only takes room
                    self._run.child(name).delete()
                raise
            finally:
                self._is_idle.set()

        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_dir_name=name_checkpoint(step),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=upload,
        )

    def discard_later(self) -> None:
        """Deletes checkpoints from after the state as it stands: written, but not taken note of before a crash."""
        for step in list_checkpoint_steps(self._run):
            if step > self._state.step:
                self._run.child(name_checkpoint(step)).delete()

    def _upload(
        self, checkpoint: Checkpoint, name: str, keeper: PoolKeeper | None, parts: list[ShardSave] | None
    ) -> Checkpoint:
        """Runs in a thread of Ray Train's, which tries again where an object store asks for it."""
        step, started_s = parse_checkpoint_step(name), time.monotonic()
        assert step is not None
        if keeper is not None and parts is not None:
            keeper.finish(step, parts)
        persisted = ray.train.get_context().get_storage().persist_current_checkpoint(checkpoint, name)
        if keeper is not None:
            try:
                keeper.sweep([*list_checkpoint_steps(self._run), step])
            except (PoolError, StorageError) as error:
                self._board.post_note.remote(f"old labels stay for now: {error}")  # the next sweep takes them
        self._log.info("checkpoint saved", step=step, seconds=round(time.monotonic() - started_s, 3))
        self._board.post_saved.remote(step)
        return persisted


PREEMPTION_EVERY = 5
"""Steps between two looks for notices; each is a round trip of all ranks."""


class PreemptionWatch:
    """One rank's part in looking; rank 0 passes news on to the driver."""

    def __init__(self, rank: int, board: Any, log: Log) -> None:
        self._rank, self._board, self._log = rank, board, log
        self._nodes: list[str] = []

    def is_due(self, step: int) -> bool:
        """Whether a preemption has been announced since the last look; all ranks learn the same."""
        if step % PREEMPTION_EVERY:
            return False
        info = ray.train.get_preemption_info()
        is_news = info is not None and info.preempted_node_ids != self._nodes
        if info is not None:
            self._nodes = info.preempted_node_ids
        if is_news and self._rank == 0:
            self._log.warning("preemption announced", step=step, nodes=self._nodes)
            text = f"{len(self._nodes)} of the workers' nodes will be taken away: saving step {step}"
            self._board.post_note.remote(text)
        return is_news
