"""The weight files that a job needs: those of its scorers, losses, metrics and detector.

What builds a scorer or a metric imports torch, so it is imported where a job names one.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence

from corun_ray.config.jobs import ColabatorJob, DepthJob, EvaluateJob, Job, TrainingJob
from corun_ray.config.training import CoherenceSection
from corun_ray.core.choices import QUALITY_NAMES
from corun_ray.core.metrics.catalog import OWN_METRICS, TRANSMISSION_METRICS
from corun_ray.core.weights import WeightsError, WeightsSource, refuse_weights
from corun_ray.service.weights.folder import RecordingSource, WeightsFolder, describe_lacking, locate_model

NeededFiles = dict[str | None, dict[str, str]]
"""Folder or URI of weights (None: the job names none) → file → the key of the job file that needs it."""


def open_weights(uri: str | None) -> WeightsSource:
    """Return the source of weights that a job names.

    `uri` is a folder or URI, or None where the job names none.
    """
    return refuse_weights if uri is None else WeightsFolder(uri)


def describe_missing_weights(needed: NeededFiles) -> list[str]:
    """Return a line for each needed file that is unusable.

    Raises `WeightsError`.
    """
    lines = []
    for folder, wanted in needed.items():
        for line in describe_lacking(folder, wanted):
            lines.append(f"weights: {line}")
    return lines


def find_needed_files(job: Job) -> NeededFiles:
    """Find the weight files that a job needs.

    The files of a pyiqa metric are found by building the metric: where its first file is missing, later ones stay
    unknown.
    """
    needed: NeededFiles = {}

    def add(folder: str | None, files: Sequence[str], key: str) -> None:
        for file in files:
            needed.setdefault(folder, {})[file] = key

    # The scorers that rate candidates for the label pool.
    if isinstance(job, ColabatorJob):
        section = job.coherence
        if section.clarity == "daclip":
            from corun_ray.core.scoring.daclip import DACLIP_FILE

            add(section.weights, [DACLIP_FILE], "coherence.clarity daclip")
        if section.quality not in QUALITY_NAMES:
            add(section.weights, _record_scorer_files(section), f"coherence.quality {section.quality}")

    # The features of the perceptual loss.
    if isinstance(job, TrainingJob) and job.loss.perceptual == "vgg19":
        from corun_ray.core.training.losses import VGG_FILE

        add(job.loss.weights, [VGG_FILE], "loss.perceptual vgg19")

    # The metrics of a validation during training.
    if isinstance(job, TrainingJob):
        weights = job.train.validation_weights
        for metric in job.train.validation_metrics or ():
            add(weights, _record_metric_files(metric, weights), f"train.validation_metrics {metric}")

    # The metrics and the detector of an evaluation.
    if isinstance(job, EvaluateJob):
        weights = job.evaluate.weights
        for metric in job.evaluate.metrics:
            add(weights, _record_metric_files(metric, weights), f"evaluate.metrics {metric}")
        if job.evaluate.detector is not None:
            from corun_ray.core.metrics.detector import get_detector_file

            file = job.evaluate.detector_file or get_detector_file(job.evaluate.detector)
            add(weights, [file], f"evaluate.detector {job.evaluate.detector}")

    # The model of a depth job, a folder of weights by itself.
    if isinstance(job, DepthJob):
        from corun_ray.core.inference.depth import find_model_files

        folder = locate_model(job.depth.weights, job.depth.model)
        add(folder, _record_files(folder, find_model_files), f"depth.model {job.depth.model}")

    return needed


def _record_scorer_files(section: CoherenceSection) -> list[str]:
    """Record the files of a quality scorer of pyiqa."""
    from corun_ray.core.scoring.quality import load_quality

    return _record_files(section.weights, lambda source: load_quality(section.quality, source, section.quality_range))


def _record_metric_files(metric: str, folder: str | None) -> list[str]:
    """Record the files of a metric; this package's own have none."""
    if metric in OWN_METRICS or metric in TRANSMISSION_METRICS:
        return []
    from corun_ray.core.metrics.measure import load_measure

    return _record_files(folder, functools.partial(load_measure, metric))


def _record_files(folder: str | None, load: Callable[[WeightsSource], object]) -> list[str]:
    """Record which files `load` asks for.

    The list ends with the first file that is missing.
    """
    source = RecordingSource(open_weights(folder))
    # A missing file ends the loading; the listing will show it.
    with contextlib.suppress(WeightsError):
        load(source)
    return source.asked
