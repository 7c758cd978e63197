"""What the driver hands to every training worker."""

from dataclasses import dataclass

import ray
from ray.actor import ActorProxy

from corun_ray.config.jobs import TrainingJob
from corun_ray.service.data.cache import CacheKeeper
from corun_ray.service.data.manifest import Manifest
from corun_ray.service.models.sources import Model
from corun_ray.service.pool.shard import PoolShard
from corun_ray.service.runs.record import POOL_FOLDER
from corun_ray.service.storage import locate
from corun_ray.service.telemetry.prometheus import make_job_labels
from corun_ray.service.train.board import BoardState


@dataclass(frozen=True)
class WorkerPlan:
    """Everything a worker needs to know. The driver makes it; all workers get the same."""

    job: TrainingJob
    run_uri: str
    """Folder of the run's checkpoints, snapshots and pictures."""
    manifest: "ray.ObjectRef[Manifest]"
    model: "ray.ObjectRef[Model]"
    """The network to start from."""
    board: ActorProxy[BoardState]
    shards: tuple[ActorProxy[PoolShard], ...]
    """Actors of the label pool; empty for a job without one."""
    cache: ActorProxy[CacheKeeper] | None = None
    """Cache of decoded images; None for a job without one."""
    start_from: str | None = None
    """Checkpoint to start from where Ray Train knows of none."""
    lease_uri: str | None = None
    """File that is there as long as this driver has its run; without it the workers must leave the folder as it is."""

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the job's metrics and log lines."""
        return make_job_labels(self.job, locate(self.run_uri).name)

    @property
    def pool_uri(self) -> str:
        """Folder of the label pool's segments and snapshots."""
        return locate(self.run_uri).child(POOL_FOLDER).uri
