"""Job files as a whole: reading, `--set`, pipelines, the dump."""

import os
from pathlib import Path
from typing import Any

import pytest

from corun_ray.config.jobs import ColabatorJob, EvaluateJob, PretrainJob
from corun_ray.config.loading import JobFileError, dump_job, load_jobs
from corun_ray.config.reference import find_section, list_keys
from tests.jobtexts import COLABATOR, EVALUATE, PIPELINE, PRETRAIN, SERVE, load, load_training, mistakes


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    picture = tmp_path / "picture.yaml"
    picture.write_bytes(b"a: 1\n\xff\xd8\xff")
    for path, line in [
        (tmp_path / "none.yaml", f"{tmp_path / 'none.yaml'}: no such file or directory"),
        (tmp_path, f"{tmp_path}: is a directory"),
        (picture, f"{picture}:2: not a text file (UTF-8)"),
    ]:
        with pytest.raises(JobFileError) as caught:
            load_jobs(path)
        assert caught.value.lines == [line]


def test_the_environment_is_the_process_s_own_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "CORUN_TEST_SEED", "12")
    path = tmp_path / "job.yaml"
    path.write_text(PRETRAIN + "seed: ${CORUN_TEST_SEED}")
    assert load_jobs(path)[0].seed == 12


def test_set_replaces_adds_and_takes_yaml(tmp_path: Path) -> None:
    job = load_training(
        tmp_path,
        COLABATOR + "haze: {beta: [1, 2]}\ntrain: {steps: 5, log_every: 2}\noptim:\n",
        *("train.steps=20", "haze.beta=[0.5, 1.5]", "data.validation.hazy=s3://b/v?a=b", "optim.lr=1e-3"),
        *(
            "cluster={workers: 2, cpus_per_worker: 0.5}",
            "tracking.uri=",
            "network.init=${INIT:-a.pth}",
            "seed=4",
        ),
    )
    assert (job.train.steps, job.train.log_every, job.haze.beta) == (20, 2, (0.5, 1.5))
    assert job.data.validation and job.data.validation.hazy == "s3://b/v?a=b"
    assert (job.optim.lr, job.cluster.workers, job.cluster.cpus_per_worker) == (1e-3, (2, 2), 0.5)
    assert (job.tracking.uri, job.network.init, job.seed) == ("", "a.pth", 4)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("train.steps", "--set train.steps: not key.path=value or job:key.path=value"),
        ("=3", "--set =3: not key.path=value or job:key.path=value"),
        ("a:b:c=3", "--set a:b:c=3: not key.path=value or job:key.path=value"),
        ("haze.beta=[1", "--set haze.beta=[1: not valid YAML (expected ',' or ']', but got '<stream end>')"),
        ("d:seed=3", "--set d:seed=3: no job is named d (the jobs are c)"),
        ("optim.learning_rate=3", "optim.learning_rate: unknown key (did you mean optim.lr?)"),
        ("train.steps.x=3", "train.steps.x: unknown key"),
        ("train.steps=many", 'train.steps: "many" is not a whole number'),
        ("data.clear=${NONE}", "data.clear: environment variable NONE is not set"),
        ("evaluate.hazy=a", "evaluate: not used by a colabator job"),
        ("kind=polish", 'kind: "polish" is not one of pretrain, colabator, tune, evaluate, dehaze, depth, serve'),
    ],
)  # fmt: skip
def test_bad_settings_are_one_line(tmp_path: Path, setting: str, line: str) -> None:
    assert mistakes(tmp_path, COLABATOR, setting) == [line]


def test_a_serve_job_is_the_last_of_its_file(tmp_path: Path) -> None:
    assert [job.kind for job in load(tmp_path, f"{PRETRAIN}---\n{SERVE}")] == ["pretrain", "serve"]
    line = "job s: kind: serve runs until it is stopped, so it must be the last job of its file"
    assert mistakes(tmp_path, f"{SERVE}---\n{PRETRAIN}") == [line]


def test_pipeline_of_three_kinds(tmp_path: Path) -> None:
    jobs = load(tmp_path, "#!/usr/bin/env -S python3 -m corun_ray run\n" + PIPELINE + "---\n")
    assert [type(job) for job in jobs] == [PretrainJob, ColabatorJob, EvaluateJob]


def test_set_reaches_every_job_that_has_the_key_or_the_named_one(tmp_path: Path) -> None:
    settings = (
        "train.steps=20",
        "c:train.steps=30",
        "storage=s3://b",
        "tracking.uri=http://m",
        "p:haze={beta: [1, 1]}",
    )
    first, second, third = load(tmp_path, PIPELINE, *settings, "haze.airlight_tint=0.5", "e:evaluate.models.m=a.pth")
    assert isinstance(first, PretrainJob) and isinstance(second, ColabatorJob) and isinstance(third, EvaluateJob)
    assert (first.train.steps, second.train.steps) == (20, 30)
    assert {job.storage for job in (first, second, third)} == {"s3://b"}
    assert (first.haze.beta, second.haze.beta) == ((1, 1), (0.2, 2.8))
    assert (first.haze.airlight_tint, second.haze.airlight_tint) == (0.5, 0.5)
    assert third.evaluate.models == {"m": "a.pth"}


@pytest.mark.parametrize(
    "text",
    [
        PRETRAIN,
        COLABATOR + "haze: {beta: [1, 1e-0]}\noptim: {lr: 3e-7}\ncluster: {gpus_per_worker: 0.5}",
        EVALUATE.replace("hazy}", "hazy, clear: b, models: {x: models:/a@b, y: '5'}, metrics: [ssim]}"),
        PRETRAIN.replace("clear}", "'null', depth: 'a: b # c', validation: {hazy: ' é\n\n x'}}"),
        PRETRAIN.replace("name: p", "name: '007'\nstorage: '1e5'") + "tracking: {uri: 'true', experiment: ~1}",
    ],
)
def test_dump_loads_to_the_same_job(tmp_path: Path, text: str) -> None:
    (job,) = load(tmp_path, text)
    dumped = dump_job(job)
    assert load(tmp_path, dumped) == [job]
    assert dump_job(load(tmp_path, dumped)[0]) == dumped


def test_dump_shows_every_key_in_order(tmp_path: Path) -> None:
    (job,) = load(tmp_path, COLABATOR)
    lines = dump_job(job).splitlines()
    assert lines[:5] == ["kind: colabator", "name: c", "seed: 0", "storage: runs", "data:"]
    assert {"  depth: null", "  beta: [0.2, 2.8]", "  min_lr: 1.0e-06", "  register: null"} <= set(lines)
    sections: list[Any] = [line[:-1] for line in lines if line.endswith(":") and line[0] != " "]
    assert sections == [
        *("data", "haze", "network", "coherence", "pool", "loss", "optim", "train", "cluster", "tracking")
    ]
    absent = ("data.validation", "data.paired")  # sections that this job leaves out are null
    leaves = [path for path, field in list_keys(ColabatorJob).items() if not find_section(field) or path in absent]
    assert len(lines) == len(sections) + len([path for path in leaves if path.rpartition(".")[0] not in absent])
