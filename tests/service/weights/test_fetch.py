"""Fetching from a server on loopback that stands for PyTorch's, OpenAI's and Hugging Face's."""

import hashlib
import io
import socket

import pytest
import torch
from huggingface_hub import constants
from torchvision.models import VGG19_Weights

from corun_ray.core.inference.depth import MODEL_FILES
from corun_ray.core.metrics.pyiqa import keep_pyiqa_offline
from corun_ray.core.weights import WeightsError, read_weights
from corun_ray.service.weights import fetch
from corun_ray.service.weights.fetch import DACLIP_FILE
from corun_ray.service.weights.folder import WeightsFolder, locate_model, read_index
from tests.service.weights.test_folder import Server, server  # noqa: F401  (a fixture)

VGG = b"the tensors of VGG-19"
VGG_FILE = f"vgg19-{hashlib.sha256(VGG).hexdigest()[:8]}.pth"
BRISQUE_FILE = "brisque_svm_weights.pth"
BRISQUE_PATH = f"/chaofengc/IQA-PyTorch-Weights/resolve/main/{BRISQUE_FILE}"
DACLIP_PATH = f"/{fetch.DACLIP_HUB}/resolve/main/{DACLIP_FILE}"


def point_hub_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does where it is set before the first import."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )


@pytest.fixture
def internet(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:  # noqa: F811
    """The server in place of all hosts, and a `clipiqa` that needs one of OpenAI's archives and nothing of its size."""
    from pyiqa.archs import brisque_arch, clip_model

    archive, brisque = io.BytesIO(), io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(3, 2)), archive)
    torch.save((torch.rand(1, 5), torch.rand(36, 5)), brisque)
    clip_path = f"/clip/{hashlib.sha256(archive.getvalue()).hexdigest()}/RN50.pt"
    server.files = {
        f"/models/{VGG_FILE}": VGG,
        BRISQUE_PATH: brisque.getvalue(),
        DACLIP_PATH: b"the tensors of DA-CLIP",
        clip_path: archive.getvalue(),
    }
    server.headers = {"X-Repo-Commit": "0" * 40}
    point_hub_at(server.url, monkeypatch)
    monkeypatch.setitem(brisque_arch.default_model_urls, "url", server.url + BRISQUE_PATH)
    monkeypatch.setitem(clip_model._MODELS, "RN50", server.url + clip_path)
    monkeypatch.setattr(fetch, "_get_vgg19_url", lambda: f"{server.url}/models/{VGG_FILE}")

    build = fetch.build_metric

    def build_metric(name, find):
        if name != "clipiqa":
            return build(name, find)
        with keep_pyiqa_offline(find):
            return clip_model._download(clip_model._MODELS["RN50"], "")

    monkeypatch.setattr(fetch, "build_metric", build_metric)
    return server


def test_a_folder_is_filled_indexed_and_resumed(internet, tmp_path):
    folder, lines = tmp_path / "new" / "weights", []
    fetch.fetch(folder, ["vgg19", "brisque", "daclip"], lines.append)
    expected = {VGG_FILE: VGG, BRISQUE_FILE: internet.files[BRISQUE_PATH], DACLIP_FILE: internet.files[DACLIP_PATH]}
    for name, data in expected.items():
        assert WeightsFolder(str(folder))(name).read_bytes() == data
    assert {path.name for path in folder.iterdir()} == {*expected, "weights.json"}
    assert [line.split()[:3] for line in lines] == [[name, "0.0", "MB"] for name in expected]

    internet.sent_bytes.clear()
    (folder / BRISQUE_FILE).write_bytes(internet.files[BRISQUE_PATH][:-1] + b"X")
    fetch.fetch(folder, ["vgg19", "brisque", "daclip"], lines.append)
    assert internet.sent_bytes == {BRISQUE_PATH: len(internet.files[BRISQUE_PATH])}
    assert (folder / BRISQUE_FILE).read_bytes() == internet.files[BRISQUE_PATH]
    assert lines[3].endswith("already there") and not lines[4].endswith("already there")


def test_a_depth_estimator_has_a_folder_of_its_own(internet, tmp_path):
    files = {name: name.encode() for name in MODEL_FILES}
    internet.files |= {f"/{fetch.DEPTH_HUB}/resolve/main/{name}": data for name, data in files.items()}
    fetch.fetch(tmp_path, ["depth"], print)
    folder = locate_model(str(tmp_path), "depth-anything-v2-small")
    assert {name: WeightsFolder(folder)(name).read_bytes() for name in MODEL_FILES} == files
    internet.sent_bytes.clear()
    fetch.fetch(tmp_path, ["depth"], print)
    assert internet.sent_bytes == {}
    with pytest.raises(WeightsError, match="has no model dpt; `corun-ray weights fetch DIR depth` gets depth-any"):
        locate_model(str(tmp_path), "dpt")


def test_what_came_before_a_failure_is_kept(internet, tmp_path):
    del internet.files[DACLIP_PATH]
    with pytest.raises(WeightsError, match=r"daclip_ViT-B-32.pt: cannot be had from 127.0.0.1:\d+ \(.*404"):
        fetch.fetch(tmp_path, ["vgg19", "daclip"], print)
    assert set(read_index(str(tmp_path))) == {VGG_FILE}
    assert {path.name for path in tmp_path.iterdir()} == {VGG_FILE, "weights.json"}


def test_a_file_that_its_publisher_would_not_know_is_refused(internet, tmp_path):
    internet.files[f"/models/{VGG_FILE}"] = b"something else"
    with pytest.raises(WeightsError, match=f"{VGG_FILE}: cannot be had from 127.* \\(invalid hash value"):
        fetch.fetch(tmp_path, ["vgg19"], print)
    # The hub's own tag wins over that of the host it redirects to.
    internet.headers["X-Linked-ETag"] = f'"{"1" * 64}"'
    with pytest.raises(WeightsError, match=f"{BRISQUE_FILE}: .*expected SHA-256 1111.*, got [0-9a-f]+"):
        fetch.fetch(tmp_path, ["brisque"], print)
    assert list(tmp_path.iterdir()) == []


def test_clip_archives_become_plain_tensors(internet, tmp_path):
    fetch.fetch(tmp_path, ["clipiqa"], print)
    tensors = read_weights(WeightsFolder(str(tmp_path))("RN50.pt"))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"weight": (2, 3), "bias": (2,)}
    internet.sent_bytes.clear()
    fetch.fetch(tmp_path, ["clipiqa"], print)
    assert internet.sent_bytes == {}


@pytest.mark.parametrize("what", ["vgg19", "brisque", "daclip", "clipiqa"])
def test_without_a_network_the_host_is_named(internet, tmp_path, monkeypatch, what):
    from pyiqa.archs import brisque_arch, clip_model

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    point_hub_at(closed, monkeypatch)
    monkeypatch.setitem(brisque_arch.default_model_urls, "url", closed + BRISQUE_PATH)
    monkeypatch.setitem(clip_model._MODELS, "RN50", f"{closed}/{'0' * 64}/RN50.pt")
    monkeypatch.setattr(fetch, "_get_vgg19_url", lambda: f"{closed}/{VGG_FILE}")
    with pytest.raises(WeightsError, match=f"cannot be had from {closed[7:]} ") as refusal:
        fetch.fetch(tmp_path, [what], print)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 300
    assert list(tmp_path.iterdir()) == []


def test_names_that_nobody_knows_are_refused_before_anything_is_fetched(internet, tmp_path):
    with pytest.raises(
        WeightsError, match="musik, psnr: expected vgg19, daclip, depth, a no-reference metric of pyiqa "
    ):
        fetch.fetch(tmp_path / "new", ["vgg19", "musik", "psnr"], print)
    assert not (tmp_path / "new").exists()


def test_the_publishers_digests_are_found_in_their_urls(monkeypatch, tmp_path):
    from pyiqa.archs import clip_model

    asked = {}
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, path, digest, progress: asked.update({url: digest})
    )
    monkeypatch.setattr(fetch, "_convert_to_state_dict", lambda path: path)
    swin = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth"
    for url in (VGG19_Weights.IMAGENET1K_V1.url, clip_model._MODELS["RN50"], swin):
        fetch._download(url, tmp_path)
    assert [digest and digest[:8] for digest in asked.values()] == ["dcbb9e9d", "afeb0e10", None]
    assert list(asked)[0] == fetch._get_vgg19_url()
