"""`bench stream`: every figure is there. None is held against a limit, machines being what they are."""

import json
import math
import subprocess
import sys

import boto3
import pytest

from corun_ray.bench.stream import StreamSettings, bench_stream, build_job, format_json, format_report
from corun_ray.core.timing import PHASES
from corun_ray.service.data.sample_maker import TooManyBadFiles

SETTINGS = StreamSettings(patch_px=32, samples=3, repeats=2)


def bench(*args):
    return subprocess.run(
        [sys.executable, "-m", "corun_ray", "bench", "stream", *map(str, args)], capture_output=True, text=True
    )


def jobs(root):
    clear, depth = f"{root}/clear", f"{root}/depth"
    return {
        "pre-training": build_job(clear, depth, "inverse", None, 32),
        "Colabator": build_job(clear, depth, "metres", f"{root}/hazy", 32),
    }


def test_every_figure_is_there(dataset):
    told = []
    report = bench_stream(jobs(dataset), SETTINGS, lambda done, what: told.append((done, what)))
    assert [done for done, _ in told] == list(range(1, 13)) and {what for _, what in told[6:]} == {"Colabator"}
    for images, measured in zip((1, 2), report.kinds.values(), strict=True):
        assert measured.images_per_s == pytest.approx(images / measured.sample_s)
        assert len(measured.each_images_per_s) == 2 and measured.bad_files == {}
        assert set(measured.phases_s) == {*PHASES, "other"}
        assert all(math.isfinite(seconds) and seconds >= 0 for seconds in measured.phases_s.values())
        spent = [phase for phase, seconds in measured.phases_s.items() if seconds > 0]
        assert ("strong view" in spent) == (images == 2) and {"read", "decode", "depth", "synthesis"} <= set(spent)
    assert json.loads(format_json(report))["kinds"]["Colabator"]["num_files"] == 14
    assert [line.split() for line in format_report(report).splitlines()][0] == ["pre-training", "Colabator"]


def test_what_the_worker_makes_is_not_the_stream_s(dataset):
    root = str(dataset)
    job = build_job(f"{root}/clear", f"{root}/depth", "inverse", f"{root}/hazy", 32, "worker")
    measured = bench_stream({"drawn": job}, SETTINGS, lambda done, what: None).kinds["drawn"]
    spent = {phase for phase, seconds in measured.phases_s.items() if seconds > 0}
    assert {"read", "decode", "depth"} <= spent and not {"synthesis", "strong view"} & spent
    assert measured.data["synthesis"] == "worker"


def test_it_reads_from_a_bucket_as_from_a_folder(s3_server, dataset):
    client = boto3.client("s3")
    client.create_bucket(Bucket="bench")
    for path in dataset.rglob("*.*"):
        client.upload_file(str(path), "bench", str(path.relative_to(dataset)))
    report = bench_stream(jobs("s3://bench"), SETTINGS, lambda done, what: None)
    assert all(kind.images_per_s > 0 for kind in report.kinds.values())


def test_files_that_cannot_be_used_are_told(dataset, tmp_path):
    (tmp_path / "clear").mkdir()
    (tmp_path / "clear/text.png").write_text("not a picture")
    job = build_job(str(tmp_path / "clear"), None, "inverse", None, 32)
    with pytest.raises(TooManyBadFiles):
        bench_stream({"x": job}, SETTINGS, lambda done, what: None)
    (tmp_path / "clear/good.png").write_bytes((dataset / "clear/view_0.png").read_bytes())
    report = bench_stream({"x": job}, SETTINGS, lambda done, what: None)
    assert format_report(report).endswith(
        f"1 files cannot be used, e.g. {tmp_path}/clear/text.png: not an image, or a damaged one"
    )


def test_the_command_prints_a_table_and_writes_json(dataset, tmp_path):
    file = tmp_path / "stream.json"
    size = ("--patch", 32, "--samples", 2, "--repeats", 1)
    result = bench("--data", dataset / "clear", *size, "--synthesis", "worker", "--json", file)
    assert result.returncode == 0, result.stderr
    assert "the training worker's, whose time is not measured" in result.stdout
    assert "sample 2/2" in result.stdout and "images/s on one core" in result.stdout
    assert json.loads(file.read_text())["kinds"]["pre-training"]["images_per_s"] > 0


@pytest.mark.slow
def test_without_data_it_renders_some():
    result = bench("--samples", 1, "--repeats", 1)
    assert result.returncode == 0 and "photograph 4/4" in result.stdout and "Colabator" in result.stdout


@pytest.mark.parametrize(
    ("args", "code", "line"),
    [
        (("--depth", "x"), 2, "--depth: needs --data, the clear images"),
        (("--patch", 16), 2, "--patch: 16 is too few (at least 32)"),
        (("--data", "/no/such"), 2, "cannot list /no/such: No such file or directory"),
        (("--json", "/no/such/x.json"), 2, "--json: there is no folder /no/such"),
    ],
)
def test_a_wrong_request_is_one_line(args, code, line):
    result = bench(*args)
    assert (result.returncode, result.stderr.splitlines()) == (code, [line])
