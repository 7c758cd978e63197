"""What is found in images before a job uses them."""

import boto3
import numpy as np
import pytest

from corun_ray.service.data.inspection import Inspector, choose_evenly, find_largest_patch_px, prepare_data
from corun_ray.service.data.manifest import ManifestError, build_manifest, list_validation_sets
from corun_ray.service.storage import locate
from tests.conftest import photograph, write_image
from tests.service.jobs import small_job
from tests.unusable import draw_damaged_validation, draw_larger_truth, draw_unusable_depth


def test_a_sample_is_spread_over_all():
    assert choose_evenly(range(5), 5) == choose_evenly(range(5), None) == range(5)
    chosen = choose_evenly(range(1000), 32)
    assert len(set(chosen)) == 32 and (chosen[0], chosen[-1]) == (0, 999)
    assert max(np.diff(chosen)) <= 33


def test_each_unusable_depth_map_has_its_reason(tmp_path):
    root = draw_unusable_depth(tmp_path)
    job = small_job("pretrain", root, tmp_path)
    with pytest.raises(ManifestError) as error:
        prepare_data(job)
    line = str(error.value).replace(str(tmp_path), "")
    assert line == (
        "4 of 6 images cannot be used, more than data.max_bad_fraction (0.01) allows; the first: "
        "/clear/viewer.jpg: depth map viewer.jpg has a suffix that is never read (.mat, .npy, .png are); "
        "/depth/constant.npy: depth map is constant (0.5 everywhere); "
        "/depth/nan.npy: depth map has values that are not finite; "
        "/depth/turned.npy: depth map of 72 x 96 px does not fit its image of 96 x 72 px"
    )
    # What is tolerated is left to the run. `H W 1` is taken like `1 H W`.
    tolerant = small_job("pretrain", root, tmp_path, data={"max_bad_fraction": 0.7})
    (found,) = Inspector().inspect_training(tolerant, prepare_data(tolerant))
    assert [image.uri.rpartition("/")[2] for image in found.usable] == ["plain.jpg", "trailing.jpg"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("nan", "turned"), "data.clear and data.depth: none of the 2 images can be used; the first: .*not finite"),
        (("viewer",), r"^data.depth: no depth maps \(.mat, .npy, .png\) among the 1 files below .*depth \(.jpg 1\)$"),
    ],
)
def test_data_of_which_nothing_can_be_used_are_refused(names, expected, tmp_path):
    job = small_job("pretrain", draw_unusable_depth(tmp_path, names), tmp_path, data={"max_bad_fraction": 1.0})
    with pytest.raises(ManifestError, match=expected):
        prepare_data(job)


@pytest.mark.parametrize("damaged", [1, 4])
def test_a_damaged_validation_image_is_found_and_a_set_of_them_refused(damaged, tmp_path):
    root = draw_damaged_validation(tmp_path, damaged)
    data = {"depth": None, "validation": {"hazy": str(root / "hazy"), "clear": str(root / "clear")}}
    job = small_job("pretrain", root, tmp_path, data=data)
    (found,) = Inspector().inspect_validation(job, list_validation_sets(job))
    assert found.unusable[f"{root}/hazy/0002.jpg"] == "truncated JPEG" and len(found.unusable) == damaged
    if damaged == 1:
        prepare_data(job)
        return
    with pytest.raises(ManifestError, match="^data.validation: none of the 4 images can be used; the first: .*000"):
        prepare_data(job)


def test_larger_truths_need_their_key(tmp_path):
    root = draw_larger_truth(tmp_path)
    keys = {"hazy": str(root / "hazy"), "clear": str(root / "gt")}
    for section in ("validation", "paired"):
        data = {"clear": str(root / "gt"), "depth": None, section: keys}
        with pytest.raises(ManifestError) as error:
            prepare_data(small_job("pretrain", root, tmp_path, data=data))
        assert str(error.value).replace(str(root), "") == (
            f"data.{section}.clear: /hazy/0000.png: degraded image of 128 x 96 px does not fit its clean one of "
            "148 x 116 px (crop_truth: true takes the centre of the clean one)"
        )
        prepare_data(small_job("pretrain", root, tmp_path, data=data | {section: keys | {"crop_truth": True}}))


def test_true_transmissions_are_opened(dataset, tmp_path):
    for number in range(6):
        side_px = 60 if number == 3 else 60 + 4 * number
        write_image(tmp_path / f"light/photo_{number}.png", np.zeros((side_px, 80), np.uint16))
    section = {"hazy": str(dataset / "hazy"), "transmission": str(tmp_path / "light")}
    job = small_job("pretrain", dataset, tmp_path, data={"validation": section})
    (found,) = Inspector().inspect_validation(job, list_validation_sets(job))
    reason = "true transmission of 80 x 60 px, its image has 80 x 72 px"
    assert found.unusable == {str(tmp_path / "light/photo_3.png"): reason}


def test_a_sample_of_many_is_opened_and_all_where_it_is_asked_for(s3_server, tmp_path):
    """In a bucket: images are opened there as in a folder."""
    boto3.client("s3").create_bucket(Bucket="inspected")
    bucket = "s3://inspected/clear"
    small = write_of(tmp_path / "small.png", 16)
    for number in range(40):
        content = b"no picture" if number == 1 else small
        locate(bucket).child(f"{number:02}.png").write(content)
    data = {"clear": bucket, "depth": None, "max_bad_fraction": 0.5}
    job = small_job("pretrain", tmp_path, tmp_path, data=data)
    manifest, calls = build_manifest(job), []
    (sample,) = Inspector().inspect_training(job, manifest)
    (everything,) = Inspector(None, lambda *call: calls.append(call)).inspect_training(job, manifest)
    assert (sample.num_opened, sample.num_images, sample.is_sample) == (32, 40, True)
    assert everything.unusable == {f"{bucket}/01.png": "not an image, or a damaged one"}
    assert calls[-1] == ("data.clear", 40, 40)
    assert everything.describe_smaller(16) is None
    assert everything.describe_smaller(32) == (
        "data.clear: 39 of 40 opened are smaller than a patch of 32 px and will be enlarged; "
        f"the first: {bucket}/00.png (16 x 16 px)"
    )


def write_of(path, side_px):
    """Returns a picture's file."""
    write_image(path, photograph(np.random.default_rng(0), side_px, side_px))
    return path.read_bytes()


def test_the_largest_patch_counts(dataset, tmp_path):
    steps = [{"from_step": 2, "patch_px": 64, "batch_per_worker": 1}]
    assert find_largest_patch_px(small_job("pretrain", dataset, tmp_path, train={"progressive": steps})) == 64
