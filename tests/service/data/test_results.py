"""Folders of another method's results among the models of an evaluation."""

import shutil

import pytest

from corun_ray.config.tasks import EvaluateSection
from corun_ray.service.data.manifest import ManifestError, list_images
from corun_ray.service.data.results import find_results, holds_results


def find(dataset, **models):
    section = EvaluateSection(hazy=str(dataset / "hazy"), models={name: str(source) for name, source in models.items()})
    return find_results(section, list_images(section.hazy, "evaluate.hazy"))


def test_images_are_paired_by_stem_and_models_are_left_alone(dataset, tmp_path):
    theirs = shutil.copytree(dataset / "hazy_truth", tmp_path / "theirs")
    (theirs / "photo_2.png").rename(theirs / "photo_2.jpg")
    (theirs / "notes.txt").write_text("made by hand")
    model = tmp_path / "pulled"
    model.mkdir()
    for name in ("model.safetensors", "config.json", "pictures.jpg"):
        (model / name).touch()
    (tmp_path / "net.pth").touch()
    sources = {"pulled": model, "file": tmp_path / "net.pth", "shipped": "corun-small", "registered": "models:/x/1"}
    found = find(dataset, theirs=theirs, gone=tmp_path / "none", **sources)
    assert found.keys() == {"theirs"} and len(found["theirs"].images) == 6
    assert found["theirs"].images["photo_2.png"] == "photo_2.jpg"
    assert holds_results(str(theirs)) and not holds_results(str(model)) and not holds_results("corun-small")


def test_a_folder_that_lacks_results_is_refused(dataset, tmp_path):
    theirs = shutil.copytree(dataset / "hazy_truth", tmp_path / "theirs")
    (theirs / "photo_4.png").unlink()
    expected = "evaluate.models.theirs: 1 of 6 hazy images have no result .*photo_4.png: no result of this name"
    with pytest.raises(ManifestError, match=expected):
        find(dataset, theirs=theirs)


def test_a_folder_of_both_kinds_or_of_none_is_refused(dataset, tmp_path):
    both = shutil.copytree(dataset / "hazy_truth", tmp_path / "both")
    (both / "network.pth").touch()
    with pytest.raises(ManifestError, match=r"both holds both a model \(network.pth\) and results \(photo_0.png\)"):
        find(dataset, theirs=both)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match="evaluate.models.theirs: .*empty holds neither a model"):
        find(dataset, theirs=tmp_path / "empty")
