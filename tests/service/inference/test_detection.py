"""Detection on restored images: figures from findings made by hand, and a whole evaluation with a small detector."""

import contextlib
import csv
import io
import json
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models import get_model

from corun_ray.config.loading import build_job
from corun_ray.config.tasks import EvaluateSection
from corun_ray.core.data.images import decode_image, encode_png
from corun_ray.core.errors import UserError
from corun_ray.core.inference.restore import to_tensor
from corun_ray.core.metrics.detection import Boxes
from corun_ray.core.metrics.detector import load_detector
from corun_ray.core.weights import WeightsError
from corun_ray.service.check import check_job
from corun_ray.service.data.annotations import AnnotationError, Truth
from corun_ray.service.inference import detection
from corun_ray.service.inference.detection import assess_detections
from corun_ray.service.inference.evaluate import run_evaluation
from corun_ray.service.jobs import run_jobs
from corun_ray.service.telemetry.console import Console
from corun_ray.service.weights.folder import index_folder

SSDLITE = "ssdlite320_mobilenet_v3_large"
BOX, ELSEWHERE = [10.0, 10.0, 50.0, 40.0], [60.0, 50.0, 90.0, 90.0]


@pytest.fixture(scope="module", autouse=True)
def few_draws():
    """Enough for these tests, in a third of the time."""
    with mock.patch.object(detection, "DRAWS", 300):
        yield


# --- Figures ---


def finding(*scored: tuple[float, list[float]], size_px: tuple[int, int] = (100, 100), **others) -> str:
    """What one image's detector found in the hazy picture, and in those of other models."""
    found = {}
    for model, one in {"hazy": scored, **others}.items():
        scores, corners = [score for score, _ in one], [box for _, box in one]
        found[model] = {"corners": corners, "labels": [1] * len(one), "scores": scores}
    return json.dumps({"size_px": size_px, "found": found})


def assess(findings, **keys):
    """Each image has one box of the class `bus` at BOX."""
    names = {"hazy": "h", "detector": SSDLITE, "boxes": "b", "weights": "w", "baselines": ("hazy",), "against": "hazy"}
    section = EvaluateSection.model_validate(names | {"models": {"ours": "corun-small"}} | keys)
    one = Boxes(np.array([BOX]), np.array([1]), np.array([False]))
    images = list(findings)
    truth = Truth({"bus": 1}, dict.fromkeys(images, one), {image: 5 for image in images}, dict.fromkeys(images), [])
    return assess_detections(section, truth, findings, {"0": encode_png(np.zeros((100, 200, 3), np.uint8))})


@pytest.fixture(scope="module")
def half_found():
    """Of 20 images the hazy picture's box is found in 5, the restored one's in 15, all surely."""
    hit, miss = (0.9, BOX), (0.8, ELSEWHERE)
    return assess({str(n): finding(hit if n < 5 else miss, ours=[hit if n < 15 else miss]) for n in range(20)})


def test_a_difference_has_an_interval_and_a_chance(half_found):
    # Recall 5/20 and 15/20 at precision 1: the recalls up to these.
    assert half_found.values["hazy"] == pytest.approx([26 / 101] * 4)
    assert half_found.values["ours"] == pytest.approx([76 / 101] * 4)
    interval = half_found.intervals["hazy"]["map50"]
    assert interval.low < 0.15 < 26 / 101 < 0.35 < interval.high and interval.count == 20

    one = half_found.differences["ours"]["map50"]
    assert one.interval.mean == pytest.approx(50 / 101)
    assert 0.2 < one.interval.low < 0.4 and 0.6 < one.interval.high < 0.8
    # By coin flips, all 10 images that differ go one way in 2 of 1024 cases.
    assert 0.001 <= one.p_value < 0.01 and one.verdict == "better"
    assert half_found.format_differences()[0][:2] == ["ours", "map50"]


def test_equal_findings_show_no_difference():
    same = assess({str(n): finding((0.9, BOX), ours=[(0.7, BOX)]) for n in range(4)})
    assert same.values["ours"] == pytest.approx([1.0] * 4)
    one = same.differences["ours"]["map"]
    assert (one.interval.mean, one.interval.high, one.p_value, one.verdict) == (0, 0, 1, "no difference shown")
    assert same.format_values()[1] == ["hazy", "1.000 [1.000, 1.000]", "1.000 [1.000, 1.000]", "1.000"]


def test_one_image_has_no_interval():
    alone = assess({"0": finding((0.9, BOX), ours=[])})
    assert alone.format_values()[1:] == [["hazy", "1.000", "1.000", "1.000"], ["ours", "0.000", "0.000", "0.000"]]
    assert alone.differences["ours"]["map"].verdict == "no difference shown"


def test_pictures_that_do_not_fit_their_boxes_are_left_out():
    small = finding((0.9, BOX), size_px=(40, 40), ours=[])
    found = assess({"0": finding((0.9, BOX), ours=[]), "1": small})
    assert found.images == ["0"]
    assert found.list_missing() == ["no detection: h/1: a box of its annotation is not within its 40 x 40 px"]
    with pytest.raises(AnnotationError, match="none of 1 images fits its annotation"):
        assess({"1": small})


# --- A whole evaluation ---


@pytest.fixture(scope="module")
def prepared(dataset, tmp_path_factory):
    """Boxes of the dataset's photographs, and a random detector that reacts to what it sees."""
    folder = tmp_path_factory.mktemp("detection")
    (folder / "boxes").mkdir()
    for number, path in enumerate(sorted((dataset / "hazy").iterdir())):
        with Image.open(path) as image:
            width, height = image.size
        objects = ""
        for name, right in (("bus", 60), ("motorbike", 30 + number)):
            corners = f"<xmin>5</xmin><ymin>5</ymin><xmax>{right}</xmax><ymax>50</ymax>"
            objects += f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        (folder / "boxes" / f"{path.stem}.xml").write_text(f"<annotation>{size}{objects}</annotation>")

    # Without statistics of its features, a random network gives the same for every picture.
    torch.manual_seed(0)
    network = get_model(SSDLITE, weights=None, weights_backbone=None, num_classes=3).train()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.head(list(network.backbone(torch.rand(2, 3, 320, 320)).values()))
    (folder / "weights").mkdir()
    torch.save(network.state_dict(), folder / "weights" / "own.pth")
    index_folder(str(folder / "weights"))
    return folder


def build(dataset, prepared, storage, **keys):
    section = {
        "hazy": str(dataset / "hazy"),
        "baselines": ("hazy", "dark_channel"),
        "metrics": ("fade",),
        "weights": str(prepared / "weights"),
        "detector": SSDLITE,
        "detector_file": "own.pth",
        "detector_classes": ("motorcycle", "bus"),
        "boxes": str(prepared / "boxes"),
        "against": "hazy",
    }
    return build_job({"kind": "evaluate", "name": "d", "storage": str(storage), "evaluate": section | keys})


@pytest.fixture(scope="module")
def evaluated(local_ray, dataset, prepared, tmp_path_factory):
    storage = tmp_path_factory.mktemp("storage")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        run_jobs([build(dataset, prepared, storage)], Console())
    (storage / "output").write_text(output.getvalue())
    (run,) = storage.glob("d-*")
    return run


def test_the_detector_saw_the_picture_of_each_model(evaluated, dataset, prepared):
    results = {
        name: json.loads((evaluated / f"detections/{name}.json").read_text()) for name in ("hazy", "dark_channel")
    }
    assert results["hazy"] != results["dark_channel"]
    detect = load_detector(SSDLITE, "own.pth", ["motorcycle", "bus"], lambda name: prepared / "weights" / name)
    first = min((dataset / "hazy").iterdir())
    expected = detect(to_tensor(decode_image(first.read_bytes())))
    scores = [entry["score"] for entry in results["hazy"] if entry["image_id"] == 1]
    np.testing.assert_allclose(sorted(scores), sorted(expected.scores), rtol=1e-4)


def test_others_get_the_same_figures_from_the_files(evaluated):
    rows = list(csv.DictReader(io.StringIO((evaluated / "detection.csv").read_text())))
    figures = {(row["model"], row["class"], row["figure"]): float(row["value"]) for row in rows}
    assert len(figures) == 2 * 3 * 2 and {row["boxes"] for row in rows if row["class"] == "bus"} == {"6"}
    for model in ("hazy", "dark_channel"):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(evaluated / "detections/boxes.json"))
            evaluation = COCOeval(truth, truth.loadRes(str(evaluated / f"detections/{model}.json")), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        assert evaluation.stats[:2] == pytest.approx([figures[model, "all", "ap"], figures[model, "all", "ap50"]])


def test_what_is_shown(evaluated):
    output = (evaluated.parent / "output").read_text()
    assert f"boxes found by {SSDLITE} in 6 images" in output and "difference from hazy (p: the two swapped" in output
    assert ">Detection</h2>" in (evaluated / "report.html").read_text()
    with Image.open(evaluated / "detection.png") as sheet:
        green = (np.asarray(sheet) == (60, 200, 90)).all(axis=2)
    assert sheet.width > 2 * 400 and green.sum() > 6 * 2 * 100
    assert {row["model"] for row in csv.DictReader((evaluated / "detection_comparison.csv").open())} == {"dark_channel"}


def test_mistakes_are_found_before_anything_starts(dataset, prepared, tmp_path, capsys):
    job = build(dataset, prepared, tmp_path / "runs", detector_classes=("bus",), box_classes=("bus",))
    with pytest.raises(WeightsError, match=f"own.pth: not {SSDLITE} with 1 classes"):
        run_evaluation(job, Console())
    job = build(dataset, prepared, tmp_path / "runs", detector_file=None, detector_classes=None)
    with pytest.raises(UserError, match=r"ssdlite320_mobilenet_v3_large_coco-a79551df.pth \(for evaluate.detector"):
        run_jobs([job], Console())
    assert capsys.readouterr().out == "" and not (tmp_path / "runs").exists()


def test_check_tells_of_the_boxes(dataset, prepared, tmp_path):
    notes, mistakes = check_job(build(dataset, prepared, tmp_path), [])
    assert "boxes     6 motorcycle, 6 bus and 0 difficult in 6 images" in notes and mistakes == []
    _, mistakes = check_job(build(dataset, prepared, tmp_path, boxes=str(tmp_path)), [])
    assert mistakes == [
        f"evaluate.boxes: no .xml below {tmp_path} (VOC's folder of XML files, or COCO's .json)",
    ]
