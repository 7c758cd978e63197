"""`bench scaling`: every figure is there, from a step's time or a measured step; none is held against a limit."""

import json
from pathlib import Path

import pytest

from corun_ray.bench.scaling import read_measured_step
from corun_ray.cli import main as command_line

SMALL = ["--stages", "2", "--width", "4"]


def main(arguments: list[str]) -> int:
    """Run `corun-ray bench`; return 0, or let the exit of a failure pass."""
    with pytest.raises(SystemExit) as ended:
        command_line(["bench", *arguments])
    if ended.value.code:
        raise ended.value
    return 0


def test_a_table_for_each_link(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--step-s", "0.3", "--gpus", "8", "64", "512", "--link-gbit", "25", "100", "--gpus-per-node", "8"]
    assert main(["scaling", *options, "--no-check"]) == 0
    said = capsys.readouterr().out
    assert (
        "4 stages, width 30, 18.67 M parameters, 71.2 MiB of gradients in buckets of 1.5, 25.1, 25.8, 18.9 MiB" in said
    )
    assert "1880 Gbit/s in them, 25 between" in said and "1880 Gbit/s in them, 100 between" in said
    assert (
        "pool: pool.shards: 26, to answer in the teacher's time (512 GPUs)" in said
        and "rating: coherence.share_blocks" in said
        and "check" not in said
    )


def test_pretraining_has_no_pool(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "--method", "pretrain", "--link-gbit", "1", "--no-check"]) == 0
    said = capsys.readouterr().out
    assert "pool.shards" not in said and "gradients: train.accumulate" in said


def test_a_step_that_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step, file = tmp_path / "step.json", tmp_path / "scaling.json"
    tiny = ["--size", "32", "--repeats", "4", "--wins", "0.25", "--no-perceptual", "--device", "cpu"]
    assert main(["step", *SMALL, *tiny, "--json", str(step)]) == 0
    (measured,) = json.loads(step.read_text())
    assert main(["scaling", "--step-json", str(step), "--no-check", "--json", str(file)]) == 0
    (report,) = json.loads(file.read_text())
    assert report["alone"]["step_s"] == measured["step_s"]
    assert report["alone"]["rating_s"] == pytest.approx(measured["parts_s"]["local scores"] / 0.25)
    assert report["settings"]["size_px"] == 32 and "2 stages, width 4" in capsys.readouterr().out
    assert [len(steps) for steps in report["by_link"]] == [3, 3, 3]


def test_the_check_measures_what_the_formulae_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "scaling.json"
    assert main(["scaling", *SMALL, "--processes", "2", "--repeats", "1", "--json", str(file)]) == 0
    (report,) = json.loads(file.read_text())
    (ring,) = report["rings"]
    assert len(ring["times_s"]) == 8 and all(seconds > 0 for seconds in ring["times_s"].values())
    assert report["backward"]["buckets"] == report["buckets"]
    said = capsys.readouterr().out
    assert said.count("  fitted") == 4 and "check: backward pass of 2 processes" in said


@pytest.mark.parametrize("wins", [0.0, 0.9])
def test_a_step_without_both_kinds_of_candidates(wins: float) -> None:
    parts = {"backward": 1.0, "teacher": 1.0, "global scores": 1.0, "local scores": 1.0}
    report = {"settings": {"batch": 1, "win_rate": wins, "method": "colabator"}, "parts_s": parts, "step_s": 3.0}
    with pytest.raises(ValueError, match="expected wins in some steps"):
        read_measured_step(report)
    assert read_measured_step(report, 0.5).rating_s == 0.5


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--step-json", "/no/such.json"], "--step-json: /no/such.json: [Errno 2] No such file"),
        (["--link-gbit", "0"], "expected a number above 0, got 0"),
        (["--step-s", "1", "--step-json", "x"], "--step-json is not allowed with --step-s"),
        (["--processes", "1"], "1 is too few (at least 2)"),
    ],
)
def test_a_wrong_request_is_one_line(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["scaling", *arguments])
    assert ended.value.code == 2 and reason in capsys.readouterr().err


def test_another_file_is_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("[]", "[{}]", "{"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(SystemExit):
            main(["scaling", "--step-json", str(tmp_path / "x.json"), "--no-check"])
        assert f"--step-json: {tmp_path}/x.json: " in capsys.readouterr().err
