"""The model that comes with the package: its files, its name as a source, and what it does to a hazy image."""

import shutil
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from ray._private.runtime_env.packaging import create_package
from safetensors.torch import load_file, save_file

from corun_ray import PACKAGE
from corun_ray.core.choices import SHIPPED_MODELS
from corun_ray.core.inference.restore import restore
from corun_ray.core.networks.corun import CORUN, restore_by_closed_form
from corun_ray.core.networks.spec import NetworkSpec
from corun_ray.core.training.checkpoints import LoadedNetwork, read_spec, save_model
from corun_ray.core.training.state import TrainState
from corun_ray.service.cluster.submission import EXCLUDED_PATTERNS
from corun_ray.service.models.sources import (
    SHIPPED_FOLDER,
    ModelSourceError,
    fetch_model,
    load_starting_model,
    pull_model,
)
from corun_ray.service.serve.deployment import ServedModel, identify
from tests import ROOT
from tests.service.jobs import small_job

MAX_BYTES = 6_000_000


@pytest.mark.parametrize("name", SHIPPED_MODELS)
def test_the_files_are_small_finite_and_of_the_size_that_job_files_know(name: str) -> None:
    folder = SHIPPED_FOLDER / name
    assert read_spec(folder) == NetworkSpec("corun", dict(SHIPPED_MODELS[name]))
    assert (folder / "README.md").read_text().startswith(f"# {name}\n")

    weights = folder / "model.safetensors"
    assert weights.stat().st_size < MAX_BYTES
    for tensor in load_file(weights).values():
        assert tensor.dtype == torch.float16 and tensor.isfinite().all()


def test_every_folder_is_in_the_table() -> None:
    assert {path.name for path in SHIPPED_FOLDER.iterdir()} == set(SHIPPED_MODELS)


def test_every_file_beside_the_code_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    installed = {path for pattern in settings["package-data"]["corun_ray"] for path in PACKAGE.glob(pattern)}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert installed == {path for path in files if path.suffix != ".py"}


def test_a_submitted_job_takes_the_model_along(tmp_path: Path) -> None:
    # Ray leaves out what .gitignore names, and our own patterns.
    checkout = tmp_path / "checkout"
    shutil.copytree(SHIPPED_FOLDER, checkout / SHIPPED_FOLDER.relative_to(ROOT))
    shutil.copy(ROOT / ".gitignore", checkout)
    create_package(str(checkout), tmp_path / "code.zip", include_gitignore=True, excludes=EXCLUDED_PATTERNS)

    sent = {Path(name) for name in zipfile.ZipFile(tmp_path / "code.zip").namelist()}
    files = {path.relative_to(ROOT) for path in SHIPPED_FOLDER.rglob("*") if path.is_file()}
    assert len(files) == 3 and files <= sent


def test_the_name_comes_before_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corun-small").mkdir()
    save_model(tmp_path / "corun-small", LoadedNetwork(CORUN(3, 4), NetworkSpec("corun", {"stages": 3, "width": 4})))
    assert fetch_model("corun-small", "").spec.args == {"stages": 2, "width": 8}
    assert fetch_model("./corun-small", "").spec.args == {"stages": 3, "width": 4}
    assert identify("corun-small", "") == ("corun-small", ServedModel("corun-small", None))


def test_it_restores_other_than_the_closed_form() -> None:
    # A scene of smooth colours behind haze of a transmission that falls from left to right.
    scene = torch.rand((1, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    scene = torch.nn.functional.interpolate(scene, (64, 64), mode="bilinear") * 0.8
    transmission = torch.linspace(0.9, 0.4, 64).expand(1, 1, 64, 64)
    hazy = scene * transmission + 0.9 * (1 - transmission)

    restored = restore(fetch_model("corun-small", "").build().eval(), hazy).scene
    assert restored.isfinite().all()
    assert (restored - restore_by_closed_form(hazy).scene).abs().mean() > 0.01
    assert (restored - scene).abs().mean() < (hazy - scene).abs().mean()


def test_a_training_starts_from_it_in_float32(dataset: Path, tmp_path: Path) -> None:
    network = {"init": "corun-small", "width": 8}
    model = load_starting_model(small_job("pretrain", dataset, tmp_path, network=network), tmp_path)
    state = TrainState.start(model.build())
    assert all(parameter.dtype == torch.float32 for parameter in state.student.parameters())

    before = {name: tensor.clone() for name, tensor in state.student.state_dict().items()}
    restored, _ = state.student(torch.rand(1, 3, 32, 32))
    state.backward({"pixel": restored.abs().mean()})
    state.update(lr=1e-3, ema=0.9, batch_images=1)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in state.student.state_dict().items())


def test_half_precision_is_half_the_size_and_rounds(tmp_path: Path) -> None:
    source = str(tmp_path / "net.safetensors")
    save_file(CORUN(2, 8).state_dict(), source)
    pull_model(source, tmp_path / "whole", "")
    pull_model(source, tmp_path / "half", "", half=True)
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "half")}
    assert 0.48 < sizes["half"] / sizes["whole"] < 0.52

    whole, half = (fetch_model(str(tmp_path / name), "").params for name in ("whole", "half"))
    assert whole is not None and half is not None
    torch.testing.assert_close(half, whole, rtol=1e-3, atol=1e-6)
    assert any(not torch.equal(half[name], whole[name]) for name in whole)


def test_weights_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    params = CORUN(2, 4).state_dict()
    params["first.trans_prox.step_lambda"] += 1e5
    save_file(params, tmp_path / "net.safetensors")
    with pytest.raises(ModelSourceError, match="first.trans_prox.step_lambda does not fit into half precision"):
        pull_model(str(tmp_path / "net.safetensors"), tmp_path / "half", "", half=True)
    assert not (tmp_path / "half").exists()
