"""Submitting, following and stopping jobs of a real cluster with token authentication, as its user would."""

import contextlib
import os
import pty
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from corun_ray.service.cluster import jobs_api
from corun_ray.service.cluster.jobs_api import JobsClient, JobsError, LogCopy
from tests import ROOT
from tests.conftest import free_port, heeding_ctrl_c, wait_for

JOBS_TIMEOUT_S = 120


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head node with a dashboard; gives the environment that reaches it."""
    token = tmp_path_factory.mktemp("head") / "token"
    token.write_text(secrets.token_hex(32))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # jobs are run by the python3 that is found there
    environment = {**os.environ, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment.pop("RAY_ADDRESS", None)
    # Ray notes the last cluster of a machine there; this one is not to be taken for that of other tests.
    environment["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="head-", dir="/tmp")  # its sockets need a short path
    port, dashboard, agent, client = (free_port() for _ in range(4))
    ray = str(Path(sys.executable).with_name("ray"))
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    options = ["--num-cpus=3", "--node-ip-address=127.0.0.1", f"--ray-client-server-port={client}"]
    command = [ray, "start", "--head", "--block", *ports, *options, f"--object-store-memory={200 * 2**20}"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{dashboard}"
            wait_for(f"{url}/api/gcs_healthz")
            yield {**environment, "RAY_API_SERVER_ADDRESS": url}
        finally:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                    one.kill()
            process.wait()
            shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)


def corun_ray(environment: dict[str, str], *args: object, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "corun_ray", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**environment, **more}, timeout=JOBS_TIMEOUT_S, check=False
    )


def job(folder: Path, dataset: Path, **tree: object) -> Path:
    """A file beside nothing else: our package has to travel on its own."""
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"storage": str(folder / "runs"), **tree}))
    return path


def measuring(folder: Path, dataset: Path) -> Path:
    """A job that measures one photograph."""
    (folder / "photographs").mkdir()
    shutil.copy(dataset / "hazy" / "photo_0.png", folder / "photographs")
    section = {"hazy": str(folder / "photographs"), "metrics": ["fade"], "baselines": ["hazy"]}
    return job(folder, dataset, kind="evaluate", name="measured", evaluate=section)


def endless(folder: Path, dataset: Path) -> Path:
    sections = {
        "data": {"clear": str(dataset / "clear"), "patch_px": 32},
        "network": {"stages": 2, "width": 4},
        "train": {"steps": 1_000_000},
    }
    return job(folder, dataset, kind="pretrain", name="endless", **sections)


def test_a_job_is_submitted_followed_to_its_end_and_looked_at(head, dataset, tmp_path):
    result = corun_ray(head, "submit", measuring(tmp_path, dataset))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "submitted as measured-" in result.stdout and ": succeeded" in result.stdout
    assert "evaluate measured" in result.stdout and "fade" in result.stdout, "what the job printed"
    assert result.stderr == ""
    assert [*(tmp_path / "runs").glob("measured-*/metrics.csv")], "it ran"
    listed = corun_ray(head, "jobs", "ls").stdout
    assert listed.split()[:4] == ["JOB", "STATUS", "STARTED", "TOOK"] and "succeeded" in listed
    status = corun_ray(head, "jobs", "status", "measured").stdout
    assert "python3 -m corun_ray run mine.yaml" in status
    wrong = corun_ray(head, "jobs", "status", "mesured")
    assert (wrong.returncode, wrong.stderr) == (2, "no job is called mesured (did you mean measured?)\n")


@pytest.mark.slow
def test_a_job_file_is_executable_by_ray_job_submit(head, dataset, tmp_path):
    ray = str(Path(sys.executable).with_name("ray"))
    settings = [f"evaluate.hazy={dataset}/hazy", "evaluate.clear=null", "evaluate.models={}", "evaluate.metrics=[fade]"]
    settings += ["evaluate.against=null", f"storage={tmp_path}/runs", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    words = [word for setting in settings for word in ("--set", setting)]
    command = [ray, "job", "submit", "--working-dir", ".", "--", "jobs/evaluate.yaml", *words]
    result = subprocess.run(
        command, capture_output=True, text=True, env=head, cwd=ROOT, timeout=JOBS_TIMEOUT_S, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert [*(tmp_path / "runs").glob("evaluate-*/metrics.csv")]


@pytest.mark.slow
def test_what_is_wrong_only_there_ends_with_its_line_and_exit_code_2(head, dataset, tmp_path):
    result = corun_ray(head, "submit", measuring(tmp_path, dataset), "--set", "evaluate.hazy=/nowhere", "--name", "w")
    assert result.returncode == 2
    assert "evaluate.hazy" in result.stdout or "/nowhere" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_a_missing_or_wrong_token_and_a_wrong_address_are_told_in_a_line(head, dataset, tmp_path):
    path = measuring(tmp_path, dataset)
    for more, said in (
        ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}, "there is none here"),
        ({"RAY_AUTH_TOKEN": secrets.token_hex(32)}, "the token here is another"),
        ({"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}, "no Jobs API answers there"),
    ):
        result = corun_ray(head, "submit", path, **more)
        assert result.returncode == 2 and said in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1


def test_ctrl_c_asks_and_leaves_the_job_alone_until_it_is_stopped(head, dataset, tmp_path):
    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "corun_ray", "submit", str(endless(tmp_path, dataset))]
    with heeding_ctrl_c():
        process = subprocess.Popen(
            command, stdin=terminal, stdout=terminal, stderr=terminal, env=head, start_new_session=True
        )
    with process:
        os.close(terminal)
        said = _read_until(master, "Running entrypoint")
        process.send_signal(signal.SIGINT)
        said += _read_until(master, "stop endless as well? [y/N]")
        twice = corun_ray(head, "submit", endless(tmp_path, dataset), "--no-wait")
        assert twice.returncode == 2 and "endless is running already" in twice.stderr
        os.write(master, b"n\n")
        assert process.wait(20) == 0
    os.close(master)
    assert "running" in corun_ray(head, "jobs", "status", "endless").stdout
    stopped = corun_ray(head, "jobs", "stop", "endless")
    assert stopped.returncode == 0 and ": stopped" in stopped.stdout
    followed = corun_ray(head, "jobs", "follow", "endless")
    assert followed.returncode == 1, "it has no result"


def _read_until(terminal: int, text: str) -> str:
    said, deadline = "", time.monotonic() + JOBS_TIMEOUT_S
    while text not in said and time.monotonic() < deadline:
        said += os.read(terminal, 4096).decode(errors="replace")
    assert text in said
    return said


@pytest.mark.parametrize(("refusals", "said"), [(2, None), (99, "No available agent"), (0, "no such folder")])
def test_a_cluster_that_has_just_started_is_asked_again(refusals, said, monkeypatch):
    monkeypatch.setattr(jobs_api, "POLL_S", 0.01)
    monkeypatch.setattr(jobs_api, "STARTING_S", 1.0)
    client, answers = JobsClient.__new__(JobsClient), iter(range(1000))  # without a cluster to connect to
    client.address = "http://127.0.0.1:9"

    def submit() -> str:
        if next(answers) < refusals:
            raise RuntimeError("Request failed with status code 500: No available agent to submit job, please try ...")
        if said is not None:
            raise RuntimeError(said)
        return "submitted"

    if said is None:
        assert client._call_once_ready(submit) == "submitted"
    else:
        with pytest.raises(JobsError, match=said):
            client._call_once_ready(submit)
        assert next(answers) == 1 if refusals == 0 else next(answers) > 2


def test_a_log_is_copied_once_however_often_it_begins_again():
    written: list[str] = []
    copy = LogCopy(written.append)
    for parts in (["one ", "two "], ["one ", "two thr", "ee"], [], ["one two three four"]):
        copy.begin()
        for part in parts:
            copy.add(part)
    assert "".join(written) == "one two three four"
