"""A search for real: trials by Ray Tune, each a Ray Train run with its own pool; and what it makes of their results."""

import csv
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest

from corun_ray.config.jobs import TuneJob
from corun_ray.config.loading import dump_job
from corun_ray.core.data.images import decode_image
from corun_ray.core.networks.corun import CORUN
from corun_ray.service.errors import JobFailed
from corun_ray.service.models.tracking import get_tracking_uri
from corun_ray.service.runs.record import find_last_run, read_record
from corun_ray.service.storage import locate
from corun_ray.service.telemetry.console import Console
from corun_ray.service.tune.report import TrialResult, measure_cost, rank_trials, summarise_search
from corun_ray.service.tune.search import SearchSession, _store_results, run_search
from tests.service.jobs import small_job


def search_job(dataset, folder, **sections) -> TuneJob:
    tune = {"search": {"network.stages": [2, 3]}, "trials_at_once": 2, "scheduler": "all"} | sections.pop("tune", {})
    train = {"steps": 4, "validate_every": 2, "validation_images": 1}
    data = {"hazy": str(dataset / "hazy"), "validation": {"hazy": str(dataset / "hazy")}}
    job = small_job("tune", dataset, folder, data=data, train=train, tune=tune, **sections)
    assert isinstance(job, TuneJob)
    return job


def files_of(job):
    run = find_last_run(job)
    assert run is not None
    return run, {name: run.child(name).read() for name in ("trials.csv", "trials.png")}


@pytest.mark.slow
def test_a_search_trains_compares_and_registers_the_best(local_ray, dataset, tmp_path, capsys):
    # The local Ray has three CPUs: half of one for each of the two workers, and one to decode for each.
    cluster = {"workers": 1, "cpus_per_worker": 0.5}
    job = search_job(dataset, tmp_path, tracking={"register": "searched"}, cluster=cluster)
    model = run_search(job, Console(), tmp_path)
    assert model == "models:/searched/1"
    run, files = files_of(job)
    rows = list(csv.DictReader(io.StringIO(files["trials.csv"].decode())))
    assert sorted(row["stages"] for row in rows) == ["2", "3"]
    assert float(rows[0]["fade"]) <= float(rows[1]["fade"]) and {row["steps"] for row in rows} == {"4"}
    for row in rows:
        assert int(row["parameters"]) == sum(p.numel() for p in CORUN(int(row["stages"]), 4).parameters())
        assert float(row["images/s"]) > 0
    assert decode_image(files["trials.png"]).std() > 5
    output = capsys.readouterr().out
    assert all(row["trial"] in output for row in rows) and model in output

    client = mlflow.MlflowClient(get_tracking_uri(job))
    parent = client.get_run(read_record(run).mlflow_run)
    assert parent.info.status == "FINISHED" and parent.data.tags["corun_ray.best_trial"] == rows[0]["trial"]
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert [child.info.status for child in children] == ["FINISHED"] * 2
    version = client.get_model_version_by_alias("searched", "champion")
    assert str(version.version) == "1"

    assert run_search(job, Console(), tmp_path, resume=True) == model
    assert "has ended before" in capsys.readouterr().out


@pytest.mark.slow
def test_a_trial_that_is_stopped_early_leaves_its_room_to_the_next(local_ray, dataset, tmp_path, capsys):
    """The local Ray has three CPUs: two for the workers of one trial, one that decodes."""
    tune = {"search": {"optim.lr": [1e-6, 1e-3, 2e-3]}, "trials_at_once": 1, "scheduler": "asha"}
    tune |= {"grace_steps": 2, "reduction": 2}
    job = search_job(dataset, tmp_path, tune=tune, cluster={"workers": 2})
    run_search(job, Console(), tmp_path)
    _, files = files_of(job)
    steps = [int(row["steps"]) for row in csv.DictReader(io.StringIO(files["trials.csv"].decode()))]
    assert len(steps) == 3 and 2 in steps, "one was stopped, and another came after it"


@pytest.mark.slow
def test_when_no_trial_comes_to_an_end_the_reason_is_told(local_ray, dataset, tmp_path, capsys):
    (tmp_path / "user_net.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Module):\n    def __init__(self, size):\n        super().__init__()\n"
        "        self.layer = torch.nn.Conv2d(3, 3, size, padding=size // 2)\n\n"
        "    def forward(self, x):\n        if self.training:\n            raise RuntimeError('not today')\n"
        "        return self.layer(x)\n"
    )
    tune = {"search": {"seed": [1]}, "trials_at_once": 1}
    network = {"type": "user_net:Net", "args": {"size": 3}}
    job = search_job(dataset, tmp_path, tune=tune, network=network, cluster={"max_failures": 0})
    with pytest.raises(JobFailed, match="none of the 1 trials has ended"):
        run_search(job, Console(), tmp_path)
    assert "not today" in capsys.readouterr().out


def test_the_reason_of_a_failed_trial_is_told_whole():
    result = SimpleNamespace(
        path="/runs/search/00001_stages-3",
        config={"network.stages": 3},
        metrics={"val/fade": 0.5, "config/network.stages": 3, "step": 2},
        error="Traceback\n  x\ncorun_ray.service.fit.JobFailed: training failed\n  worker 0: KeyError: 3\nthe run: r\n",
    )
    found = TrialResult.from_ray(result)
    assert (found.name, found.step, found.model, found.metrics) == ("00001_stages-3", 2, None, {"val/fade": 0.5})
    assert found.error == "training failed\n  worker 0: KeyError: 3\nthe run: r"
    result.error = "Traceback\n  x\nOSError: gone\n"
    assert TrialResult.from_ray(result).error == "OSError: gone"


def trial(name, stages, fade, model="m", **kwargs):
    return TrialResult(
        name, {"network.stages": stages}, {"val/fade": fade, "rate/steps_per_s": 2.0}, 4, model, **kwargs
    )


def test_the_best_come_first_and_those_that_were_stopped_last():
    trials = [trial("a", 2, 0.3), trial("b", 3, 0.1, model=None), trial("c", 4, 0.2), trial("d", 5, 0.0, error="x")]
    assert [one.name for one in rank_trials(trials, "val/fade", "min")] == ["c", "a", "b"]
    assert [one.name for one in rank_trials(trials, "val/fade", "max")] == ["a", "c", "b"]
    assert rank_trials(trials, "val/psnr", "max") == []


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_trial_without_a_value_is_never_the_best(mode, tmp_path):
    nan = float("nan")
    trials = [trial("a", 2, nan), trial("b", 3, 0.1, model=None), trial("c", 4, 0.2), trial("d", 5, nan)]
    assert [one.name for one in rank_trials(trials, "val/fade", mode)] == ["c", "a", "d", "b"]

    job = SimpleNamespace(name="search", tune=SimpleNamespace(metric="val/fade", mode=mode))
    session = SearchSession(job, locate(str(tmp_path)), None, Console())
    with pytest.raises(JobFailed, match="val/fade has no value for any image in any trial that ended"):
        _store_results(session, [trials[0], trials[1], trials[3]])


def test_costs_are_those_of_the_network(dataset, tmp_path):
    job = search_job(dataset, tmp_path)
    two, four = (measure_cost(job, trial("x", stages, 0.0)) for stages in (2, 4))
    assert four.parameters == sum(p.numel() for p in CORUN(4, 4).parameters()) > two.parameters
    assert 1.5 < four.gflops / two.gflops < 2.5


def test_the_table_has_a_line_a_trial(dataset, tmp_path):
    job = search_job(dataset, tmp_path)
    found = summarise_search(job, [trial("c", 3, 0.2), trial("a", 2, 0.3, model=None)])
    assert len(found.lines) == 3 and found.lines[0].split()[:2] == ["stages", "parameters"]
    assert found.lines[1].split()[0] == "3" and found.lines[2].split()[-1] == "a"
    assert len({len(line) for line in found.lines}) == 1
    assert found.csv.decode().count("\n") == 3


@pytest.mark.slow
def test_a_search_that_was_killed_repeats_no_trial_that_had_ended(dataset, tmp_path):
    job = search_job(dataset, tmp_path, tune={"trials_at_once": 1}, tracking={"register": "resumed"})
    (tmp_path / "search.yaml").write_text(dump_job(job))
    command = [sys.executable, "-u", "-m", "corun_ray", "run", str(tmp_path / "search.yaml")]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if re.search(r"trial 00000_\S+ ended", line):
                break
        process.kill()
    run = find_last_run(job)
    assert run is not None and read_record(run).state == "running"
    first = Path(run.path) / "trials" / "00000_stages-2"
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}
    assert before
    result = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=environment, timeout=400)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "resumes this search" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()} == before
    _, files = files_of(job)
    rows = list(csv.DictReader(io.StringIO(files["trials.csv"].decode())))
    assert sorted(row["stages"] for row in rows) == ["2", "3"] and {row["steps"] for row in rows} == {"4"}
    assert read_record(run).model == "models:/resumed/1"
