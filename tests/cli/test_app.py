"""The command line as its user meets it: a process, its output, its exit code."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from corun_ray.cli.app import main
from corun_ray.cli.run import OpenedLines
from corun_ray.config.loading import dump_job, load_jobs
from corun_ray.core.choices import CLARITY_NAMES, DEGRADATIONS, QUALITY_NAMES, Degradation
from corun_ray.core.scoring.scorers import CLARITY_SCORERS, DEFAULT_CLARITY, DEFAULT_QUALITY, QUALITY_SCORERS
from corun_ray.service.models.sources import SHIPPED_FOLDER
from tests.conftest import free_port
from tests.service.jobs import small_job
from tests.unusable import damage, draw_damaged_validation


def corun_ray(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "corun_ray", *map(str, args)], capture_output=True, text=True, env={**os.environ, **env}
    )


FIVE_MISTAKES = """
kind: colabator
name: five
data: {clear: /clear, hazy: /hazy, patch_px: 300}
network: {stages: 1}
optim: {learning_rate: 1.0e-4}
train: {steps: many}
pool: {shards: 400}
"""


@pytest.mark.parametrize("command", ["run", "check"])
def test_five_mistakes_are_five_lines_and_exit_code_2(tmp_path, command):
    path = tmp_path / "job.yaml"
    path.write_text(FIVE_MISTAKES)
    result = corun_ray(command, path)
    assert result.returncode == 2
    assert sorted(result.stderr.splitlines()) == [
        "data.patch_px: 300 is not a multiple of 16",
        "network.stages: 1 is too few (at least 2)",
        "optim.learning_rate: unknown key (did you mean optim.lr?)",
        "pool.shards: 400 is too many (at most 256)",
        'train.steps: "many" is not a whole number',
    ]
    assert result.stdout == ""


def test_help_names_the_commands():
    result = corun_ray("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("run", "check", "demo", "dehaze", "RAY_ADDRESS", "exit codes"))


def test_check_prints_the_resolved_job_and_what_it_would_use(dataset, tmp_path):
    small_job("colabator", dataset, tmp_path)
    result = corun_ray("check", tmp_path / "colabator.yaml", "--set", "train.steps=7")
    assert (result.returncode, result.stderr) == (0, "")
    resolved = yaml.safe_load(result.stdout)
    assert resolved["train"]["steps"] == 7 and resolved["optim"]["schedule_steps"] == 50_000
    assert "8 clear images with a depth map each, 6 real hazy" in result.stdout
    assert not (tmp_path / "runs").exists(), "check must start nothing"


def test_check_names_what_is_missing(dataset, tmp_path):
    small_job("colabator", dataset, tmp_path)
    settings = ["data.hazy=/nowhere", "network.init=/no/model.pth", "cluster.gpus_per_worker=99"]
    env = {"RAY_ADDRESS": ""}
    result = corun_ray("check", tmp_path / "colabator.yaml", *(f"--set={s}" for s in settings), **env)
    assert result.returncode == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 3, result.stderr
    assert "cannot list /nowhere" in lines[0]
    assert "network.init: nothing at /no/model.pth" in lines[1]
    assert "cluster.gpus_per_worker: 99 GPUs in all" in lines[2]


def test_check_opens_a_sample_or_all_and_names_what_cannot_be_used(tmp_path):
    root = draw_damaged_validation(tmp_path)
    for number in range(40):
        shutil.copy(root / "clear/0000.jpg", root / f"clear/more_{number:02}.jpg")
    damage(root / "clear/0003.jpg")  # the sample has the first, second, third and fifth
    held = {"hazy": str(root / "hazy")}
    small_job("pretrain", root, tmp_path, data={"depth": None, "validation": held, "max_bad_fraction": 0.01})
    result = corun_ray("check", tmp_path / "pretrain.yaml")
    assert result.returncode == 0 and f"# unusable  {root}/hazy/0002.jpg: truncated JPEG" in result.stdout
    assert "# opened    data.clear: 32 of 44, none unusable" in result.stdout
    result = corun_ray("check", tmp_path / "pretrain.yaml", "--all")
    assert result.returncode == 2 and "# opened    data.clear: all, 1 unusable" in result.stdout
    assert result.stderr.startswith("test-pretrain: 1 of 44 images cannot be used") and result.stderr.count("\n") == 1


def test_check_tells_how_many_images_it_has_opened_every_few_seconds(capsys):
    now = [0.0]
    lines = OpenedLines(lambda: now[0])
    for done in range(1, 11):
        now[0] += 1.5
        lines("data.clear", done, 10)
    assert capsys.readouterr().out == "".join(f"# opening   data.clear: {done} of 10\n" for done in (3, 6, 9))


def test_check_lists_the_keys():
    result = corun_ray("check", "--keys")
    assert result.returncode == 0 and "pool.encoding" in result.stdout and "optim.lr" in result.stdout


def test_a_missing_folder_stops_a_run_before_ray_starts(dataset, tmp_path):
    small_job("pretrain", dataset, tmp_path)
    result = corun_ray("run", tmp_path / "pretrain.yaml", "--set", "data.clear=/nowhere", RAY_ADDRESS="")
    assert result.returncode == 2
    assert result.stderr.startswith("cannot list /nowhere") and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "command",
    [
        "run JOB",
        "dehaze IN OUT --model corun-small",
        "depth IN OUT --weights W",
        "evaluate IN",
        "serve corun-small",
        "pack IN OUT",
        "bench pool --storage FOLDER",
        "submit JOB --set storage=/runs --set tracking.uri=http://m --set data.clear=/c",
        "jobs ls",
        "jobs stop me",
    ],
)
def test_nobody_at_ray_address_is_one_line_before_anything_is_imported(dataset, tmp_path, monkeypatch, capsys, command):
    small_job("pretrain", dataset, tmp_path)
    port = free_port()
    is_for_jobs = command.startswith(("submit", "jobs"))
    monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{port}" if is_for_jobs else f"127.0.0.1:{port}")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    words = {"JOB": str(tmp_path / "pretrain.yaml"), "FOLDER": str(tmp_path)}
    with pytest.raises(SystemExit) as ended:
        main([words.get(word, word) for word in command.split()])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1, said
    assert f"127.0.0.1:{port}" in said and "nobody listens there" in said


def test_demo_refuses_a_folder_of_someone_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    result = corun_ray("demo", tmp_path)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_model_that_is_not_there_is_one_line(dataset, tmp_path):
    result = corun_ray("dehaze", dataset / "hazy", tmp_path / "out", "--model", tmp_path / "none.pth")
    assert result.returncode == 2 and "nothing there" in result.stderr and len(result.stderr.splitlines()) == 1
    tracking = f"sqlite:///{tmp_path}/mlflow.db"
    result = corun_ray("dehaze", dataset / "hazy", tmp_path / "out", "--model", "models:/x@y", "--tracking", tracking)
    assert result.returncode == 2 and result.stderr.startswith("models:/x@y: cannot be read from")


def test_job_files_offer_exactly_the_scorers_that_exist():
    assert set(CLARITY_NAMES) == {*CLARITY_SCORERS, "daclip", "reference"}
    assert set(QUALITY_NAMES) == {*QUALITY_SCORERS, "reference"}
    assert get_args(Degradation) == DEGRADATIONS
    assert CLARITY_NAMES[0] == DEFAULT_CLARITY and QUALITY_NAMES[0] == DEFAULT_QUALITY


@pytest.mark.parametrize(
    "name",
    [
        *("quickstart", "pretrain", "colabator", "paper_pretrain", "paper_colabator"),
        *("derain_colabator", "serve", "corun_small"),
    ],
)
def test_the_jobs_that_we_ship_are_executable_and_valid(name):
    path = f"jobs/{name}.yaml"
    assert os.access(path, os.X_OK)
    with open(path) as file:
        assert file.readline().strip() == "#!/usr/bin/env -S python3 -m corun_ray run"
    assert load_jobs(Path(path), env={})


def test_weights_are_indexed_listed_and_missed(tmp_path, dataset):
    weights = tmp_path / "weights"
    weights.mkdir()
    scoring = {"quality": "niqe", "weights": str(weights), "block_px": 96}
    job = small_job("colabator", dataset, tmp_path, coherence=scoring, data={"patch_px": 96})
    (tmp_path / "job.yaml").write_text(dump_job(job))
    result = corun_ray("weights", "index", weights)
    assert result.returncode == 2 and "no weight files there" in result.stderr
    result = corun_ray("weights", "ls", tmp_path / "job.yaml")
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("niqe_modelparameters.mat")]
    assert result.returncode == 1 and line.split()[-3:] == ["missing", "coherence.quality", "niqe"]
    result = corun_ray("run", tmp_path / "job.yaml")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith(
        "test-colabator: weights: niqe_modelparameters.mat (for coherence.quality niqe): mis"
    )
    shutil.copy("tests/data/iqa/niqe_modelparameters.mat", weights)
    assert corun_ray("weights", "index", weights).returncode == 0
    result = corun_ray("weights", "ls", tmp_path / "job.yaml")
    assert result.returncode == 0 and " ok " in result.stdout


WRONG_REQUESTS = [
    (
        ["evaluate", "photos", "--metrics", "fade,muzic"],
        'evaluate.metrics: "muzic" is neither of psnr, ssim, fade nor a metric of pyiqa for images '
        "(did you mean musiq?)",
    ),
    (
        ["evaluate", "photos", "--truth", "clear", "--match", "[^_]+"],
        "evaluate.match: [^_]+ has no group (the text of its one group is what pairs two files, as in ^([^_]+))",
    ),
    (
        ["evaluate", "photos", "--match", "^([^_]+)"],
        "evaluate.match: not used without clear",
    ),
    (
        ["evaluate", "photos", "--metrics", "psnr", "--model", "a=x.pth"],
        "evaluate.metrics: psnr cannot be measured without evaluate.clear",
    ),
    (
        ["evaluate", "photos", "--model", "a=x.pth", "--against", "b"],
        'evaluate.against: "b" is not measured (hazy, untrained, dark_channel, a)',
    ),
    (
        ["evaluate", "photos", "--model", "models:/net@a", "--model", "models:/net@a"],
        "--model: net-a is the name of several (NAME=SOURCE gives another)",
    ),
    (
        ["serve", "net.pth", "--gpus-per-replica", "1.5"],
        "serve.gpus_per_replica: 1.5 is neither a share of one GPU nor a whole number of GPUs",
    ),
    (
        ["serve", "net.pth"],
        "net.pth: nothing there (expected a checkpoint folder, a .pth or corun-small)",
    ),
    (
        ["pull", "nowhere", "out"],
        "nowhere: nothing there (expected a checkpoint folder, a .pth or corun-small)",
    ),
]


@pytest.fixture(scope="module")
def wrong_requests(tmp_path_factory):
    """All of them at once: some processes take seconds to import what they need."""
    started = []
    for arguments, _ in WRONG_REQUESTS:
        folder = tmp_path_factory.mktemp("wrong")
        command = [sys.executable, "-m", "corun_ray", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append((folder, subprocess.Popen(command, cwd=folder, **pipes)))
    return [(folder, *process.communicate(), process.returncode) for folder, process in started]


@pytest.mark.parametrize("number", range(len(WRONG_REQUESTS)), ids=[told.split()[0] for _, told in WRONG_REQUESTS])
def test_a_wrong_request_for_models_is_one_line(wrong_requests, number):
    folder, said, complained, code = wrong_requests[number]
    assert code == 2 and complained.strip() == WRONG_REQUESTS[number][1] and said == ""
    assert list(folder.iterdir()) == []


def test_the_shipped_model_is_pulled_in_half_precision(tmp_path):
    result = corun_ray("pull", "corun-small", tmp_path / "model", "--half")
    weights = tmp_path / "model" / "model.safetensors"
    assert result.returncode == 0 and str(weights) in result.stdout.splitlines()
    assert weights.read_bytes() == (SHIPPED_FOLDER / "corun-small" / "model.safetensors").read_bytes()
