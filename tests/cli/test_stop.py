"""What a stopped command says."""

import pytest

from corun_ray.cli import app, run
from corun_ray.core.errors import explain_stop


@pytest.mark.parametrize(
    ("explained", "line"), [([], "stopped"), (["a", "b"], "stopped: a"), (["the run: here"], "stopped: the run: here")]
)
def test_a_stop_tells_where_its_work_stands(explained, line, monkeypatch, capsys, tmp_path):
    def stop(*arguments):
        raise KeyboardInterrupt

    # The innermost explanation comes first.
    action = stop
    for text in explained:

        def action(*arguments, inner=action, text=text):
            with explain_stop(lambda: text):
                inner()

    monkeypatch.setattr("corun_ray.config.loading.load_jobs", action)
    with pytest.raises(SystemExit) as end:
        app.main(["check", "job.yaml"])
    assert end.value.code == run.FAILED
    assert capsys.readouterr().err.strip() == line
