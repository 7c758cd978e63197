"""One training job under way, as the driver's functions hand it on."""

from dataclasses import dataclass

from corun_ray.config.jobs import TrainingJob
from corun_ray.service.data.cache import JobCaches
from corun_ray.service.data.manifest import Manifest
from corun_ray.service.models.sources import Model
from corun_ray.service.models.tracking import Tracker
from corun_ray.service.runs.lease import Lease
from corun_ray.service.runs.record import RunRecord
from corun_ray.service.storage import Location
from corun_ray.service.telemetry.prometheus import make_job_labels


@dataclass(frozen=True)
class Session:
    """The job, what was prepared for it, and the two places that record it: the run's folder and MLflow."""

    job: TrainingJob
    manifest: Manifest
    model: Model
    """The network to start from."""
    run: Location
    """The run's folder."""
    tracker: Tracker
    """The run in MLflow."""
    record: RunRecord
    lease: Lease
    """What says that this process drives the run."""
    caches: JobCaches
    """The caches of decoded images of the job and of those beside it in its file."""

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the job's metrics and log lines."""
        return make_job_labels(self.job, self.run.name)

    def save_file(self, name: str, content: bytes) -> None:
        """Write a file to the run's folder and log it to MLflow.

        Raises `StorageError`.
        """
        self.run.child(name).write(content)
        self.tracker.log_file(name, content)
