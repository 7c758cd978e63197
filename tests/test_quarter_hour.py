"""The prepared measurements of a GPU: what a stop keeps, what a failure costs, and what the tables show."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests import ROOT
from tests.conftest import heeding_ctrl_c, load_evidence


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_evidence("quarter_hour")


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *arguments)


def run_part(script: ModuleType, runs: list, folder: Path, left_s: float = 100) -> None:
    report = script.read_report(folder, "tests") or script.PartReport("tests", "a card", {"torch": "2"})
    script.run_part(report, runs, folder, time.monotonic() + left_s)


def test_each_run_is_saved_at_once_and_a_stop_loses_the_one_under_way(script, tmp_path):
    write = "import json, sys; json.dump({'ms': 2.5}, open(sys.argv[1], 'w')); print('3 passed')"
    stop = "import os, signal; os.kill(os.getppid(), signal.SIGINT); import time; time.sleep(60)"
    runs = [script.Run("first", python(write, script.FIGURES), 60), script.Run("second", python(stop), 60)]
    with heeding_ctrl_c(), pytest.raises(KeyboardInterrupt):
        run_part(script, runs, tmp_path)
    saved = json.loads((tmp_path / "tests.json").read_text())
    assert [(run["name"], run["state"], run["figures"]) for run in saved["runs"]] == [("first", "done", {"ms": 2.5})]
    assert saved["device"] == "a card" and saved["runs"][0]["output"] == "3 passed\n"


def test_a_run_has_a_limit_and_fails_alone_and_what_is_done_is_not_repeated(script, tmp_path, capsys):
    count = "import sys; open(sys.argv[1], 'a').write('x'); print('1 passed')"
    wait = "import signal; print('ready', flush=True); signal.signal(15, lambda *_: exit(0)); signal.pause()"
    runs = [
        script.Run("counted", python(count, str(tmp_path / "count")), 60),
        script.Run("fails", python("raise SystemExit('no such card')"), 60),
        script.Run("hangs", python("import time; time.sleep(60)"), 1),
        script.Run("rest", python(wait), 900, True),
    ]
    run_part(script, runs, tmp_path, script.END_S + 4)
    run_part(script, runs[:1], tmp_path)
    outcomes = {run.name: run for run in script.read_report(tmp_path, "tests").runs}
    states = {name: run.state for name, run in outcomes.items()}
    assert states == {"counted": "done", "fails": "failed", "hangs": "stopped at its limit", "rest": "done"}
    assert (tmp_path / "count").read_text() == "x" and "no such card" in outcomes["fails"].output

    # Without time, nothing is begun.
    run_part(script, [script.Run("late", python("1/0"), 60)], tmp_path, left_s=script.LEAST_S - 1)
    assert "late: no time left" in capsys.readouterr().out
    assert "tests, hangs: stopped at its limit after 1 s" in script.format_tables(tmp_path)


def test_the_tables_name_the_card_and_compare_with_the_published_step(script, tmp_path):
    figures = {"published_s": 0.9, "ours_s": 0.3, "published_mib": 4000.0, "ours_mib": 1500.0}
    figures["parts_s"] = {"global scores": 0.05, "block scores": 0.05, "backward": 0.3}
    floor = {"work": {"flops": 2e12, "bytes": 1e12}, "machine": {"flops_per_s": 1e13, "bytes_per_s": 4e12}}
    floor |= {"step_s": 0.4, "peak_bytes": 2**30}
    plain = {"step_s": 0.3, "mib": 1500.0, "first_loss_moved": 0.0, "losses_moved": 0.0}
    switches = {"no switch": plain, "graphs": plain | {"step_s": 0.25, "first_loss_moved": 2e-5}}
    runs = [
        script.Outcome("bf16", "command", "done", 9.0, figures),
        script.Outcome(script.SWITCHES, "command", "done", 9.0, switches),
        script.Outcome("floor, bf16", "c", "done", 9, [floor]),
    ]
    script.save_report(script.PartReport("step", "NVIDIA H200", {"torch": "2.11.0"}, runs), tmp_path)
    text = script.format_tables(tmp_path)
    assert text.startswith("NVIDIA H200; torch 2.11.0.\n")
    assert "| bf16 | 900.0 | 300.0 | 3.00 | 25% | 4000 | 1500 |" in text
    assert "| no switch | 300.0 | 1.00 | 1500 | 0 |\n| graphs | 250.0 | 1.20 | 1500 | 2e-05 |" in text
    assert "| floor, bf16 | 400.0 | 200.0 (50%) | 250.0 (62%) | 10.00 | 4000 | 1024 |" in text

    page = tmp_path / "page.md"
    page.write_text(f"Before.\n\n{script.BEGIN}\nold\n{script.END}\n\nAfter.\n")
    for _ in range(2):
        script.write_tables(page, text)
    assert page.read_text() == f"Before.\n\n{script.BEGIN}\n{text}\n{script.END}\n\nAfter.\n"
    with pytest.raises(SystemExit, match="expected the marks"):
        script.write_tables(tmp_path / "step.json", text)
    with pytest.raises(SystemExit, match="no results yet"):
        script.format_tables(tmp_path / "none")


def test_the_table_of_the_stream_has_both_places_of_the_pixel_work(script, tmp_path):
    kinds = {"kinds": {"pre-training": {"images_per_s": 80.0, "sample_s": 0.0125}}}
    places = {"stream: ms a step": 90.5, "worker: ms a step": 88.25}
    runs = [script.Outcome("stream", "c", "done", 9, kinds), script.Outcome(script.SYNTHESIS, "c", "done", 9, places)]
    script.save_report(script.PartReport("stream", "a card", {"torch": "2"}, runs), tmp_path)
    text = script.format_tables(tmp_path)
    assert "| pre-training | 80.0 | 12.5 |" in text
    assert "| data.synthesis, by turns | worker: ms a step | 88.25 |" in text


def test_a_bare_machine_can_collect_the_tests_that_need_a_gpu(script):
    """It has pytest alone: neither its plugins nor what only tests need."""
    (run,) = script.plan_tests()
    hidden = ("xdist", "moto", "playwright", "hypothesis")
    code = f"import sys; sys.modules |= dict.fromkeys({hidden}); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    options = run.command[run.command.index("pytest") + 1 :]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = python(code, "--collect-only", "-q", *options)
    collected = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert collected.returncode == 0, collected.stdout + collected.stderr
    assert collected.stdout.count("::test_") >= 5


@pytest.mark.slow
def test_all_parts_run_in_small_without_a_gpu(script, tmp_path):
    arguments = ["quarter_hour.py", str(tmp_path / "gpu"), "--device", "cpu", "--tiny", "--minutes", "25"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", arguments)
        script.main()
    for part in ("tests", "step", "dehaze", "stream", "service"):
        runs = script.read_report(tmp_path / "gpu", part).runs
        assert runs and [(run.name, run.state) for run in runs] == [(run.name, "done") for run in runs], runs
