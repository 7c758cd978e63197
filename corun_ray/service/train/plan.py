"""What the driver hands to every training worker."""

from dataclasses import dataclass
from typing import Any

from corun_ray.config.jobs import TrainingJob
from corun_ray.service.runs.record import POOL_FOLDER
from corun_ray.service.storage import locate
from corun_ray.service.telemetry.prometheus import labels_of


@dataclass(frozen=True)
class WorkerPlan:
    """Everything a worker needs to know; made by the driver."""

    job: TrainingJob
    run_uri: str
    """Where the run keeps its checkpoints, snapshots and pictures."""
    manifest: Any
    """Reference to the `Manifest` in the object store."""
    model: Any
    """Reference to the `Model` to start from."""
    board: Any
    shards: tuple[Any, ...]
    """The label pool's actors; none for a job without one."""
    cache: Any = None
    """The keeper of decoded images; None for a job without a cache."""
    start_from: str | None = None
    """The checkpoint to begin with where Ray Train knows of none."""

    @property
    def labels(self) -> dict[str, str]:
        """Those of the job's metrics and log lines."""
        return labels_of(self.job, locate(self.run_uri).name)

    @property
    def pool_uri(self) -> str:
        """Where the label pool keeps its segments and snapshots."""
        return f"{self.run_uri}/{POOL_FOLDER}"
