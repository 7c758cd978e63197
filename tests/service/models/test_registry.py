"""The registry of a real MLflow server over HTTP, its artifacts proxied: versions, promotion, and models taken out."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from corun_ray.core.data.images import decode_image
from corun_ray.core.inference.restore import restore, to_image, to_tensor
from corun_ray.core.training.checkpoints import load_network
from corun_ray.service.models.registry import Registry, promote
from corun_ray.service.models.sources import ModelSourceError, fetch_model, load_starting_model, pull_model
from corun_ray.service.models.tracking import TrackingError
from corun_ray.service.serve.deployment import identify
from corun_ray.service.serve.messages import ServedModel
from tests.service.jobs import small_job

NAME = "watched"


@pytest.fixture(scope="module")
def trained(own_class, mlflow_server) -> str:
    """The server with two versions, the second of which is worse."""
    assert own_class.uri == f"models:/{NAME}/2"
    return mlflow_server


def test_a_version_says_what_it_is(trained):
    client = mlflow.MlflowClient(trained)
    version = client.get_model_version(NAME, "1")
    tags = version.tags
    assert tags["corun_ray.kind"] == "colabator" and json.loads(tags["corun_ray.network"])["stages"] == 2
    assert "kind: colabator" in tags["corun_ray.job"] and len(tags["corun_ray.data"]) >= 16
    assert " sources " in tags["corun_ray.code"] and tags["corun_ray.held_out"].startswith("val=")
    assert float(tags["val/psnr"]) > 5 and float(tags["val/fade"]) > 0
    assert version.description.startswith("CORUN, 2 stages, width 4, trained by Colabator on real haze")
    aliases = {alias: client.get_model_version_by_alias(NAME, alias).version for alias in ("champion", "candidate")}
    assert {alias: str(number) for alias, number in aliases.items()} == {"champion": "1", "candidate": "2"}
    assert str(client.get_run(version.run_id).data.metrics["val/psnr"])


def test_promotion_refuses_the_worse_and_takes_the_better(trained):
    registry = Registry(trained)
    refused = promote(registry, NAME, "candidate", "val/psnr")
    assert not refused.moves and refused.reason.endswith("worse") and "better on 0 of 6 images" in refused.reason
    assert registry.find_champion(NAME).number == "1"
    assert promote(registry, NAME, "2", None).moves and registry.find_champion(NAME).number == "2"
    back = promote(registry, NAME, "1", "val/psnr")
    assert back.moves and back.reason.endswith("better") and registry.find_champion(NAME).number == "1"
    assert promote(registry, NAME, "1", "val/psnr").reason == "version 1 is the champion already"
    for arguments, told in {
        ("nobody", "1", None): "nobody",
        (NAME, "9", None): "no version or alias 9",
        (NAME, "2", "val/beauty"): "not a metric of images",
    }.items():
        with pytest.raises(TrackingError, match=told):
            promote(registry, *arguments)


def test_an_alias_is_served_as_the_version_that_it_means(trained):
    assert identify(f"models:/{NAME}@champion", trained) == (f"models:/{NAME}/1", ServedModel(NAME, "1"))
    assert identify(f"models:/{NAME}/2", trained) == (f"models:/{NAME}/2", ServedModel(NAME, "2"))
    with pytest.raises(TrackingError, match="no version or alias nobody"):
        identify(f"models:/{NAME}@nobody", trained)


def test_a_model_is_pulled_as_plain_files_that_are_a_model(trained, dataset, tmp_path):
    files = pull_model(f"models:/{NAME}/1", tmp_path / "model", trained)
    assert {path.name for path in files} == {
        *("model.safetensors", "config.json", "README.md", "job.yaml", "validation.csv", "pictures.jpg"),
    }
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| val/psnr |" in card and "kind: colabator" in card and "pictures.jpg" in card
    assert decode_image((tmp_path / "model" / "pictures.jpg").read_bytes()).std() > 20
    pulled, served = load_network(tmp_path / "model").network, fetch_model(f"models:/{NAME}/1", trained)
    assert fetch_model(str(tmp_path / "model"), trained).spec == served.spec
    for name, tensor in pulled.state_dict().items():
        assert torch.equal(tensor, served.params[name])
    with pytest.raises(ModelSourceError, match="exists and is not empty"):
        pull_model(f"models:/{NAME}/1", tmp_path / "model", trained)
    with pytest.raises(ModelSourceError, match="cannot be read"):
        pull_model("models:/nobody/1", tmp_path / "other", trained)


ELSEWHERE = """
import sys
sys.path.append(sys.argv[3])  # the libraries alone: -S leaves out the links to checkouts that lie among them

class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoRay())
import mlflow, numpy as np, torch
try:
    import corun_ray
    sys.exit("the package is on the path")
except ModuleNotFoundError:
    pass
mlflow.set_tracking_uri(sys.argv[1])
model, network = mlflow.pyfunc.load_model(sys.argv[2]), mlflow.pytorch.load_model(sys.argv[2])
images = [np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
          for shape in [(1, 40, 56, 3), (3, 33, 17, 3), (1, 128, 96, 3)]]
for image in images:
    out = model.predict(image)
    with torch.no_grad():
        scene = network(torch.from_numpy(image).permute(0, 3, 1, 2).float() / 255)
    assert out.shape == image.shape and out.dtype == np.uint8 and (out != image).any()
    same = (scene * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.abs(same.astype(int) - out).max() <= 1
assert "/code" in sys.modules["corun_ray"].__file__
np.save(sys.argv[4], model.predict(images[0]))
"""


def test_both_flavours_load_without_ray_and_without_this_package(trained, tmp_path):
    libraries = sysconfig.get_paths()["purelib"]
    kept = tmp_path / "out.npy"
    arguments = [trained, f"models:/{NAME}/1", libraries, str(kept)]
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ELSEWHERE, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr[-3000:]
    image = np.random.default_rng(0).integers(0, 256, (1, 40, 56, 3)).astype(np.uint8)[0]
    expected = to_image(restore(fetch_model(f"models:/{NAME}/1", trained).build().eval(), to_tensor(image)).scene)
    assert np.abs(np.load(kept)[0].astype(int) - expected).max() <= 1


def test_a_registered_model_begins_another_job(trained, dataset, tmp_path):
    network, tracking = {"init": f"models:/{NAME}@champion"}, {"uri": trained}
    started = load_starting_model(
        small_job("pretrain", dataset, tmp_path, network=network, tracking=tracking), tmp_path
    )
    expected = fetch_model(f"models:/{NAME}/1", trained)
    assert all(torch.equal(tensor, expected.params[name]) for name, tensor in started.params.items())


def test_a_plain_folder_without_a_registry_is_pulled_too(trained, tmp_path):
    pull_model(f"models:/{NAME}/1", tmp_path / "first", trained)
    (tmp_path / "first" / "README.md").unlink()
    names = {path.name for path in pull_model(str(tmp_path / "first"), tmp_path / "second", "sqlite:///unused.db")}
    assert names == {"model.safetensors", "config.json"}
    assert Path("unused.db").exists() is False
