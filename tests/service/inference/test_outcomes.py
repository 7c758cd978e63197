"""What `dehaze` and `depth` tell before Ray starts and at their end; the work on the images is left out."""

import json
import unicodedata
from dataclasses import asdict

import numpy as np
import pytest
import torch

from corun_ray.config.jobs import DehazeJob
from corun_ray.config.loading import build_job
from corun_ray.core.inference.overlapping import Tiling
from corun_ray.core.networks.build import build_network
from corun_ray.core.networks.corun import CORUN
from corun_ray.core.networks.spec import NetworkSpec
from corun_ray.service.data.listing import ManifestError
from corun_ray.service.errors import JobFailed
from corun_ray.service.inference import dehaze as dehazing
from corun_ray.service.inference import depth as depth_estimation
from corun_ray.service.inference.dehaze import plan_dehazing, run_dehazing
from corun_ray.service.inference.made_with import SELF_ENSEMBLE_FILE, record_settings
from corun_ray.service.inference.outcome import Outcome, merge_reasons
from corun_ray.service.inference.restorers import RestorerActor, read_tilings
from corun_ray.service.models.sources import Model
from corun_ray.service.storage import MissingFile, StorageError
from corun_ray.service.telemetry.console import Console
from tests.conftest import photograph, write_image


@pytest.fixture
def photographs(tmp_path):
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "in" / name, photograph(np.random.default_rng(0), 32, 40))
    return tmp_path / "in"


def make_job(source, target, **options) -> DehazeJob:
    section = {"input": str(source), "output": str(target), "model": "corun-small"} | options
    job = build_job({"kind": "dehaze", "name": "photos", "dehaze": section})
    assert isinstance(job, DehazeJob)
    return job


@pytest.fixture
def without_ray(monkeypatch):
    """Ray must not start."""
    for module in (dehazing, depth_estimation):
        monkeypatch.setattr(module, "join_cluster", lambda *job: pytest.fail("Ray starts"))


def test_mistakes_are_told_before_ray_starts(photographs, tmp_path, without_ray):
    with pytest.raises(MissingFile, match="cannot list .*nowhere: No such file or directory"):
        run_dehazing(make_job(tmp_path / "nowhere", tmp_path / "out"), Console())
    with pytest.raises(ManifestError, match="OUTPUT: .* is the folder of INPUT: choose another"):
        run_dehazing(make_job(photographs, f"{photographs}/../in", format="jpg"), Console())

    # Results that were made otherwise.
    write_image(tmp_path / "out/a.png", np.zeros((32, 40, 3), np.uint8))
    (tmp_path / "out" / SELF_ENSEMBLE_FILE).touch()
    with pytest.raises(StorageError, match="cannot resume in .*: its images were made with self_ensemble"):
        run_dehazing(make_job(photographs, tmp_path / "out"), Console(), resume=True)


def test_no_photograph_is_replaced_through_a_link(photographs, tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some/a.png").symlink_to(photographs / "a.png")
    with pytest.raises(ManifestError, match=r"would replace 1 images of INPUT \(first: a.png\): choose another"):
        plan_dehazing(make_job(tmp_path / "some", photographs).dehaze)

    # Below another folder of the input, one image takes the place of another.
    write_image(photographs / "in/a.png", photograph(np.random.default_rng(0), 32, 40))
    with pytest.raises(ManifestError, match=r"would replace 1 images of INPUT \(first: in/a.png\)"):
        plan_dehazing(make_job(photographs, tmp_path).dehaze)


def test_an_image_without_its_map_is_not_done(photographs, tmp_path):
    for name in ("a.png", "b.png", "b.transmission.png"):
        write_image(tmp_path / "out" / name, np.zeros((32, 40, 3), np.uint8))
    plan = plan_dehazing(make_job(photographs, tmp_path / "out", transmission=True).dehaze, resume=True)
    assert plan.wanted == ["a.png"]
    assert plan_dehazing(make_job(photographs, tmp_path / "out").dehaze, resume=True).wanted == []


def test_what_is_done_is_known_in_another_form_of_unicode(photographs, tmp_path):
    (photographs / "a.png").rename(photographs / unicodedata.normalize("NFC", "é.png"))
    write_image(tmp_path / "out" / unicodedata.normalize("NFD", "é.png"), np.zeros((32, 40, 3), np.uint8))
    plan = plan_dehazing(make_job(photographs, tmp_path / "out").dehaze, resume=True)
    assert plan.wanted == ["b.png"]


def test_images_of_two_models_are_not_mixed(photographs, tmp_path, without_ray):
    job, other = (make_job(photographs, tmp_path / "out", model=name) for name in ("corun-small", "other.pth"))
    write_image(tmp_path / "out/a.png", np.zeros((32, 40, 3), np.uint8))
    record_settings(other.dehaze, make_model())
    with pytest.raises(StorageError, match=r"cannot resume in \S+: its .* made by another model \(other.pth\); "):
        run_dehazing(job, Console(), resume=True)
    record_settings(job.dehaze, make_model())
    with pytest.raises(StorageError, match="were made by other weights of corun-small; another output, or no --resume"):
        run_dehazing(job, Console(), resume=True)


def make_model() -> Model:
    return Model(NetworkSpec("corun", {"stages": 2, "width": 4}), CORUN(2, 4).state_dict(), {})


def run_with(monkeypatch, job, rows):
    """Run a job whose images had these outcomes."""
    model = make_model()
    monkeypatch.setattr(dehazing, "join_cluster", lambda *job: "nowhere")
    monkeypatch.setattr(dehazing, "fetch_model", lambda *source: model)
    # Both would start Ray.
    monkeypatch.setattr(dehazing, "MetricRecorder", lambda labels: RecordsNothing())
    monkeypatch.setattr(dehazing, "Log", lambda component, labels: RecordsNothing())
    monkeypatch.setattr(dehazing, "_dehaze_images", lambda section, model, keys: iter(rows))
    run_dehazing(job, Console())


class RecordsNothing:
    def add(self, *arguments, **labels):
        """Take anything."""

    info = warning = add


def test_a_job_of_which_nothing_can_be_used_fails_with_the_reasons(photographs, tmp_path, monkeypatch, capsys):
    rows = [
        {"key": key, "error": "truncated PNG", "pixels": 0, "notes": "", "tilings": "{}"} for key in ("a.png", "b.png")
    ]
    with pytest.raises(JobFailed, match=r"not one of the 2 images can be used \(\S+/a.png: truncated PNG; \S+/b.png: "):
        run_with(monkeypatch, make_job(photographs, tmp_path / "out"), rows)
    assert f"skipped: {photographs}/a.png: truncated PNG" in capsys.readouterr().out


def test_what_is_dropped_and_passed_over_is_said(photographs, tmp_path, monkeypatch, capsys):
    (photographs / "c.heic").touch()
    (photographs / "lost.png").symlink_to("nowhere")
    row = {"error": "", "pixels": 1280, "notes": "alpha channel dropped", "tilings": "{}"}
    rows = [{**row, "key": key} for key in ("a.png", "b.png")]
    run_with(monkeypatch, make_job(photographs, tmp_path / "out"), rows)
    said = capsys.readouterr().out
    assert "passed over: .heic 1" in said and "alpha channel dropped: a.png, b.png" in said
    assert f"skipped: {photographs}/lost.png: a link that leads nowhere" in said


def test_that_images_depend_on_their_tiles_is_said_once(photographs, tmp_path, monkeypatch, capsys):
    rows = []
    for key, difference in (("a.png", 0.01), ("b.png", 0.02)):
        tilings = json.dumps({"model": asdict(Tiling(640, "at the whole picture", difference, difference / 10))})
        rows.append({"key": key, "error": "", "pixels": 1280, "notes": "", "tilings": tilings})
    run_with(monkeypatch, make_job(photographs, tmp_path / "out"), rows)
    said = capsys.readouterr().out
    assert said.count("tiles of 640 px") == 1 and "2 images in tiles of 640 px: " in said
    assert "looks at the whole picture" in said and "by up to 5.1 of 255 levels (mean 0.51)" in said


def test_an_actor_tells_of_tiles_by_network():
    torch.manual_seed(0)
    actor = RestorerActor({}, threads=1, memory_mib=12)
    network = build_network(
        NetworkSpec("NAFNet", {"width": 4, "middle_blk_num": 1, "enc_blk_nums": [1], "dec_blk_nums": [1]})
    )
    for name, parameter in network.named_parameters():
        if name.endswith(("beta", "gamma")):
            torch.nn.init.ones_(parameter)
    actor.networks["new"] = network.eval()
    actor.restore("new", torch.rand(1, 3, 300, 400))

    tilings = read_tilings(actor.take_tilings())
    assert tilings["new"].looks == "at the whole picture" and tilings["new"].side_px < 400
    assert actor.take_tilings() == "{}"


def test_a_job_that_wrote_something_has_not_failed():
    Outcome(written=1, bad_files={"a": "empty file"}).refuse_nothing()
    Outcome(already_written=1, bad_files={"a": "empty file"}).refuse_nothing()
    with pytest.raises(JobFailed, match=r"not one of the 4 images can be used \(1: bad; 2: bad; 3: bad; and 1 more\)"):
        Outcome(bad_files=dict.fromkeys("1234", "bad")).refuse_nothing()


def test_a_truth_of_several_images_is_named_with_all_that_it_takes():
    rows = [("gt/1.png", "truncated PNG"), ("gt/1.png", "truncated PNG"), ("hazy/2_1.png", "empty file")]
    assert merge_reasons(rows) == {
        "gt/1.png": "truncated PNG (takes 2 images with it)",
        "hazy/2_1.png": "empty file",
    }


def test_depth_maps_do_not_go_among_the_photographs(photographs, tmp_path, without_ray):
    (tmp_path / "link").symlink_to("in")
    section = {"input": str(photographs), "weights": str(tmp_path)}
    for output in ("in/depth", "link/depth", "link"):
        job = build_job({"kind": "depth", "name": "x", "depth": section | {"output": str(tmp_path / output)}})
        with pytest.raises(ManifestError, match="depth.output: .* lies in the folder of the photographs"):
            depth_estimation.run_depth_estimation(job, Console())
