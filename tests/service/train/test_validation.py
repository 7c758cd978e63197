"""What is measured and pictured during training, in one process."""

import math
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from corun_ray.core.data.images import decode_image
from corun_ray.core.inference.pictures import GAP_PX, HEADING_PX
from corun_ray.core.inference.restore import to_tensor
from corun_ray.core.metrics.measure import psnr
from corun_ray.core.networks.corun import Restoration
from corun_ray.core.scoring.coherence import Coherence
from corun_ray.core.training.labels import LocalPool
from corun_ray.core.training.losses import COLABATOR_WEIGHTS, Losses
from corun_ray.core.training.steps import Colabator
from corun_ray.core.weights import WeightsError
from corun_ray.service.check import check_job
from corun_ray.service.data.manifest import ManifestError, build_manifest, load_image
from corun_ray.service.train.driver import prepare
from corun_ray.service.train.failures import describe_cause
from corun_ray.service.train.validation import Validator
from corun_ray.service.weights.needed import find_needed_files
from tests.conftest import write_image
from tests.naming import make_sots_indoor
from tests.service.iqa_weights import BRISQUE_FILE, write_brisque_weights
from tests.service.jobs import small_job
from tests.unusable import draw_damaged_validation

CELL_PX = 192


class Unchanged(nn.Module):
    """Returns the image as it is; a transmission of one half, or none."""

    def __init__(self, has_transmission: bool) -> None:
        super().__init__()
        self.has_transmission = has_transmission

    def forward(self, hazy):
        return Restoration(hazy, torch.full_like(hazy[:, :1], 0.5) if self.has_transmission else None)


def validator(job, rank=0):
    return Validator(job, build_manifest(job), rank, 1, torch.device("cpu"))


@pytest.fixture
def sections(dataset):
    truth = {"hazy": str(dataset / "hazy"), "clear": str(dataset / "hazy_truth")}
    same = {"hazy": str(dataset / "clear"), "clear": str(dataset / "clear")}
    return {"truth": truth, "same": same, "far": {"hazy": str(dataset / "clear")}}


def test_each_set_is_measured_under_its_name(dataset, tmp_path, sections):
    sets = {name: sections[name] for name in ("far", "same")}
    job = small_job("pretrain", dataset, tmp_path, data={"validation": sections["truth"], "validation_sets": sets})
    result = validator(job).measure(Unchanged(True))
    metrics = result.metrics
    assert set(metrics) == {
        "val/fade",
        "val/psnr",
        "val/ssim",
        "val/far/fade",
        *(f"val/same/{name}" for name in ("fade", "psnr", "ssim")),
    }
    expected = [
        psnr(*(to_tensor(load_image(sections["truth"][side], f"photo_{i}.png")) for side in ("hazy", "clear"))).item()
        for i in range(6)
    ]
    assert metrics["val/psnr"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert result.notes == [
        "val/same/psnr: 8 of 8 images without a finite value, left out of the mean (see validation.csv)"
    ]
    assert math.isinf(metrics["val/same/psnr"]) and metrics["val/same/ssim"] == pytest.approx(1)
    assert metrics["val/far/fade"] == metrics["val/same/fade"] != metrics["val/fade"]


def test_the_metrics_of_the_job_are_measured(dataset, tmp_path, sections):
    """BRISQUE by its authors' parameters, and a mean over the images that have a finite value."""
    mixed = tmp_path / "mixed"
    shutil.copytree(dataset / "hazy_truth", mixed)
    write_image(mixed / "photo_0.png", load_image(sections["truth"]["hazy"], "photo_0.png"))
    train = {
        "validation_metrics": ["brisque", "psnr"],
        "validation_weights": str(write_brisque_weights(tmp_path / "weights")),
    }
    data = {"validation": sections["truth"] | {"clear": str(mixed)}}
    result = validator(small_job("pretrain", dataset, tmp_path, data=data, train=train)).measure(Unchanged(True))
    assert result.metrics.keys() == {"val/brisque", "val/psnr"}
    values = [one.values for one in result.measured]
    assert math.isinf(values[0]["psnr"])
    assert result.metrics["val/psnr"] == pytest.approx(np.mean([one["psnr"] for one in values[1:]]))
    assert result.metrics["val/brisque"] == pytest.approx(np.mean([one["brisque"] for one in values]))
    (note,) = result.notes
    assert note.startswith("val/psnr: 1 of 6 images without a finite value")


def test_weights_of_a_metric_that_are_missing_are_told_before_any_worker_starts(dataset, tmp_path, sections):
    weights = write_brisque_weights(tmp_path / "weights")
    data = {"validation": sections["far"]}
    for folder, expected in ((None, "names no weights folder"), (weights, "NIMA.* is not in .*weights.json")):
        train = {"validation_metrics": ["brisque", "nima"], "validation_weights": folder and str(folder)}
        job = small_job("pretrain", dataset, tmp_path, data=data, train=train)
        with pytest.raises(WeightsError, match=f"train.validation_metrics: .*{expected}"):
            prepare(job, tmp_path)
    needed = find_needed_files(job)[str(weights)]
    assert needed[BRISQUE_FILE] == "train.validation_metrics brisque" and len(needed) == 2
    _, (mistake,) = check_job(job, [])
    assert mistake.startswith("weights: NIMA") and "(for train.validation_metrics nima): missing" in mistake


class Guess(nn.Module):
    """Returns the image as it is, and its mean colour as the transmission."""

    def forward(self, hazy):
        return Restoration(hazy, hazy.mean(1, keepdim=True))


def test_a_transmission_is_held_against_its_truth(dataset, tmp_path, sections):
    rng = np.random.default_rng(0)
    for i in range(6):
        grey = load_image(sections["truth"]["hazy"], f"photo_{i}.png").mean(2)
        noise = (0 if i else 400) * rng.standard_normal(grey.shape)  # the first one is no guess of it
        write_image(tmp_path / "light" / f"photo_{i}.png", (256 * (grey + noise)).clip(0, 65535).astype(np.uint16))
    with_light = sections["truth"] | {"transmission": str(tmp_path / "light")}
    job = small_job("pretrain", dataset, tmp_path, data={"validation": with_light}, train={"validation_images": 2})
    result = validator(job).measure(Guess())
    metrics, measured = result.metrics, result.measured
    ranks = [one.values["transmission_rank"] for one in measured]
    assert abs(ranks[0]) < 0.3 and min(ranks[1:]) > 0.99
    assert metrics["val/transmission_rank"] == pytest.approx(np.mean(ranks))
    picture = decode_image(validator(job).draw_picture(Guess(), None))
    assert num_columns(picture) == 5, "hazy, output, transmission, truth, true transmission"
    # An image whose map has another size is left out, and the map is named.
    write_image(tmp_path / "light" / "photo_3.png", np.zeros((20, 24), np.uint16))
    result = validator(job).measure(Guess())
    reason = "true transmission of 24 x 20 px, its image has 80 x 72 px"
    assert result.own_notes == [f"left out of val: {tmp_path}/light/photo_3.png: {reason}"]
    assert [one.image for one in result.measured] == [f"photo_{i}.png" for i in (0, 1, 2, 4, 5)]


def test_images_without_a_true_transmission_are_named(dataset, tmp_path, sections):
    with_light = sections["truth"] | {"transmission": str(dataset / "depth")}
    job = small_job("pretrain", dataset, tmp_path, data={"validation": with_light})
    with pytest.raises(ManifestError, match="data.validation.transmission: 6 of 6 hazy images have no true transmissi"):
        validator(job)


def test_a_job_without_held_out_images_measures_nothing(dataset, tmp_path):
    result = validator(small_job("pretrain", dataset, tmp_path)).measure(Unchanged(True))
    assert (result.metrics, result.measured, result.notes) == ({}, [], [])


def test_every_image_has_its_values_and_some_have_pictures(dataset, tmp_path, sections):
    job = small_job(
        "pretrain", dataset, tmp_path, data={"validation": sections["truth"]}, train={"validation_images": 2}
    )
    result = validator(job).measure(Unchanged(True))
    metrics, measured = result.metrics, result.measured
    assert [one.image for one in measured] == [f"photo_{i}.png" for i in range(6)]
    for name in ("fade", "psnr", "ssim"):
        assert np.mean([one.values[name] for one in measured]) == pytest.approx(metrics[f"val/{name}"])
    pictured = {one.image for one in measured if one.pictures is not None}
    by_metric = [sorted(measured, key=lambda one: one.values[name]) for name in ("fade", "psnr", "ssim")]
    best_and_worst = {ranked[place].image for ranked in by_metric for place in (0, -1)}
    assert pictured == {"photo_0.png", "photo_1.png"} | best_and_worst
    pictures = measured[0].pictures
    assert decode_image(pictures.hazy).shape == decode_image(pictures.output).shape == (60, 80, 3)


def num_columns(picture: np.ndarray) -> int:
    return (picture.shape[1] - GAP_PX) // (CELL_PX + GAP_PX)


@pytest.mark.parametrize("has_transmission", [True, False])
@pytest.mark.parametrize("held", ["truth", "far", None])
def test_the_picture_has_a_column_for_what_there_is(held, has_transmission, dataset, tmp_path, sections):
    data = {} if held is None else {"validation": sections[held]}
    job = small_job("pretrain", dataset, tmp_path, data=data, train={"validation_images": 2})
    picture = decode_image(validator(job).draw_picture(Unchanged(has_transmission), None))
    assert num_columns(picture) == 2 + has_transmission + (held != "far")


def test_sets_with_and_without_a_truth_share_one_picture(dataset, tmp_path, sections):
    """Two images of each; where a set has no truth, its cell is empty."""
    sets = {"far": sections["far"], "truth": sections["truth"]}
    job = small_job("pretrain", dataset, tmp_path, data={"validation_sets": sets}, train={"validation_images": 4})
    picture = decode_image(validator(job).draw_picture(Unchanged(False), None))
    assert num_columns(picture) == 3
    first_line = picture[HEADING_PX : HEADING_PX + 144]
    truth_cell = first_line[:, GAP_PX + 2 * (CELL_PX + GAP_PX) :]
    assert np.ptp(truth_cell) == 0 and np.ptp(first_line[:, :CELL_PX]) > 50
    heights = [144, 144, 144, round(192 * 64 / 80)]  # views are 72 x 96 px, photographs 60 x 80 and 64 x 80
    assert picture.shape[0] == HEADING_PX + sum(heights) + 4 * GAP_PX


def test_samples_that_the_worker_makes_are_pictured_as_those_of_the_stream(dataset, tmp_path):
    pictures = []
    for place in ("stream", "worker"):
        data = {"camera": "none", "synthesis": place}
        job = small_job("pretrain", dataset, tmp_path, data=data, train={"validation_images": 2})
        pictures.append(decode_image(validator(job).draw_picture(Unchanged(False), None)).astype(int))
    assert num_columns(pictures[0]) == 3
    assert np.mean(np.abs(pictures[0] - pictures[1]) > 1) < 0.002


def test_pairs_are_pictured_where_nothing_is_held_out(dataset, tmp_path, sections):
    job = small_job("pretrain", dataset, tmp_path, data={"paired": sections["truth"]}, train={"validation_images": 2})
    assert num_columns(decode_image(validator(job).draw_picture(Unchanged(True), None))) == 4


def test_a_photograph_that_cannot_be_used_is_not_pictured_and_fails_nothing(dataset, tmp_path):
    hazy = tmp_path / "hazy"
    shutil.copytree(dataset / "hazy", hazy)
    (hazy / "a_broken.png").write_text("no picture")
    job = small_job("colabator", dataset, tmp_path, data={"hazy": str(hazy)}, train={"validation_images": 2})
    colabator = Colabator(Unchanged(True), Coherence(block_px=32), LocalPool(), Losses(COLABATOR_WEIGHTS))
    one = validator(job)
    assert one.manifest.hazy[0] == "a_broken.png"
    pictures = [decode_image(one.draw_picture(Unchanged(True), colabator))]
    (hazy / "a_broken.png").unlink()
    pictures += [decode_image(validator(job).draw_picture(Unchanged(True), colabator))]
    assert np.array_equal(*pictures)


def test_a_truth_with_a_border_is_measured_and_pictured_without_it(dataset, tmp_path):
    named = make_sots_indoor(tmp_path / "sots")
    job = small_job("pretrain", dataset, tmp_path, data={"validation": named.keys}, train={"validation_images": 1})
    for image in validator(job).measure(Unchanged(False)).measured:
        hazy = load_image(named.keys["hazy"], image.image)
        truth = load_image(named.keys["clear"], named.pairs[image.image])[2:-3, 2:-3]
        assert image.values["psnr"] == pytest.approx(psnr(to_tensor(hazy), to_tensor(truth)).item())
    (row,) = validator(job)._make_validation_rows(Unchanged(False), 1)
    np.testing.assert_array_equal(np.abs(0.5 * row["truth"] + 110 - row["hazy"]) <= 1, True)

    other = small_job("pretrain", dataset, tmp_path, data={"validation": named.keys | {"crop_truth": False}})
    with pytest.raises(ManifestError, match=r"^val: none of .* can be used \(.*/hazy/1400_1.png: degraded image of"):
        validator(other).measure(Unchanged(False))


def test_a_damaged_image_is_left_out_named_once_and_not_pictured(tmp_path):
    root = draw_damaged_validation(tmp_path)
    data = {"depth": None, "validation": {"hazy": str(root / "hazy"), "clear": str(root / "clear")}}
    job = small_job("pretrain", root, tmp_path, data=data, train={"validation_images": 4})
    one = validator(job)
    result = one.measure(Unchanged(False))
    assert [image.image for image in result.measured] == ["0000.jpg", "0001.jpg", "0003.jpg"]
    assert result.metrics["val/psnr"] == pytest.approx(np.mean([image.values["psnr"] for image in result.measured]))
    assert result.own_notes == [f"left out of val: {root}/hazy/0002.jpg: truncated JPEG"]
    assert one.measure(Unchanged(False)).own_notes == []
    assert len(one._make_validation_rows(Unchanged(False), 4)) == 3


class Refuses(nn.Module):
    """Fails at every image."""

    def forward(self, hazy):
        raise ValueError("no such sides")


def test_a_network_that_fails_at_a_validation_image_names_it(dataset, tmp_path, sections):
    job = small_job("pretrain", dataset, tmp_path, data={"validation": sections["far"]})
    with pytest.raises(ValueError) as error:
        validator(job).measure(Refuses())
    expected = f"ValueError: no such sides (at the validation image {dataset}/clear/view_0.png)"
    assert describe_cause(error.value) == expected
