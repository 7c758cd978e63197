"""When a version becomes the champion: only if held-out images show that it is better."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from corun_ray.core.metrics.catalog import all_metrics
from corun_ray.service.models.registry import Registry, Version
from corun_ray.service.models.tracking import TrackingError
from corun_ray.service.report.statistics import compare
from corun_ray.service.runs.held_out import ValidationLog

HELD_OUT_TAG = "corun_ray.held_out"
"""The tag of a version that tells on which images it was measured: a digest of each set, `SET=DIGEST` by spaces."""


@dataclass(frozen=True)
class Decision:
    """Whether the champion moves, and why."""

    moves: bool
    reason: str


@dataclass(frozen=True)
class Record:
    """What one version was measured at in the end."""

    label: str
    values: Mapping[str, Mapping[str, float]]
    """Metric such as `val/fade` → image → value."""
    held_out: Mapping[str, str]
    """Set → digest of what is in it."""


def promote(registry: Registry, name: str, version_or_alias: str, if_better: str | None) -> Decision:
    """Makes a version the champion, with `if_better` only where that metric shows it to be better.

    Raises `TrackingError`, also for a metric that nobody measures.
    """
    version, champion = registry.version(name, version_or_alias), registry.champion(name)
    if if_better is not None and if_better.rpartition("/")[2] not in all_metrics():
        raise TrackingError(f"--if-better {if_better}: no metric of pictures (val/fade, val/psnr, ...)")
    if champion is not None and champion.number == version.number:
        return Decision(False, f"{version} is the champion already")
    if if_better is None or champion is None:
        old = "there was none before" if champion is None else f"it was {champion}"
        decision = Decision(True, old)
    else:
        decision = decide(_record(registry, version), _record(registry, champion), if_better)
    if decision.moves:
        registry.crown(version)
    return decision


def decide(new: Record, old: Record, metric: str) -> Decision:
    """Whether `new` takes the place of `old`."""
    for record in (new, old):
        if metric not in record.values:
            known = ", ".join(record.values) or "nothing"
            return Decision(False, f"{record.label} was not measured by {metric} (it has {known})")
    prefix, _, name = metric.rpartition("/")
    if new.held_out.get(prefix) != old.held_out.get(prefix):
        return Decision(False, f"{new.label} and {old.label} were measured on different images ({prefix})")
    images = sorted(new.values[metric].keys() & old.values[metric].keys())
    mine, theirs = (np.array([record.values[metric][image] for image in images]) for record in (new, old))
    found = compare(mine, theirs, all_metrics()[name].lower_better)
    account = (
        f"{metric} {mine.mean():.4f} against {theirs.mean():.4f} of {old.label}, "
        f"better on {found.better} of {found.difference.count} images (p {found.p_value:.3f}): {found.verdict}"
    )
    return Decision(found.verdict == "better", account)


def _record(registry: Registry, version: Version) -> Record:
    log: ValidationLog = registry.validation(version)
    last = {} if log.last_step is None else log.at(log.last_step)
    pairs = (part.partition("=") for part in version.tags.get(HELD_OUT_TAG, "").split())
    return Record(
        str(version),
        {f"{prefix}/{metric}": images for (prefix, metric), images in last.items()},
        {prefix: digest for prefix, _, digest in pairs},
    )
