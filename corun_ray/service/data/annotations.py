"""Boxes of objects in images: VOC's folders of XML and COCO's JSON, paired with images and with a detector's classes.

Every mistake in them is found here, before anything starts.
"""

import json
import math
import posixpath
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np

from corun_ray.config.tasks import EvaluateSection
from corun_ray.core.errors import UserError
from corun_ray.core.metrics.detection import Boxes
from corun_ray.service.data.listing import filter_by_suffix
from corun_ray.service.data.pairing import NAMED_FILES, get_stem
from corun_ray.service.storage import locate

XML_SUFFIXES = frozenset({".xml"})
READERS = 16
"""XML files that are read at a time: a request to an object store is mostly waiting."""
VOC_TO_COCO = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""Classes that VOC and COCO name differently."""
COCO_TO_VOC = {coco: voc for voc, coco in VOC_TO_COCO.items()}
OTHER_NAMES = VOC_TO_COCO | COCO_TO_VOC
SLACK_PX = 1.0
"""How far a box may reach over the edge of its image: programs round, and count from 0 or from 1."""


class AnnotationError(UserError):
    """Boxes that an evaluation cannot use; the message is one line."""


@dataclass(frozen=True)
class MarkedBox:
    """One box of an annotation."""

    label: str
    corners: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels from the image's upper left corner."""
    difficult: bool


@dataclass(frozen=True)
class Annotation:
    """The boxes of one image, as an annotation names them."""

    place: str
    """Where it was read."""
    boxes: list[MarkedBox]
    size_px: tuple[int, int] | None
    """Width and height of the image; None where the annotation has none."""
    image_id: int


@dataclass(frozen=True)
class Truth:
    """The boxes that a detector is to find in images."""

    classes: dict[str, int]
    """The detector's classes that have boxes, by their numbers in ascending order."""
    boxes: dict[str, Boxes]
    """Image → boxes of these classes."""
    image_ids: dict[str, int]
    """Image → its number in COCO's files."""
    sizes_px: dict[str, tuple[int, int] | None]
    """Image → width and height, as of `Annotation`."""
    unused: list[str]
    """Annotations that match no image."""

    def describe(self) -> str:
        """Return the number of boxes of each class as text."""
        counts: Counter[int] = Counter()
        for boxes in self.boxes.values():
            counts.update(boxes.labels[~boxes.difficult].tolist())
        named = ", ".join(f"{counts[number]} {label}" for label, number in self.classes.items())
        difficult = sum(int(boxes.difficult.sum()) for boxes in self.boxes.values())
        unused = f"; {len(self.unused)} annotations match no image" if self.unused else ""
        return f"{named} and {difficult} difficult in {len(self.boxes)} images{unused}"


# --- For an evaluation ---


def read_truth(section: EvaluateSection, images: Sequence[str], classes: Mapping[str, int]) -> Truth:
    """Read the boxes of all images, by the classes of the detector.

    `images` are those of `evaluate.hazy`. `classes` are the detector's, with their numbers.

    Raises `StorageError`, and `AnnotationError`, naming images without an annotation, boxes that cannot be, and classes
    that the detector does not know.
    """
    uri = section.boxes
    assert uri is not None
    by_stem = _read_coco(uri) if locate(uri).name.lower().endswith(".json") else _read_voc(uri, images)
    annotations = _pair(images, by_stem, section)
    names = _choose_classes(annotations, section, classes)

    # Convert names to the detector's numbers, boxes of other classes left out.
    boxes, image_ids, sizes_px = {}, {}, {}
    for image, annotation in annotations.items():
        chosen = [box for box in annotation.boxes if box.label in names]
        boxes[image] = Boxes(
            corners=np.array([box.corners for box in chosen], float).reshape(-1, 4),
            labels=np.array([classes[names[box.label]] for box in chosen], np.int64),
            difficult=np.array([box.difficult for box in chosen], bool),
        )
        image_ids[image] = annotation.image_id
        sizes_px[image] = annotation.size_px

    # Precision has no value for a class without a box to find.
    counting: set[int] = set()
    for one in boxes.values():
        counting |= set(one.labels[~one.difficult].tolist())
    if not counting:
        raise AnnotationError(f"evaluate.boxes: no box to find in {uri} (of {_join(names)}, all difficult)")

    used = {label: number for label, number in classes.items() if number in counting}
    stems = {get_stem(image) for image in images}
    unused = sorted(annotation.place for stem, annotation in by_stem.items() if stem not in stems)
    return Truth(dict(sorted(used.items(), key=lambda item: item[1])), boxes, image_ids, sizes_px, unused)


def _pair(images: Sequence[str], by_stem: Mapping[str, Annotation], section: EvaluateSection) -> dict[str, Annotation]:
    """Return each image's annotation.

    Raises `AnnotationError`, naming the first images without one.
    """
    missing = [image for image in images if get_stem(image) not in by_stem]
    if missing:
        named = ", ".join(posixpath.join(section.hazy, image) for image in missing[:NAMED_FILES])
        more = ", ..." if len(missing) > NAMED_FILES else ""
        raise AnnotationError(
            f"evaluate.boxes: {len(missing)} of {len(images)} images have no annotation in {section.boxes} "
            f"({named}{more})"
        )

    # Two images with one annotation would count its boxes twice.
    found: dict[str, Annotation] = {}
    by_place: dict[str, str] = {}
    for image in images:
        annotation = by_stem[get_stem(image)]
        if annotation.place in by_place:
            raise AnnotationError(f"evaluate.boxes: {by_place[annotation.place]} and {image} have one annotation")
        by_place[annotation.place] = image
        found[image] = annotation
    return found


def _choose_classes(
    annotations: Mapping[str, Annotation], section: EvaluateSection, classes: Mapping[str, int]
) -> dict[str, str]:
    """Return the classes to measure: the name in the boxes → the detector's.

    Raises `AnnotationError` for classes that the detector does not know, and for wanted ones that no box has.
    """
    marked: set[str] = set()
    for annotation in annotations.values():
        marked |= {box.label for box in annotation.boxes}
    if not marked:
        raise AnnotationError(f"evaluate.boxes: no boxes in {section.boxes}")

    # Names of VOC and of COCO stand for the same classes.
    if section.box_classes is not None:
        wanted = {label for label in marked if {label, OTHER_NAMES.get(label)} & set(section.box_classes)}
        unmarked = [label for label in section.box_classes if not {label, OTHER_NAMES.get(label)} & marked]
        if unmarked:
            raise AnnotationError(
                f"evaluate.box_classes: no box in {section.boxes} is of {_join(unmarked)} (there are {_join(marked)})"
            )
        marked = wanted

    # The detector's own name comes first.
    names = {}
    for label in sorted(marked):
        name = label if label in classes else OTHER_NAMES.get(label, label)
        if name in classes:
            names[label] = name

    unknown = sorted(marked - names.keys())
    if not names:
        raise AnnotationError(
            f"evaluate.boxes: no class in common: {section.boxes} has {_join(marked)}, "
            f"{section.detector} knows {_join(classes)}"
        )
    if unknown:
        raise AnnotationError(
            f"evaluate.boxes: {section.detector} does not know {_join(unknown)} "
            f"(evaluate.box_classes names those to measure: {_join(names)})"
        )
    return names


def _join(names: Sequence[str] | set[str] | Mapping[str, Any], most: int = 8) -> str:
    """Join names, the first of many only."""
    listed = sorted(names) if isinstance(names, set) else list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


# --- VOC ---


def _read_voc(uri: str, images: Sequence[str]) -> dict[str, Annotation]:
    """Read a folder of XML files, one for each image.

    Files that match no image are named, but not read. Returns stem → annotation.

    Raises `AnnotationError`.
    """
    folder = locate(uri)
    files = filter_by_suffix(folder.list_files(), XML_SUFFIXES)
    if not files:
        raise AnnotationError(f"evaluate.boxes: no .xml below {uri} (VOC's folder of XML files, or COCO's .json)")
    stems = {get_stem(image) for image in images}
    if stems.isdisjoint(map(get_stem, files)):
        raise AnnotationError(
            f"evaluate.boxes: none of the {len(files)} annotations below {uri} is named like an image "
            f"(the first are {files[0]} and {images[0]})"
        )

    def read(numbered: tuple[int, str]) -> Annotation:
        number, file = numbered
        place = folder.child(file)
        if get_stem(file) not in stems:
            return Annotation(place.uri, [], None, number)
        return _parse_voc(place.read(), place.uri, number)

    with ThreadPoolExecutor(READERS) as readers:
        annotations = list(readers.map(read, enumerate(files, 1)))
    return dict(zip(map(get_stem, files), annotations, strict=True))


def _parse_voc(content: bytes, place: str, number: int) -> Annotation:
    """Parse one XML file of VOC; raises `AnnotationError`."""
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise AnnotationError(f"{place}: not XML ({error})") from None
    if root.tag != "annotation":
        raise AnnotationError(f"{place}: expected VOC's <annotation>, got <{root.tag}>")

    # Some programs write sizes of 0 where they do not know them.
    width, height = (_parse_number(root.findtext(f"size/{side}") or "0", place) for side in ("width", "height"))
    size_px = (int(width), int(height)) if width > 0 and height > 0 else None

    boxes = []
    for count, entry in enumerate(root.findall("object"), 1):
        where = f"{place}: object {count}"
        label = (entry.findtext("name") or "").strip()
        if not label:
            raise AnnotationError(f"{where} has no name")

        # VOC counts pixels from 1, the last one included; some programs count from 0.
        left, top, right, bottom = (
            _parse_number(entry.findtext(f"bndbox/{side}"), f"{where} ({label}): bndbox/{side}")
            for side in ("xmin", "ymin", "xmax", "ymax")
        )
        corners = (left - 1 if left >= 1 else left, top - 1 if top >= 1 else top, right, bottom)
        _check_corners(corners, size_px, f"{where} ({label})")
        difficult = (entry.findtext("difficult") or "0").strip() == "1"
        boxes.append(MarkedBox(label, corners, difficult))
    return Annotation(place, boxes, size_px, number)


def _parse_number(text: str | None, where: str) -> float:
    """Parse a number of pixels; raises `AnnotationError`."""
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise AnnotationError(f"{where}: {text!r} is not a number of pixels")
    return number


def _check_corners(corners: tuple[float, float, float, float], size_px: tuple[int, int] | None, where: str) -> None:
    """Check that a box has an area and lies in its image; raises `AnnotationError`."""
    left, top, right, bottom = corners
    shown = f"box {left:g} {top:g} {right:g} {bottom:g} (left, top, right, bottom)"
    if right <= left or bottom <= top:
        raise AnnotationError(f"{where}: {shown} has no area")
    outside = left < -SLACK_PX or top < -SLACK_PX
    if size_px is not None:
        outside = outside or right > size_px[0] + SLACK_PX or bottom > size_px[1] + SLACK_PX
    if outside:
        size = "" if size_px is None else f" of {size_px[0]} x {size_px[1]} px"
        raise AnnotationError(f"{where}: {shown} is not within the image{size}")


# --- COCO ---


def _read_coco(uri: str) -> dict[str, Annotation]:
    """Read one JSON file of COCO.

    Returns stem → annotation. Raises `AnnotationError` for anything else.
    """
    try:
        content = json.loads(locate(uri).read())
    except ValueError as error:
        raise AnnotationError(f"{uri}: not JSON ({error})") from None
    lists = [content.get(key) if isinstance(content, dict) else None for key in ("images", "annotations", "categories")]
    if not all(isinstance(part, list) for part in lists):
        raise AnnotationError(f"{uri}: expected COCO's lists images, annotations and categories")

    try:
        return _parse_coco(content, uri)
    except (KeyError, TypeError, ValueError) as error:
        raise AnnotationError(f"{uri}: not COCO's boxes ({type(error).__name__}: {error})") from None


def _parse_coco(content: Mapping[str, Any], uri: str) -> dict[str, Annotation]:
    """Convert COCO's lists to annotations by stem.

    Raises `AnnotationError`, and `KeyError`, `TypeError` and `ValueError` where entries lack what COCO's have.
    """
    labels = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
    sizes_px = {}
    for entry in content["images"]:
        known = entry.get("width") and entry.get("height")
        sizes_px[entry["id"]] = (int(entry["width"]), int(entry["height"])) if known else None

    # The boxes of each image; a crowd is a region in which nothing is to be found.
    boxes = defaultdict(list)
    for entry in content["annotations"]:
        where = f"{uri}: annotation {entry['id']} ({labels[entry['category_id']]})"
        left, top, width, height = map(float, entry["bbox"])
        corners = (left, top, left + width, top + height)
        _check_corners(corners, sizes_px[entry["image_id"]], where)
        boxes[entry["image_id"]].append(MarkedBox(labels[entry["category_id"]], corners, bool(entry.get("iscrowd", 0))))

    annotations: dict[str, Annotation] = {}
    for entry in content["images"]:
        image_id, name = entry["id"], str(entry["file_name"])
        if get_stem(name) in annotations:
            raise AnnotationError(f"{uri}: two images are called {get_stem(name)}")
        annotations[get_stem(name)] = Annotation(f"{uri}: {name}", boxes[image_id], sizes_px[image_id], int(image_id))
    return annotations
