"""Colabator around other networks and on other tasks: two workers each, to a registered model that pyfunc runs."""

import cv2
import numpy as np
import pytest
import torch

from corun_ray.core.inference.restore import restore
from corun_ray.core.training.checkpoints import load_network
from corun_ray.service.models.sources import fetch_model
from corun_ray.service.telemetry.console import Console
from corun_ray.service.train.driver import run_training
from tests.conftest import photograph, write_image
from tests.service.jobs import assert_plain_pyfunc_runs, small_job


@pytest.fixture(scope="module")
def rainy(tmp_path_factory):
    """Pairs made by a script, `pairs/rainy` and `pairs/clean`, and rainy images without a truth, `real`."""
    root = tmp_path_factory.mktemp("rain")
    rng = np.random.default_rng(3)
    for i in range(12):
        clean = photograph(rng, 64, 80)
        streaks = (rng.random((64, 80)) > 0.98).astype(np.float32)
        streaks = cv2.filter2D(streaks, -1, np.eye(9, dtype=np.float32))[..., None]
        rainy_image = (clean * 0.9 + 200 * streaks).clip(0, 255).astype(np.uint8)
        if i < 8:
            write_image(root / "pairs" / "clean" / f"{i}.png", clean)
            write_image(root / "pairs" / "rainy" / f"{i}.png", rainy_image)
        else:
            write_image(root / "real" / f"{i}.png", rainy_image)
    return root


def networks(dataset, rainy):
    paired = {"clear": None, "depth": None, "hazy": str(rainy / "real")}
    paired["paired"] = {"hazy": str(rainy / "pairs" / "rainy"), "clear": str(rainy / "pairs" / "clean")}
    nafnet = {"type": "NAFNet", "args": {"width": 8, "enc_blk_nums": [1], "dec_blk_nums": [1]}}
    mixdehazenet = {"type": "MixDehazeNet", "args": {"embed_dims": [8, 16, 32, 16, 8], "depths": [1, 1, 1, 1, 1]}}
    return {
        "mixdehazenet": (mixdehazenet, {"patch_px": 64}),  # it takes 40 px and more
        "derain": (nafnet, paired),
    }


def test_colabator_around_a_users_own_class_leaves_a_model_that_pyfunc_runs(own_class, tmp_path):
    tracking = own_class.job.tracking.uri
    model = fetch_model(own_class.uri, tracking)
    assert model.spec.type == "curve:Curve" and model.code
    image = torch.rand(1, 3, 32, 40)
    assert restore(model.build().eval(), image).scene.shape == image.shape
    assert_plain_pyfunc_runs(tracking, own_class.uri, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixdehazenet", "derain"])
def test_colabator_around_another_network_leaves_a_model_that_pyfunc_runs(name, local_ray, dataset, rainy, tmp_path):
    network, data = networks(dataset, rainy)[name]
    job = small_job(
        "colabator",
        dataset,
        tmp_path,
        data=data,
        network={"stages": None, "width": None, **network},
        train={"steps": 4, "checkpoint_every": 2, "log_every": 2, "validate_every": 4},
        tracking={"register": name},
    )
    uri = run_training(job, Console(), tmp_path)
    assert uri == f"models:/{name}/1"
    tracking = f"sqlite:///{job.storage}/mlflow.db"
    model = fetch_model(uri, tracking)
    assert model.spec.type == network["type"] and not model.code
    image = torch.rand(1, 3, 32, 40)
    assert restore(model.build().eval(), image).scene.shape == image.shape
    (tmp_path / "elsewhere").mkdir()
    assert_plain_pyfunc_runs(tracking, uri, tmp_path / "elsewhere")


@pytest.mark.slow
def test_a_published_checkpoint_of_three_stages_is_fine_tuned_and_exported_under_the_same_names(
    local_ray, dataset, tmp_path
):
    """`network.init` of a `.pth` in the format in circulation; what comes out has its names, shapes and format."""
    from corun_ray.core.networks.corun import CORUN

    torch.manual_seed(5)
    params = {name: value + 0.01 * torch.randn_like(value) for name, value in CORUN(3, 4).state_dict().items()}
    published = tmp_path / "published.pth"
    torch.save({"params": CORUN(3, 4).state_dict(), "params_ema": params}, published)
    job = small_job(
        "pretrain",
        dataset,
        tmp_path,
        network={"stages": 3, "init": str(published)},
        train={"steps": 2, "checkpoint_every": 2},
        optim={"lr": 1e-3, "ema": 0.5},
    )
    run_training(job, Console(), tmp_path)
    (exported,) = (tmp_path / "runs").rglob("checkpoint_*/network.pth")
    content = torch.load(exported, weights_only=True)
    assert list(content) == ["params", "params_ema"]
    for part in content.values():
        assert {name: value.shape for name, value in part.items()} == {name: v.shape for name, v in params.items()}
    moved = [float((content["params_ema"][name] - value).abs().max()) for name, value in params.items()]
    assert 0 < max(moved) < 0.01, "fine-tuned from these weights, and only by two small steps"
    again = load_network(exported)
    assert (again.spec.type, again.spec.args["stages"]) == ("corun", 3)
