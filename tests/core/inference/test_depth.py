"""Depth estimators from their files: what they predict, and one line for files of no estimator."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from corun_ray.core.inference.depth import MODEL_FILES, DepthModel
from corun_ray.core.weights import WeightsError
from tests.conftest import photograph
from tests.depth_models import write_depth_model

OF_CLIP = b'{"image_processor_type": "CLIPImageProcessor"}'
PHOTO = photograph(np.random.default_rng(0), 60, 100)


@pytest.fixture(scope="module")
def relative(tmp_path_factory):
    return write_depth_model(tmp_path_factory.mktemp("relative"))


def read(folder, kind=None):
    return DepthModel("mine", {name: (folder / name).read_bytes() for name in MODEL_FILES}, kind)


def test_inverse_depth_fills_its_range_in_the_photographs_shape(relative):
    estimator = read(relative).build()
    depth = estimator.estimate(PHOTO)
    assert estimator.kind == "inverse" and depth.shape == (59, 98) and depth.dtype == np.float32
    assert (depth.min(), depth.max()) == (0, 1)

    # The network itself, without the processor and the scale.
    inputs = estimator.processor(images=PHOTO, return_tensors="pt")
    with torch.inference_mode():
        raw = estimator.network(**inputs).predicted_depth[None]
    raw = torch.nn.functional.interpolate(raw, size=(59, 98), mode="bicubic", align_corners=False)[0, 0].numpy()
    np.testing.assert_allclose(depth, (raw - raw.min()) / (raw.max() - raw.min()), atol=1e-4)


@pytest.mark.parametrize("kind", ["metric", "glpn"])
def test_metres_stay_metres_and_none_is_without_a_reading(tmp_path, kind):
    estimator = read(write_depth_model(tmp_path, kind)).build()
    depth = estimator.estimate(PHOTO)
    assert estimator.kind == "metres" and depth.shape == {"metric": (59, 98), "glpn": (58, 96)}[kind]
    assert depth.min() >= 1 / 256 and 0.01 < depth.max() < 80 and depth.max() != 1


def test_a_map_is_never_larger_than_its_photograph(relative):
    assert read(relative).build().estimate(PHOTO[:20, :30]).shape == (20, 30)


def test_the_kind_may_be_given(relative):
    assert read(relative, "metres").build().kind == "metres"


def change_config(files, **changes):
    return files | {"config.json": json.dumps(json.loads(files["config.json"]) | changes).encode()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda files: change_config(files, model_type="bert"), r"a model of type bert, which estimates no depth\)"),
        (lambda files: change_config(files, model_type="nobodys"), "not a depth estimator of transformers"),
        (lambda files: files | {"config.json": b"no json"}, "not a depth estimator of transformers"),
        (lambda files: files | {"model.safetensors": b"no tensors"}, "not a depth estimator of transformers"),
        (lambda files: files | {"preprocessor_config.json": OF_CLIP}, "CLIPImageProcessor of its prep.* not for depth"),
        (lambda files: change_config(files, neck_hidden_sizes=[8, 16]), "not a depth estimator of transformers"),
    ],
)
def test_files_of_no_depth_estimator_are_refused_in_one_line(relative, change, reason):
    model = read(relative)
    with pytest.raises(WeightsError, match=f"^mine: .*{reason}") as refused:
        DepthModel("mine", change(model.files)).build()
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 420


def test_tensors_that_are_missing_are_not_drawn_at_random(relative, tmp_path):
    files = dict(read(relative).files)
    tensors = load_file(relative / "model.safetensors")
    del tensors["head.conv1.weight"]
    save_file(tensors, tmp_path / "part.safetensors", {"format": "pt"})
    files["model.safetensors"] = (tmp_path / "part.safetensors").read_bytes()
    with pytest.raises(WeightsError, match=r"1 tensors are not in its model.safetensors \(head.conv1.weight, ...\)"):
        DepthModel("mine", files).build()
