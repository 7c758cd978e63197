"""A training that is to be compiled where there is no compiler is refused before anything starts."""

from pathlib import Path

import pytest

from corun_ray.config.jobs import TrainingJob
from corun_ray.core.training.compilers import CannotCompile
from corun_ray.service.check import check_job
from corun_ray.service.cluster.compilers import refuse_impossible_compiling
from corun_ray.service.jobs import run_jobs
from corun_ray.service.telemetry.console import Console
from tests.service.jobs import small_job


@pytest.fixture
def job(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingJob:
    """A job that compiles, on a machine without compilers."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return small_job("pretrain", dataset, tmp_path, optim={"compile": True})


def test_check_and_run_refuse_it(job: TrainingJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (mistake,) = check_job(job, [])[1]
    assert mistake.startswith("optim.compile: torch.compile needs a C++ compiler, and this machine has none")

    monkeypatch.setattr("corun_ray.service.jobs.connect", lambda *_: pytest.fail("Ray must not start"))
    with pytest.raises(CannotCompile, match="Debian has one in the package g"):
        run_jobs([job], Console(), tmp_path)


def test_workers_elsewhere_and_gpus_try_it_themselves(
    job: TrainingJob, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu = job.model_copy(update={"cluster": job.cluster.model_copy(update={"gpus_per_worker": 1.0})})
    refuse_impossible_compiling(on_gpu)
    refuse_impossible_compiling(small_job("pretrain", dataset, tmp_path))
    for name, value in {"TORCH_COMPILE_DISABLE": "1", "RAY_ADDRESS": "192.0.2.1:6379"}.items():
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            refuse_impossible_compiling(job)
