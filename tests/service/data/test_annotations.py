"""Boxes from VOC's and COCO's files: what is read, how names meet, and what is refused in one line."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corun_ray.config.tasks import EvaluateSection
from corun_ray.core.metrics.detector import list_detector_classes
from corun_ray.service.data.annotations import AnnotationError, Truth, read_truth

DETECTOR = "ssdlite320_mobilenet_v3_large"
COCO = list_detector_classes(DETECTOR)
IMAGES = ["a/one.jpg", "two.png"]
BUS = "<object><name>bus</name><bndbox><xmin>1</xmin><ymin>11</ymin><xmax>50</xmax><ymax>40</ymax></bndbox></object>"
SIZE = "<size><width>60</width><height>40</height><depth>3</depth></size>"


def voc(*objects: str, size: str = SIZE) -> str:
    return f"<annotation>{size}{''.join(objects)}</annotation>"


def write_voc(folder: Path, **texts: str) -> str:
    """Writes `a/one.xml` and `two.xml`, and others by their stems."""
    for stem, text in ({"one": voc(BUS), "two": voc()} | texts).items():
        path = folder / "boxes" / ("a/one.xml" if stem == "one" else f"{stem}.xml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(folder / "boxes")


def coco(**changes: Any) -> dict[str, Any]:
    """Two images; the first has a motorcycle and a crowd of persons."""
    return {
        "images": [
            {"id": 7, "file_name": "a/one.jpg", "width": 60, "height": 40},
            {"id": 9, "file_name": "two.png"},
            {"id": 11, "file_name": "three.png"},
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 44, "name": "motorcycle"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 44, "bbox": [5, 6, 20.5, 10], "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0, 0, 60, 40], "iscrowd": 1},
        ],
    } | changes


def write_coco(folder: Path, content: Any) -> str:
    (folder / "boxes.json").write_text(json.dumps(content))
    return str(folder / "boxes.json")


def read(boxes: str, **keys: Any) -> Truth:
    section = EvaluateSection.model_validate(
        {"hazy": "photos", "detector": DETECTOR, "weights": "w", "boxes": boxes} | keys
    )
    classes = list_detector_classes(DETECTOR, section.detector_classes)
    return read_truth(section, IMAGES, classes)


def test_vocs_pixels_and_names_become_cocos(tmp_path):
    motorbike = BUS.replace("bus", "motorbike").replace("</name>", "</name><difficult>1</difficult>")
    truth = read(write_voc(tmp_path, one=voc(BUS, motorbike), two=voc(BUS.replace(">1<", ">0<"), size=""), more=voc()))
    assert truth.classes == {"bus": COCO["bus"]}
    one, two = (truth.boxes[image] for image in IMAGES)
    np.testing.assert_array_equal(one.corners, [[0, 10, 50, 40]] * 2)
    np.testing.assert_array_equal(two.corners, [[0, 10, 50, 40]])
    assert one.labels.tolist() == [COCO["bus"], COCO["motorcycle"]] and one.difficult.tolist() == [False, True]
    assert truth.sizes_px == {"a/one.jpg": (60, 40), "two.png": None}
    assert truth.unused == [str(tmp_path / "boxes" / "more.xml")]
    assert truth.describe() == "2 bus and 1 difficult in 2 images; 1 annotations match no image"


def test_cocos_file_keeps_its_numbers_and_crowds(tmp_path):
    truth = read(write_coco(tmp_path, coco()))
    assert truth.classes == {"motorcycle": COCO["motorcycle"]} and truth.image_ids == {"a/one.jpg": 7, "two.png": 9}
    np.testing.assert_array_equal(truth.boxes["a/one.jpg"].corners, [[5, 6, 25.5, 16], [0, 0, 60, 40]])
    assert truth.boxes["a/one.jpg"].difficult.tolist() == [False, True]
    assert len(truth.boxes["two.png"].labels) == 0 and len(truth.unused) == 1


def test_boxes_and_detector_may_each_use_the_others_names(tmp_path):
    folder = write_coco(tmp_path, coco())
    truth = read(folder, detector_file="own.pth", detector_classes=("motorbike", "car"), box_classes=("motorbike",))
    assert truth.classes == {"motorbike": 1} and len(truth.boxes["a/one.jpg"].labels) == 1


@pytest.mark.parametrize(
    ("one", "line"),
    [
        ("<annotation>", "a/one.xml: not XML (no element found"),
        ("<html/>", "a/one.xml: expected VOC's <annotation>, got <html>"),
        (voc(BUS.replace("bus", "")), "a/one.xml: object 1 has no name"),
        (voc(BUS.replace(">11<", ">x<")), "a/one.xml: object 1 (bus): bndbox/ymin: 'x' is not a number of pixels"),
        (voc(BUS, BUS.replace(">40<", ">9<")), "object 2 (bus): box 0 10 50 9 (left, top, right, bottom) has no area"),
        (voc(BUS.replace(">50<", ">62<")), "box 0 10 62 40 (left, top, right, bottom) is not within the image of 60 x"),
        (voc(BUS.replace("bus", "cart")), f"no class in common: BOXES has cart, {DETECTOR} knows person, bicycle, car"),
        (
            voc(BUS, BUS.replace("bus", "cart")),
            f"evaluate.boxes: {DETECTOR} does not know cart (evaluate.box_classes names those to measure: bus)",
        ),
        (voc(), "evaluate.boxes: no boxes in BOXES"),
        (voc(BUS.replace("</name>", "</name><difficult>1</difficult>")), "no box to find in BOXES (of bus, all diffi"),
    ],
)
def test_mistakes_in_vocs_files(tmp_path, one, line):
    folder = write_voc(tmp_path, one=one)
    with pytest.raises(AnnotationError, match=re.escape(line.replace("BOXES", folder))) as refusal:
        read(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ([], "expected COCO's lists images, annotations and categories"),
        (coco(annotations=[{"id": 1}]), "not COCO's boxes (KeyError: 'category_id')"),
        (coco(images=[coco()["images"][0]]), "1 of 2 images have no annotation in BOXES (photos/two.png)"),
        (coco(images=[coco()["images"][0]] * 2), "two images are called a/one"),
        (
            coco(annotations=[coco()["annotations"][0] | {"bbox": [50, 6, 20, 10]}]),
            "annotation 1 (motorcycle): box 50 6 70 16 (left, top, right, bottom) is not within the image of 60 x",
        ),
    ],
)
def test_mistakes_in_cocos_file(tmp_path, content, line):
    file = write_coco(tmp_path, content)
    with pytest.raises(AnnotationError, match=re.escape(line.replace("BOXES", file))):
        read(file)


def test_boxes_that_are_not_those_of_the_images(tmp_path):
    folder = Path(write_voc(tmp_path))
    with pytest.raises(AnnotationError, match=f"box_classes: no box in {folder} is of car, dog \\(there are bus\\)"):
        read(str(folder), box_classes=("car", "dog", "bus"))
    (folder / "two.xml").rename(folder / "2.xml")
    with pytest.raises(AnnotationError, match=r"1 of 2 images have no annotation in .* \(photos/two.png\)"):
        read(str(folder))
    (folder / "a" / "one.xml").rename(folder / "1.xml")
    with pytest.raises(AnnotationError, match=r"none of the 2 annotations below \S+ is named like an image \(.*1.xml"):
        read(str(folder))
    with pytest.raises(AnnotationError, match=f"no .xml below {tmp_path}/boxes/a"):
        read(str(folder / "a"))
