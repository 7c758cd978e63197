"""What a training leaves when its last step is done: a report, a model, and a version in the registry."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ray.train import Result

from corun_ray.config.jobs import TrainingJob
from corun_ray.service.data.manifest import Manifest
from corun_ray.service.errors import JobFailed
from corun_ray.service.models.card import about_model
from corun_ray.service.models.registry import log_model, register
from corun_ray.service.models.sources import Model
from corun_ray.service.models.tracking import Tracker
from corun_ray.service.report.page import REPORT_FILE
from corun_ray.service.runs.held_out import ValidationLog
from corun_ray.service.runs.record import RunRecord
from corun_ray.service.storage import Location, locate
from corun_ray.service.train.report import training_report


@dataclass(frozen=True)
class Session:
    """What a training job has in hand once all that it needs is there."""

    job: TrainingJob
    manifest: Manifest
    model: Model
    """What it starts from."""
    run: Location
    record: RunRecord
    tracker: Tracker
    facts: Mapping[str, str]
    """What it tells at its begin."""


def keep_outcome(session: Session, result: Result, log: ValidationLog) -> str:
    """Writes the report, logs the model and registers it where the job gives a name; returns its URI.

    Raises `StorageError`, and `JobFailed` for a training without a checkpoint.
    """
    job, run, tracker = session.job, session.run, session.tracker
    if result.checkpoint is None:
        raise JobFailed("training ended without a checkpoint")
    saved = Location(result.checkpoint.path, locate(job.storage).filesystem, result.checkpoint.path)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = saved.download(Path(folder))
        report = training_report(job, run, checkpoint, session.facts, tracker.curves(), log)
        run.child(REPORT_FILE).write(report)
        tracker.file(REPORT_FILE, report)
        about = about_model(job, session.model.spec, session.record.data, run, log)
        model_uri = log_model(tracker.uri, checkpoint, session.model.code, about)
    return model_uri if job.tracking.register is None else register(tracker.uri, model_uri, job.tracking.register)
