"""An output folder, and the processes that write to it."""

import pytest

from corun_ray.config.loading import build_job
from corun_ray.service.inference.outcome import hold_output
from corun_ray.service.jobs import run_jobs
from corun_ray.service.runs.lease import Lease, RunDriven, find_driver
from corun_ray.service.storage import locate
from corun_ray.service.telemetry.console import Console


def test_only_one_process_resumes_an_output(dataset, tmp_path, capsys):
    output = locate(str(tmp_path / "out"))
    with Lease.take(output):
        # Without --resume, the outputs of several inputs may come together in one folder.
        with hold_output(output.uri, Console(), resume=False):
            pass
        assert "also writes there: " in capsys.readouterr().out
        with pytest.raises(RunDriven), hold_output(output.uri, Console(), resume=True):
            pass

        # It is refused before Ray starts.
        section = {"input": str(dataset / "hazy"), "output": output.uri, "model": "corun-small"}
        job = build_job({"kind": "dehaze", "name": "images", "dehaze": section})
        with pytest.raises(RunDriven, match="is in use by process"):
            run_jobs([job], Console(), resume=True)

    with hold_output(output.uri, Console(), resume=True):
        assert find_driver(output).is_alive
    assert output.list_files() == []
