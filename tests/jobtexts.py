"""Small job files, and what reading them gives."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from corun_ray.config.jobs import Job, TrainingJob
from corun_ray.config.loading import JobFileError, load_jobs

PRETRAIN = "kind: pretrain\nname: p\ndata: {clear: clear}\n"
COLABATOR = "kind: colabator\nname: c\ndata: {clear: clear, hazy: hazy}\n"
TUNE = (
    "kind: tune\nname: t\ndata: {clear: clear, hazy: hazy, validation: {hazy: v}}\n"
    "tune: {search: {network.stages: [2, 3]}}\n"
)
EVALUATE = "kind: evaluate\nname: e\nevaluate: {hazy: hazy}\n"
DEHAZE = "kind: dehaze\nname: d\ndehaze: {input: a, output: b, model: m}\n"
DEPTH = "kind: depth\nname: m\ndepth: {input: a, output: b, weights: w}\n"
SERVE = "kind: serve\nname: s\nserve: {model: m}\n"
PIPELINE = f"{PRETRAIN}---\n{COLABATOR}---\n{EVALUATE}"


def load(folder: Path, text: str, *overrides: str, env: Mapping[str, str] | None = None) -> list[Job]:
    path = folder / "job.yaml"
    path.write_text(text, "utf-8")
    return load_jobs(path, overrides, env or {})


def load_training(folder: Path, text: str, *overrides: str, env: Mapping[str, str] | None = None) -> TrainingJob:
    (job,) = load(folder, text, *overrides, env=env)
    assert isinstance(job, TrainingJob)
    return job


def mistakes(folder: Path, text: str, *overrides: str, env: Mapping[str, str] | None = None) -> list[str]:
    with pytest.raises(JobFileError) as caught:
        load(folder, text, *overrides, env=env)
    assert str(caught.value) == "\n".join(caught.value.lines)
    return caught.value.lines
