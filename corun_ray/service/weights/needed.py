"""The networks that judge a Colabator run, built from the job's sections: scorers and the features of the losses."""

import contextlib
import functools
from collections.abc import Callable

from corun_ray.config.jobs import ColabatorJob, EvaluateJob, Job, TrainingJob
from corun_ray.core.choices import QUALITY_NAMES
from corun_ray.core.metrics.measure import load_measure
from corun_ray.core.scoring.daclip import DACLIP_FILE
from corun_ray.core.scoring.quality import load_quality
from corun_ray.core.training.losses import VGG_FILE
from corun_ray.core.weights import WeightsError, WeightsSource, refuse_weights
from corun_ray.service.weights.folder import RecordingSource, WeightsFolder, describe_lacking

NeededFiles = dict[str | None, dict[str, str]]
"""Folder or URI of weights (None: the job names none) → file → the key of the job file that needs it."""


def open_weights(uri: str | None) -> WeightsSource:
    """The weights below a folder or URI of the job file, checked and kept on this node."""
    return refuse_weights if uri is None else WeightsFolder(uri)


def describe_missing_weights(needed: NeededFiles) -> list[str]:
    """One line for each of `find_needed_files` that cannot be used as it is; raises `WeightsError`."""
    return [f"weights: {line}" for folder, wanted in needed.items() for line in describe_lacking(folder, wanted)]


def find_needed_files(job: Job) -> NeededFiles:
    """The weight files that a job needs.

    What a metric of pyiqa needs is found by building it: where its first file is missing, later ones stay unknown.
    """
    needed: NeededFiles = {}
    if isinstance(job, ColabatorJob):
        section = job.coherence
        if section.clarity == "daclip":
            needed.setdefault(section.weights, {})[DACLIP_FILE] = "coherence.clarity daclip"
        if section.quality not in QUALITY_NAMES:
            asked = _asked(section.weights, lambda source: load_quality(section.quality, source, section.quality_range))
            needed.setdefault(section.weights, {}).update(dict.fromkeys(asked, f"coherence.quality {section.quality}"))
    if isinstance(job, TrainingJob) and job.loss.perceptual == "vgg19":
        needed.setdefault(job.loss.weights, {})[VGG_FILE] = "loss.perceptual vgg19"
    if isinstance(job, EvaluateJob):
        for metric in job.evaluate.metrics:
            asked = _asked(job.evaluate.weights, functools.partial(load_measure, metric))
            needed.setdefault(job.evaluate.weights, {}).update(dict.fromkeys(asked, f"evaluate.metrics {metric}"))
    return {folder: files for folder, files in needed.items() if files}


def _asked(folder: str | None, load: Callable[[WeightsSource], object]) -> list[str]:
    """The files that a metric asks for while it is built, as far as that gets."""
    source = RecordingSource(open_weights(folder))
    with contextlib.suppress(WeightsError):  # of the file that is missing, or that the listing will show
        load(source)
    return source.asked
