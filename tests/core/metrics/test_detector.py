"""Detectors of torchvision from files: torchvision's own under its name, and one of one's own classes."""

from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.models import get_model

from corun_ray.core.choices import DETECTOR_NAMES
from corun_ray.core.metrics.detector import get_detector_file, list_detector_classes, load_detector
from corun_ray.core.weights import WeightsError

SSDLITE = "ssdlite320_mobilenet_v3_large"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under torchvision's name, and those of two classes."""
    folder = tmp_path_factory.mktemp("detectors")
    for name, num_classes in ((get_detector_file(SSDLITE), 91), ("own.pth", 3)):
        torch.manual_seed(num_classes)
        network = get_model(SSDLITE, weights=None, weights_backbone=None, num_classes=num_classes)
        torch.save(network.state_dict(), folder / name)
    return folder


def test_the_names_are_torchvisions() -> None:
    names = set(torchvision.models.list_models(module=torchvision.models.detection))
    others = {name for name in names if name.startswith(("maskrcnn", "keypointrcnn"))}
    assert set(DETECTOR_NAMES) == names - others
    assert get_detector_file("fasterrcnn_resnet50_fpn") == "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"


def test_cocos_numbers_have_gaps() -> None:
    classes = list_detector_classes(SSDLITE)
    assert len(classes) == 80 and (classes["person"], classes["toothbrush"]) == (1, 90)
    assert list_detector_classes(SSDLITE, ["bus", "car"]) == {"bus": 1, "car": 2}


@pytest.mark.parametrize(("file", "classes"), [(get_detector_file(SSDLITE), None), ("own.pth", ["bus", "car"])])
def test_a_detector_finds_what_its_network_finds(folder: Path, file: str, classes: list[str] | None) -> None:
    network = get_model(SSDLITE, weights=None, weights_backbone=None, num_classes=len(classes or range(90)) + 1).eval()
    network.load_state_dict(torch.load(folder / file))
    picture = torch.rand(1, 3, 60, 80)
    (expected,) = network([picture[0]])

    found = load_detector(SSDLITE, file, classes, lambda name: folder / name)(picture)
    assert len(found.scores) > 0 and set(found.labels) <= {*list_detector_classes(SSDLITE, classes).values(), 12, 26}
    torch.testing.assert_close(torch.from_numpy(found.corners).float(), expected["boxes"].detach())
    torch.testing.assert_close(torch.from_numpy(found.scores).float(), expected["scores"].detach())


def test_weights_of_another_network_are_refused(folder: Path) -> None:
    for classes in (None, ["bus"]):
        with pytest.raises(WeightsError, match=r"own.pth: not ssdlite320\S+ with (80|1) classes \(.*size mismatch"):
            load_detector(SSDLITE, "own.pth", classes, lambda name: folder / name)
    torch.save([1, 2], folder / "list.pth")
    with pytest.raises(WeightsError, match="list.pth: not ssdlite320"):
        load_detector(SSDLITE, "list.pth", ["bus"], lambda name: folder / name)
