"""`corun-ray pool` as its user meets it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from corun_ray.cli import app as cli
from corun_ray.config.loading import dump_job
from corun_ray.core.data.images import encode_png
from corun_ray.core.training.labels import Scores
from corun_ray.service.pool import snapshots
from corun_ray.service.pool.index import PoolCounters
from corun_ray.service.pool.review import Review
from corun_ray.service.pool.source import find_saved_pool
from corun_ray.service.storage import locate
from tests import ROOT
from tests.service.jobs import small_job
from tests.service.labels import photo_label
from tests.service.pool.test_summary import save_checkpoint, save_pool


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of two snapshots with its job file and hazy images; the current folder is `here`."""
    run = tmp_path / "run"
    pool = locate(str(run / "pool"))
    save_pool(pool, 10, [photo_label("town/a.png", step=3)])
    save_pool(pool, 20, [photo_label("town/a.png", step=12), photo_label("b.png", step=14)])
    hazy = locate(str(tmp_path / "data" / "hazy"))
    hazy.child("town/a.png").write(encode_png(np.full((40, 60, 3), 180, np.uint8)))
    job = small_job("colabator", tmp_path / "data", tmp_path, coherence={"combine": "multiplication"})
    (run / "job.yaml").write_text(dump_job(job))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return run


@pytest.fixture
def pool_command(capsys):
    """Runs `corun-ray pool ...` here; returns exit code, output and errors."""

    def call(*args):
        with pytest.raises(SystemExit) as end:
            cli.main(["pool", *map(str, args)])
        return end.value.code, *capsys.readouterr()

    return call


def test_a_process_reads_a_pool_and_starts_no_ray(run):
    # A run's snapshot is named by its last checkpoint.
    pool, heavy = run / "pool", ["ray", "mlflow", "torch", "pandas"]
    save_checkpoint(run, 20, "step_00000020.json")
    for args, without in ((["ls", pool], heavy), (["ls", run], heavy), (["export", pool, "out"], ["ray", "mlflow"])):
        code = f"import sys; sys.modules |= dict.fromkeys({without}); from corun_ray.cli.app import main; main()"
        command = [sys.executable, "-c", code, "pool", *map(str, args)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(command, capture_output=True, text=True, env=env)
        assert (result.returncode, result.stderr) == (0, ""), args
    assert "label 2/2" in result.stdout and "2 labels written, 0 skipped" in result.stdout


def test_ls_and_its_json(run, pool_command):
    code, out, err = pool_command("ls", run, "--json", "numbers.json")
    assert (code, err) == (0, "") and "labels    2, as of step 20" in out
    assert json.loads(Path("numbers.json").read_bytes())["other_snapshots"] == ["step_00000010.json"]


def test_show_takes_the_runs_own_hazy_images_and_way_of_combining(run, pool_command):
    code, out, err = pool_command("show", run, "town/a.png")
    assert (code, err) == (0, "")
    assert "clarity 0.2500, quality 0.7500, made at step 12" in out and "trust map by multiplication\n" in out
    assert cv2.imread("town_a.png.png")[60, 100].tolist() == [180] * 3
    assert os.listdir(".") == ["town_a.png.png"]


def test_show_without_a_job_file(run, pool_command):
    (run / "job.yaml").unlink()
    code, out, err = pool_command("show", run, "town/a.png")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith("no hazy image of town/a.png: cannot read") and err.endswith("its folder with --hazy ROOT\n")
    code, out, err = pool_command("show", run, "town/a.png", "--hazy", run.parent / "data/hazy", "--output", "x/y.png")
    assert (code, err) == (0, "") and "trust map by addition (not known: cannot read" in out
    assert Path("x/y.png").exists()


@pytest.mark.parametrize(
    "text", ["kind: evaluate\nname: x\nevaluate: {hazy: /x}\n", "kind: colabator\nname: [\n", "{}"]
)
def test_show_with_another_job_file(run, pool_command, text):
    (run / "job.yaml").write_text(text)
    code, out, err = pool_command("show", run, "town/a.png")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and "run/job.yaml: " in err


def test_show_names_the_closest_keys(run, pool_command):
    code, out, err = pool_command("show", run, "town/b.png")
    assert (code, out) == (2, "")
    assert err.endswith("step_00000020.json: no label of town/b.png (the closest: town/a.png, b.png)\n")
    assert pool_command("show", run, "@@@@")[2].endswith("no label of @@@@\n")


def test_show_of_a_hazy_image_that_is_gone(run, pool_command):
    code, _, err = pool_command("show", run, "b.png")
    assert code == 2 and err.startswith("no hazy image of b.png: cannot read") and len(err.splitlines()) == 1


def test_export_says_what_it_leaves_out(run, pool_command):
    keys = ["../up.png", "a.jpg", "a.png", "bell\x1b[2J.png"]
    save_pool(locate(str(run / "pool")), 30, [photo_label(key) for key in keys])
    code, out, err = pool_command("export", run, "out", "--trust", "--transmission")
    assert (code, err) == (1, "") and "done: 1 labels written, 3 skipped" in out
    assert [line.strip() for line in out.splitlines()[-3:]] == [
        "skipped: ../up.png: leads out of its folder (..)",
        "skipped: a.png: would have the same file as a.jpg",
        r"skipped: bell\x1b[2J.png: has control characters",
    ]
    assert sorted(os.listdir("out")) == ["a.png", "a.transmission.png", "a.trust.png", "labels.csv"]
    code, _, err = pool_command("export", run, "out")
    assert code == 2 and err == "out: not empty; export fills a new folder\n"
    code, out, err = pool_command("export", run, "s3://bucket/out")
    assert (code, out) == (2, "") and "export fills a local folder" in err


def test_rejected_labels_are_counted_and_not_exported(run, pool_command):
    found = find_saved_pool(str(run))
    Review(found.pool).decide(found.read_index()["b.png"][0], "reject")
    code, out, err = pool_command("ls", run, "--json", run / "numbers.json")
    assert (code, err) == (0, "") and "  rejected  1 leave at the next resume\n" in out
    assert json.loads((run / "numbers.json").read_bytes())["rejected_in_review"] == 1
    code, out, err = pool_command("export", run, "out")
    assert (code, err) == (0, "") and "done: 1 labels written, 0 skipped, 1 rejected in review left out" in out
    assert sorted(os.listdir("out")) == ["labels.csv", "town"]

    # A snapshot of after the resume.
    pool = locate(str(run / "pool"))
    snapshots.write(pool, 30, 0, [[]], [PoolCounters()], {"b.png": Scores(0.25, 0.75)})
    assert "  rejected  1 have left, 1 images have no better label yet\n" in pool_command("ls", run / "pool")[1]


def test_what_cannot_be_reviewed_is_one_line(run, pool_command, tmp_path):
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "run.json").write_text("{}")
    locate(str(tmp_path / "begun" / "pool")).child("current.json").write(b"{}")
    damaged = run / "pool" / "review" / "x.json"
    for args, reason in {
        ("nowhere",): "nowhere: no label pool there; expected a snapshot",
        (tmp_path / "pretrain",): "pretrain: a run without a label pool; only colabator jobs make one",
        (tmp_path / "begun",): "begun/pool: no snapshot there (step_00000500.json); a run saves one",
        (run, "--port", "70000"): "--port: expected a port from 0 to 65535, got 70000",
        (run,): "x.json is no review of a label pool: ",
    }.items():
        if args == (run,):
            damaged.parent.mkdir()
            damaged.write_text("{}")
        code, out, err = pool_command("review", *args)
        assert (code, out) == (2, "") and reason in err and len(err.splitlines()) == 1, args


def test_diff(run, pool_command):
    code, out, err = pool_command("diff", run / "pool/step_00000010.json", run / "pool")
    assert (code, err) == (0, "") and "  added      1\n" in out and "3 -> 12\n" in out
    code, out, err = pool_command("diff", "--all", run / "pool/step_00000010.json", run / "pool")
    assert [line.split("\t")[:2] for line in out.splitlines()[1:]] == [["added", "b.png"], ["replaced", "town/a.png"]]


def test_what_cannot_be_read_is_one_line_and_exit_code_2(run, pool_command):
    (run / "pool/segments/00000000-20.index.parquet").write_bytes(b"PAR1")
    for args in (["ls", run], ["show", run, "b.png"], ["export", run, "out"], ["diff", run, run]):
        code, _, err = pool_command(*args)
        assert code == 2 and "cannot be read as labels" in err and len(err.splitlines()) == 1, args
    for args in (
        ["ls", "nowhere"],
        ["show", "nowhere", "b.png"],
        ["export", "nowhere", "out"],
        ["diff", run, "nowhere"],
    ):
        code, _, err = pool_command(*args)
        assert code == 2 and "nowhere: no label pool there" in err and len(err.splitlines()) == 1, args


def test_help_teaches_by_example(pool_command):
    code, out, _ = pool_command("--help")
    assert code == 0 and "corun-ray pool diff RUN/pool/step_00000500.json" in out and "RUN/checkpoint_00000500" in out
