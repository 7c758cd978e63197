"""Depth maps by Ray Data, with a network of random weights, and a training that reads them."""

import contextlib
import dataclasses
import io
import json
import shutil

import numpy as np
import pytest

from corun_ray.config.loading import build_job
from corun_ray.config.tasks import DepthSection
from corun_ray.core.data.images import BadImage, decode_depth, decode_image
from corun_ray.core.inference.depth import MODEL_FILES
from corun_ray.core.weights import WeightsError
from corun_ray.service.check import check_job
from corun_ray.service.data.manifest import ManifestError, build_manifest
from corun_ray.service.data.sample_maker import SampleMaker
from corun_ray.service.inference import depth as service
from corun_ray.service.inference.depth import encode_depth, read_model
from corun_ray.service.jobs import run_jobs
from corun_ray.service.storage import StorageError
from corun_ray.service.telemetry.console import Console
from tests.conftest import photograph, write_image
from tests.depth_models import write_depth_model
from tests.service.jobs import small_job


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights folder of two models: `depth-anything-v2-small`, the default, and `metric`."""
    folder = tmp_path_factory.mktemp("weights")
    write_depth_model(folder / "depth-anything-v2-small")
    write_depth_model(folder / "metric", "metric")
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two photographs of different shapes, and a file that is none."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(1)
    write_image(folder / "a.png", photograph(rng, 48, 80))
    write_image(folder / "deep" / "b.jpg", photograph(rng, 90, 60))
    (folder / "broken.png").write_text("no picture")
    return folder


def build(photographs, output, weights, **options):
    section = {"input": str(photographs), "output": str(output), "weights": str(weights), **options}
    return build_job({"kind": "depth", "name": "maps", "depth": section})


def run(photographs, output, weights, resume=False, **options):
    """What the job said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        run_jobs([build(photographs, output, weights, **options)], Console(), resume=resume)
    return said.getvalue()


@pytest.fixture(scope="module")
def job_run(local_ray, photographs, weights, tmp_path_factory):
    """A job with nothing else in it: where its maps are, and what it said."""
    folder = tmp_path_factory.mktemp("maps")
    return folder, run(photographs, folder, weights)


def below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_each_photograph_has_a_map_of_its_shape_and_the_broken_one_is_named(job_run, photographs, weights):
    folder, said = job_run
    assert below(folder) == {"a.npy", "deep/b.npy", "depth.json", "contact_sheet.jpg"}
    assert "image 3/3" in said and "2 depth maps written" in said and f"data.depth: {folder}" in said
    assert f"skipped: {photographs}/broken.png: not an image" in said and "data.depth_kind: inverse" in said

    section = DepthSection(input="i", output="o", weights=str(weights))
    estimator = read_model(section, str(weights / section.model)).build()
    for name, photo, shape in (("a.npy", "a.png", (48, 80)), ("deep/b.npy", "deep/b.jpg", (84, 56))):
        image = decode_image((photographs / photo).read_bytes())
        found = np.load(folder / name)
        assert found.dtype == np.float16 and found.shape == shape
        assert np.abs(found - estimator.estimate(image)).max() < 1e-3


def test_the_record_tells_what_the_maps_are_and_the_sheet_shows_them(job_run, weights):
    record = json.loads((job_run[0] / "depth.json").read_text())
    index = json.loads((weights / "depth-anything-v2-small" / "weights.json").read_text())
    assert record == {
        "depth_kind": "inverse",
        "model": "depth-anything-v2-small",
        "model_sha256": index["files"]["model.safetensors"]["sha256"],
        "format": "npy",
    }
    # Two rows, a photograph and its map in each.
    sheet = decode_image((job_run[0] / "contact_sheet.jpg").read_bytes())
    assert sheet.shape[0] > 192 + 320 and sheet.shape[1] > 2 * 320 and sheet.std() > 20


def test_a_training_reads_the_maps(job_run, photographs, dataset, tmp_path):
    data = {"clear": str(photographs), "depth": str(job_run[0]), "patch_px": 32}
    job = small_job("pretrain", dataset, tmp_path, data=data)
    manifest = build_manifest(job)
    assert manifest.depth == ("a.npy", "deep/b.npy")
    assert list(manifest.skipped) == [f"{photographs}/broken.png"]

    def refuse(bad_files):
        raise AssertionError(bad_files)

    # Haze by procedural depth is another.
    samples = SampleMaker(job, manifest, 32, refuse)({"id": np.arange(4)})
    plain = small_job("pretrain", dataset, tmp_path, data=data | {"depth": None})
    others = SampleMaker(plain, dataclasses.replace(manifest, depth=None), 32, refuse)({"id": np.arange(4)})
    assert samples.keys() == others.keys()
    assert any(not np.array_equal(samples[name], others[name]) for name in samples)


def test_resuming_passes_over_the_maps_that_are_there(job_run, photographs, weights, tmp_path, monkeypatch):
    shutil.copytree(job_run[0], tmp_path, dirs_exist_ok=True)
    for name in ("deep/b.npy", "contact_sheet.jpg"):
        (tmp_path / name).unlink()
    asked = []

    def estimate(section, keys, model):
        asked.extend(keys)
        shutil.copy(job_run[0] / "deep" / "b.npy", tmp_path / "deep")
        return iter([{"key": "broken.png", "error": "no picture"}, {"key": "deep/b.jpg", "error": ""}])

    monkeypatch.setattr(service, "_estimate_photographs", estimate)
    said = run(photographs, tmp_path, weights, resume=True)
    assert asked == ["broken.png", "deep/b.jpg"]
    assert "1 depth maps written, 1 were written before" in said
    assert (tmp_path / "contact_sheet.jpg").read_bytes() == (job_run[0] / "contact_sheet.jpg").read_bytes()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"format": "png"}, "holds depth maps of format npy, not png: choose another output"),
        ({"model": "metric"}, "holds depth maps of depth_kind inverse, not metres"),
        ({"depth_kind": "metres"}, "holds depth maps of depth_kind inverse, not metres"),
    ],
)
def test_maps_of_another_model_or_format_are_not_mixed(job_run, photographs, weights, options, told):
    for resume in (False, True):
        with pytest.raises(StorageError, match=told):
            run(photographs, job_run[0], weights, resume, **options)


def no_ray(*sizes):
    raise AssertionError("Ray was started")


def test_mistakes_are_found_before_ray_starts(photographs, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(service, "join_cluster", no_ray)
    (tmp_path / "empty").mkdir()
    for name in ("a.png", "a.jpg"):
        write_image(tmp_path / "twins" / name, photograph(np.random.default_rng(0), 16, 16))
    shutil.copytree(weights / "metric", tmp_path / "damaged" / "metric")
    (tmp_path / "damaged" / "metric" / "model.safetensors").write_bytes(b"else")
    shutil.copytree(weights / "metric", tmp_path / "half" / "metric")
    (tmp_path / "half" / "metric" / "preprocessor_config.json").unlink()

    out, metric = tmp_path / "out", {"model": "metric"}
    cases = [
        (WeightsError, "none has no model depth-anything-v2-small", (photographs, out, tmp_path / "none"), {}),
        (WeightsError, "has no model nobodys", (photographs, out, weights), {"model": "nobodys"}),
        (
            WeightsError,
            "model.safetensors .*size differs",
            (photographs, out, tmp_path / "damaged"),
            metric,
        ),
        (
            WeightsError,
            "preprocessor_config.json .*missing",
            (photographs, out, tmp_path / "half"),
            metric,
        ),
        (ManifestError, "depth.input: no images", (tmp_path / "empty", out, weights), {}),
        (ManifestError, "depth.output: .* lies in the folder of the phot", (photographs, photographs, weights), {}),
        (ManifestError, "a.jpg and a.png would both have the depth map a.npy", (tmp_path / "twins", out, weights), {}),
    ]
    for kind, told, places, options in cases:
        with pytest.raises(kind, match=told) as refused:
            run(*places, **options)
        assert "\n" not in str(refused.value)
    assert not out.exists()


def test_check_looks_at_photographs_and_weights(photographs, weights, tmp_path):
    notes, found = check_job(build(photographs, tmp_path / "out", weights), [])
    assert found == [] and any("3 photographs whose depth is estimated" in note for note in notes)
    assert any(f"{', '.join(MODEL_FILES)} in {weights}" in note for note in notes)
    (mistake,) = check_job(build(photographs, tmp_path / "out", tmp_path), [])[1]
    assert "has no model depth-anything-v2-small" in mistake


@pytest.mark.parametrize("kind", ["inverse", "metres"])
@pytest.mark.parametrize("format", ["npy", "png"])
def test_a_file_has_the_values_of_its_map(kind, format):
    depth = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    if kind == "metres":
        depth = 1 / 256 + 200 * depth
    found = decode_depth(encode_depth(depth, kind, format), f".{format}")
    assert found.dtype == {"npy": np.float16, "png": np.uint16}[format]
    scale = {("inverse", "png"): 65535, ("metres", "png"): 256}.get((kind, format), 1)
    np.testing.assert_allclose(found / scale, depth, rtol=1e-3, atol=1 / 256 if kind == "metres" else 1e-4)


@pytest.mark.parametrize("format", ["npy", "png"])
def test_a_map_of_one_value_after_rounding_is_refused(format):
    nearly_flat = np.linspace(40, 40.001, 12, dtype=np.float32).reshape(3, 4)
    with pytest.raises(BadImage, match="depth map is constant"):
        encode_depth(nearly_flat, "metres", format)


def test_the_farthest_metres_of_a_png_are_its_last_level_and_none_is_without_a_reading():
    depth = np.array([[0.001, 300], [1, 10000]], np.float32)
    found = decode_depth(encode_depth(depth, "metres", "png"), ".png")
    assert found.tolist() == [[1, 65535], [256, 65535]]
