"""Reading job files: every mistake in one plain line, the environment, `--set`, pipelines, the dump."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from corun_ray.config import (
    KINDS,
    ColabatorJob,
    EvaluateJob,
    Job,
    PretrainJob,
    TrainingJob,
    keys,
    section_of,
)
from corun_ray.jobfile import JobFileError, dump_job, load_jobs

PRETRAIN = "kind: pretrain\nname: p\ndata: {clear: clear}\n"
COLABATOR = "kind: colabator\nname: c\ndata: {clear: clear, hazy: hazy}\n"
EVALUATE = "kind: evaluate\nname: e\nevaluate: {hazy: hazy}\n"
PIPELINE = f"{PRETRAIN}---\n{COLABATOR}---\n{EVALUATE}"


def load(folder: Path, text: str, *overrides: str, env: Mapping[str, str] | None = None) -> list[Job]:
    path = folder / "job.yaml"
    path.write_text(text, "utf-8")
    return load_jobs(path, overrides, env or {})


def load_training(
    folder: Path, text: str, *overrides: str, env: Mapping[str, str] | None = None
) -> TrainingJob:
    (job,) = load(folder, text, *overrides, env=env)
    assert isinstance(job, TrainingJob)
    return job


def mistakes(folder: Path, text: str, *overrides: str, env: Mapping[str, str] | None = None) -> list[str]:
    with pytest.raises(JobFileError) as caught:
        load(folder, text, *overrides, env=env)
    assert str(caught.value) == "\n".join(caught.value.lines)
    return caught.value.lines


def test_five_mistakes_are_five_lines(tmp_path: Path) -> None:
    text = """
kind: pretrian
name: five
network: {stages: 1}
optim: {learning_rate: 1e-4}
train: {steps: many}
"""
    assert mistakes(tmp_path, text) == [
        'kind: "pretrian" is not one of pretrain, colabator, evaluate (did you mean pretrain?)',
        "data.clear: missing (a folder or URI of clear images)",
        "network.stages: 1 is too few (at least 2)",
        "optim.learning_rate: unknown key (did you mean optim.lr?)",
        'train.steps: "many" is not a whole number',
    ]


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("network: {stages: 17}", "network.stages: 17 is too many (at most 16)"),
        ("network: {width: 31}", "network.width: 31 is not a multiple of 2"),
        ("network: {type: vit}", 'network.type: "vit" is not available (only corun so far)'),
        ("pool: {shards: 4}", "pool.shards: 4 is too many (only 1 so far)"),
        ("loss: {perceptual: vgg19}", 'loss.perceptual: "vgg19" is not available (only none so far)'),
        ("optim: {lr: 0}", "optim.lr: 0 is too small (more than 0)"),
        ("optim: {ema: 1}", "optim.ema: 1 is too large (less than 1)"),
        ("optim: {compile: yes}", 'optim.compile: "yes" is not true or false'),
        ("optim: {lr: 1e-7, min_lr: 1e-6}", "optim.min_lr: 1e-06 is more than optim.lr (1e-07)"),
        ("train: {steps: 2.5}", "train.steps: 2.5 is not a whole number"),
        ("train: {steps: true}", "train.steps: true is not a whole number"),
        ("train: 20", "train: 20 is not a mapping of keys"),
        ("haze: {beta: [2.8, 0.2]}", "haze.beta: [2.8, 0.2] is in the wrong order (low first)"),
        ("haze: {beta: [1]}", "haze.beta: [1] is too short ([low, high])"),
        ("haze: {beta: [1, 2, 3]}", "haze.beta: [1, 2, 3] is too long ([low, high])"),
        ("haze: {beta: 1}", "haze.beta: 1 is not a list"),
        ("haze: {airlight: [0.5, 1.5]}", "haze.airlight: 1.5 is too large (at most 1)"),
        ("haze: {airlight_tint: .inf}", 'haze.airlight_tint: ".inf" is not a number'),
        ("haze: {airlight_tint: 1e999}", "haze.airlight_tint: Infinity is not a number"),
        ("tracking: {experiment: ''}", "tracking.experiment: empty"),
        ("storage: s3://a/b", "tracking.uri: needed because storage s3://a/b is not a folder"),
        ("coherence: {block_px: 40}", "data.patch_px: 288 is not a multiple of coherence.block_px (40)"),
        ("evaluate: {hazy: a}", "evaluate: not used by a colabator job"),
        ("lr: 1", "lr: unknown key (did you mean optim.lr?)"),
        ("trian: {}", "trian: unknown key (did you mean train?)"),
        ("cluster: {stages: 3}", "cluster.stages: unknown key (did you mean network.stages?)"),
        ("cluster: {gpus: 3}", "cluster.gpus: unknown key (did you mean cluster.gpus_per_worker?)"),
        ("cluster: {colour: 3}", "cluster.colour: unknown key"),
        ("seed: 1\nseed: 2", "seed: given twice (again in line 5)"),
    ],
)
def test_one_mistake_is_one_line(tmp_path: Path, section: str, line: str) -> None:
    assert mistakes(tmp_path, COLABATOR + section) == [line]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (PRETRAIN + "pool: {}\ncoherence:", [
            "coherence: not used by a pretrain job", "pool: not used by a pretrain job"]),
        ("kind: pretrain\nname: p\ndata: {clear: a, hazy: b}", ["data.hazy: not used by a pretrain job"]),
        (EVALUATE + "optim: {lr: 1}", ["optim: not used by an evaluate job"]),
        ("kind: colabator\nname: c", [
            "data.clear: missing (a folder or URI of clear images)",
            "data.hazy: missing (a folder or URI of real hazy images)"]),
        ("kind: evaluate", [
            "name: missing (lower-case letters, digits, . _ - and no . _ - in front)",
            "evaluate.hazy: missing (a folder or URI of hazy images)"]),
        ("kind: tune\nname: Tune\ntune: {}\ntrain: {steps: x}", [
            'kind: "tune" is not one of pretrain, colabator, evaluate',
            'name: "Tune" is not a name (lower-case letters, digits, . _ - and no . _ - in front)',
            'train.steps: "x" is not a whole number',
            "tune: unknown key"]),
        ("name: n\ndata: {hazy: b, cleer: a}", [
            "kind: missing (pretrain, colabator, evaluate)",
            "data.cleer: unknown key (did you mean data.clear?)"]),
        ("kind: evaluate\nname: e\nevaluate: {hazy: a, metrics: [psnr, ssim]}", [
            "evaluate.metrics: psnr and ssim cannot be measured without evaluate.clear"]),
        ("kind: evaluate\nname: e\nevaluate: {hazy: a, metrics: [fad], models: {a.b: 3, c: ''}}", [
            "evaluate.models.a.b: 3 is not text",
            "evaluate.models.c: empty",
            'evaluate.metrics: "fad" is not one of psnr, ssim, fade (did you mean fade?)']),
    ],
)  # fmt: skip
def test_mistakes_by_kind(tmp_path: Path, text: str, lines: list[str]) -> None:
    assert mistakes(tmp_path, text) == lines


@pytest.mark.parametrize("value", ["{a: 1}", "[[1]]", "'~!'", "-1.5", "true", "1e999", '""'])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_value_is_told_of_its_key(tmp_path: Path, kind: str, value: str) -> None:
    """Whatever stands at whichever key, it is either accepted or told of that key in one line."""
    text = {"pretrain": PRETRAIN, "colabator": COLABATOR, "evaluate": EVALUATE}[kind]
    told = 0
    for path, field in keys(KINDS[kind]).items():
        if section_of(field) or path == "kind":
            continue
        try:
            validation = ["data.validation.hazy=h"] if kind != "evaluate" else []
            load(tmp_path, text, *validation, f"{path}={value}")
        except JobFileError as error:
            told += 1
            assert all(line.startswith(path) and ": " in line for line in error.lines), error.lines
    assert told >= 4


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "1: empty, not a mapping of keys (kind, name, ...)"),
        ("# nothing\n---\n", "1: empty, not a mapping of keys (kind, name, ...)"),
        ("# list\n- a\n- b\n", "2: a list, not a mapping of keys (kind, name, ...)"),
        ("some words", "1: a single value, not a mapping of keys (kind, name, ...)"),
        ("kind: pretrain\nname: a: b\n", "2: not valid YAML (mapping values are not allowed here)"),
        ("a: 1\n\tb: 2\n", "2: not valid YAML (found character '\\t' that cannot start any token)"),
        ("a: 1\nb: !shell x\n", "2: not valid YAML (unknown tag !shell)"),
        ("a: 1\nb: !!int x\n", "2: not valid YAML (not a valid int)"),
        ("a: 1\n? [b]\n: 2\n", "2: not valid YAML (a key must be a word)"),
        ("a: 1\nb: \x01\n", "2: not valid YAML (special characters are not allowed)"),
    ],
)  # fmt: skip
def test_no_job_at_all_is_one_line_with_its_place(tmp_path: Path, text: str, line: str) -> None:
    assert mistakes(tmp_path, text) == [f"{tmp_path / 'job.yaml'}:{line}"]


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


def test_a_list_that_holds_itself_is_refused(tmp_path: Path) -> None:
    assert mistakes(tmp_path, "a: &a [*a]") == [f"{tmp_path / 'job.yaml'}: nested too deeply"]


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    job = load_training(
        tmp_path,
        "kind: pretrain\nname: 2024-01-01\ndata: {clear: no, depth: 1:30}\n"
        "optim: {lr: 5e-5}\ntrain: {steps: 3e3}\nseed: 1_000\ntracking:\n",
    )
    assert (job.name, job.data.clear, job.data.depth) == ("2024-01-01", "no", "1:30")
    assert (job.optim.lr, job.train.steps, job.seed) == (5e-5, 3000, 1000)


def test_environment_fills_in_values_with_their_type(tmp_path: Path) -> None:
    text = """
kind: pretrain                     # a comment may say ${ANYTHING}
name: run-${RUN}-${RUN}
storage: ${STORAGE:-runs}
data: {clear: "${ROOT}/clear", depth: ${DEPTH:-}, validation: ${NONE:-null}}
train: {steps: ${STEPS:-20}, log_every: "${LOG:-5}"}
optim: {lr: ${LR}, compile: ${COMPILE:-true}}
tracking: {uri: ${URI:-}, experiment: ${EXPERIMENT:-a, b: [c}}
"""
    env = {"RUN": "7", "ROOT": "s3://b", "LR": "3e-4", "STORAGE": ""}
    job = load_training(tmp_path, text, env=env)
    assert (job.name, job.storage, job.data.clear) == ("run-7-7", "runs", "s3://b/clear")
    assert (job.data.depth, job.data.validation) == (None, None)
    assert (job.train.steps, job.train.log_every, job.optim.lr, job.optim.compile) == (20, 5, 3e-4, True)
    assert (job.tracking.uri, job.tracking.experiment) == ("", "a, b: [c")
    assert load_training(tmp_path, text, env=env | {"STEPS": "30"}).train.steps == 30
    assert mistakes(tmp_path, text, env=env | {"STEPS": "[1, 2]", "LR": "fast"}) == [
        'optim.lr: "fast" is not a number',
        'train.steps: "[1, 2]" is not a whole number',
    ]


def test_environment_cannot_add_keys(tmp_path: Path) -> None:
    env = {"CLEAR": "a\nseed: 5", "NESTED": "${OTHER}"}
    job = load_training(
        tmp_path, PRETRAIN.replace("{clear: clear}", "{clear: ${CLEAR}, depth: ${NESTED}}"), env=env
    )
    assert (job.seed, job.data.clear, job.data.depth) == (0, "a\nseed: 5", "${OTHER}")


def test_missing_variables_name_key_and_variable(tmp_path: Path) -> None:
    text = PRETRAIN.replace("clear: clear", "clear: '${ROOT}/x'")
    text += "train: {steps: ${STEPS}}\nhaze: {beta: [0.1, ${B}]}\n"
    assert mistakes(tmp_path, text + "seed: ${1A}") == [
        "seed: ${1A} is neither ${VAR} nor ${VAR:-default}",
        "data.clear: environment variable ROOT is not set",
        "haze.beta: environment variable B is not set",
        "train.steps: environment variable STEPS is not set",
    ]
    overrides = "data.clear=a", "train.steps=3", "haze.beta=[1, 2]"
    assert load_training(tmp_path, text, *overrides).train.steps == 3


def test_the_environment_is_the_process_s_own_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert (job.optim.lr, job.cluster.workers, job.cluster.cpus_per_worker) == (1e-3, 2, 0.5)
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
        ("kind=tune", 'kind: "tune" is not one of pretrain, colabator, evaluate'),
    ],
)  # fmt: skip
def test_bad_settings_are_one_line(tmp_path: Path, setting: str, line: str) -> None:
    assert mistakes(tmp_path, COLABATOR, setting) == [line]


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
    first, second, third = load(
        tmp_path, PIPELINE, *settings, "haze.airlight_tint=0.5", "e:evaluate.models.m=a.pth"
    )
    assert (
        isinstance(first, PretrainJob) and isinstance(second, ColabatorJob) and isinstance(third, EvaluateJob)
    )
    assert (first.train.steps, second.train.steps) == (20, 30)
    assert {job.storage for job in (first, second, third)} == {"s3://b"}
    assert (first.haze.beta, second.haze.beta) == ((1, 1), (0.2, 2.8))
    assert (first.haze.airlight_tint, second.haze.airlight_tint) == (0.5, 0.5)
    assert third.evaluate.models == {"m": "a.pth"}


def test_mistakes_of_a_pipeline_name_the_job(tmp_path: Path) -> None:
    unnamed = EVALUATE.replace("name: e\n", "")
    text = f"{PRETRAIN}seed: x\n---\n{COLABATOR}sed: 1\n---\n{unnamed}---\n{EVALUATE}"
    assert mistakes(tmp_path, text) == [
        'job p: seed: "x" is not a whole number',
        "job c: sed: unknown key (did you mean seed?)",
        "job 3: name: missing (lower-case letters, digits, . _ - and no . _ - in front)",
    ]
    assert mistakes(tmp_path, f"{PRETRAIN}---\n{PRETRAIN}seed: x") == [
        'job 2: name: "p" is the name of job 1 as well',
        'job 2: seed: "x" is not a whole number',
    ]
    assert mistakes(tmp_path, PIPELINE, "e:train.steps=3", "sed=4") == [
        "sed: unknown key (did you mean seed?)",
        "job e: train: not used by an evaluate job",
    ]


@pytest.mark.parametrize(
    "text",
    [
        PRETRAIN,
        COLABATOR + "haze: {beta: [1, 1e-0]}\noptim: {lr: 3e-7}\ncluster: {gpus_per_worker: 0.5}",
        EVALUATE.replace("hazy}", "hazy, clear: b, models: {x: models:/a@b, y: '5'}, metrics: [ssim]}"),
        PRETRAIN.replace("clear}", "'null', depth: 'a: b # c', validation: {hazy: ' é\n\n x'}}"),
        PRETRAIN.replace("name: p", "name: '007'\nstorage: '1e5'")
        + "tracking: {uri: 'true', experiment: ~1}",
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
    leaves = [
        path
        for path, field in keys(ColabatorJob).items()
        if not section_of(field) or path == "data.validation"
    ]
    assert len(lines) == len(sections) + len(
        [path for path in leaves if not path.startswith("data.validation.")]
    )
