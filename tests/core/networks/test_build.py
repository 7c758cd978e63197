"""Networks by description, by spandrel's names, by a user's class; what is recognised and what is refused."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from spandrel import ImageModelDescriptor
from torch import Tensor, nn

from corun_ray.core.inference.restore import restore
from corun_ray.core.networks.build import build_network, list_architectures, list_required_packages, probe_network
from corun_ray.core.networks.corun import CORUN, Restoration, as_restoration
from corun_ray.core.networks.spandrel import load_registry, recognise
from corun_ray.core.networks.spec import NetworkError, NetworkSpec, compute_padded_size

SMALL: dict[str, dict[str, Any]] = {
    "NAFNet": {"width": 8, "middle_blk_num": 1, "enc_blk_nums": [1, 2], "dec_blk_nums": [1, 1]},
    "MixDehazeNet": {"embed_dims": [8, 16, 32, 16, 8], "depths": [1, 1, 1, 1, 1]},
    "Uformer": {"embed_dim": 8, "depths": [1] * 9, "num_heads": [1, 1, 2, 2, 4, 4, 2, 2, 1]},
    "FFTformer": {"dim": 8, "num_blocks": [1, 1, 2], "num_refinement_blocks": 1},
    "Restormer": {"dim": 8, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1, "heads": [1, 1, 2, 2]},
    "MPRNet": {"n_feat": 8, "scale_unetfeats": 4, "scale_orsnetfeats": 4, "num_cab": 1},
}
USER_CODE = """
import torch
from torch import nn

class Brighten(nn.Module):
    def __init__(self, start: float = 1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(start))

    def forward(self, hazy):
        return self.gain * hazy, hazy[:, :1]

class Gain:
    pass
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "user_networks.py").write_text(USER_CODE)
    (tmp_path / "user_broken.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "user_networks", raising=False)
    return "user_networks"


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_network(NetworkSpec(name, SMALL[name])).eval()


def image(side_px: int, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, side_px, side_px, generator=torch.Generator().manual_seed(1))


def error_line(spec: NetworkSpec) -> str:
    with pytest.raises(NetworkError) as caught:
        build_network(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_outputs_of_any_network_become_a_restoration() -> None:
    scene, transmission = image(8), image(8)[:, :1]
    assert as_restoration(scene) == (scene, None)
    for output in ((scene, transmission), Restoration(scene, transmission)):
        assert isinstance(as_restoration(output), Restoration) and as_restoration(output)[1] is transmission
    assert as_restoration((scene, None)).transmission is None
    for wrong in ([scene, transmission], (scene,), (None, scene), {"scene": scene}, None):
        with pytest.raises(TypeError, match=rf"^the network returned {type(wrong).__name__}; a scene, or a pair"):
            as_restoration(wrong)


def test_corun_by_description() -> None:
    network = build_network(NetworkSpec("corun", {"stages": 3, "width": 4}))
    assert isinstance(network, CORUN) and (network.stages, network.width) == (3, 4)
    assert "takes stages, width" in error_line(NetworkSpec("corun", {"checkpoint_activations": True}))
    assert "at least 2 stages" in error_line(NetworkSpec("corun", {"stages": 1}))


def test_the_architectures_have_names() -> None:
    names = list_architectures()
    assert {*SMALL, "KBNet_s", "SwinIR", "MMRealSR", "RealPLKSR"} <= set(names)
    assert names == sorted(names, key=str.lower)
    assert list_required_packages(NetworkSpec("NAFNet")) == ["spandrel"]
    assert list_required_packages(NetworkSpec("Restormer")) == ["spandrel", "spandrel_extra_arches"]
    assert list_required_packages(NetworkSpec("corun")) == list_required_packages(NetworkSpec("my.nets:Net")) == []


@pytest.mark.parametrize("name", SMALL)
def test_networks_of_spandrel_restore_images_and_learn(name: str) -> None:
    network = small(name)
    probe_network(network, 128)
    assert not network.training
    hazy = image(128)
    with torch.no_grad():
        scene = as_restoration(network(hazy)).scene
        copied = copy.deepcopy(network)(hazy)
    assert scene.shape == hazy.shape
    assert torch.equal(copied, scene)
    network.train()(hazy).mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_a_state_dict_tells_the_network(name: str) -> None:
    network = small(name)
    spec, params = recognise(network.state_dict())
    assert spec.type == name
    assert SMALL[name].items() <= spec.args.items()
    again = build_network(NetworkSpec.from_json(spec.to_json())).eval()
    again.load_state_dict(params)
    with torch.no_grad():
        assert torch.equal(again(image(128)), network(image(128)))


@pytest.mark.parametrize("name", ["NAFNet", "Uformer", "FFTformer", "Restormer", "MPRNet"])
def test_a_network_is_called_as_spandrel_calls_it(name: str) -> None:
    network = small(name)
    descriptor = load_registry().load(network.state_dict())
    assert isinstance(descriptor, ImageModelDescriptor)
    with torch.no_grad():
        torch.testing.assert_close(network(image(128)).clamp(0, 1), descriptor(image(128)), rtol=0, atol=1e-6)


def test_mixdehazenet_works_on_signed_images_as_its_authors_trained_it() -> None:
    network = small("MixDehazeNet")
    with torch.no_grad():
        expected = network.forward(image(64) * 2 - 1) / 2 + 0.5  # forward itself runs no hooks
        torch.testing.assert_close(network(image(64)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "size"),
    [("NAFNet", (32, 48)), ("MixDehazeNet", (48, 48)), ("FFTformer", (32, 64)), ("Uformer", (128, 128))],
)
def test_sizes_follow_from_the_architecture(name: str, size: tuple[int, int]) -> None:
    network = small(name)
    assert compute_padded_size(network, 20, 36) == size
    scene, transmission = restore(network, torch.rand(1, 3, 20, 36))
    assert scene.shape == (1, 3, 20, 36) and transmission is None


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (NetworkSpec("NAFnet"), "NAFnet is no network of spandrel (did you mean NAFNet?)"),
        (NetworkSpec("KBNet"), "(did you mean KBNet_"),
        (NetworkSpec("nothing_like_it"), "nothing_like_it is no network of spandrel; "),
        (NetworkSpec("NAFNet", {"wdth": 8}), "unexpected keyword argument 'wdth'); it takes img_channel, width, "),
        (NetworkSpec("SAFMN"), "missing 1 required keyword-only argument: 'dim'"),
        (NetworkSpec("MixDehazeNet", {"depths": [1]}), "MixDehazeNet refuses its args (list index out of range)"),
        (NetworkSpec("no_such_module:Net"), "no_such_module cannot be imported (No module named 'no_such_module')"),
        (NetworkSpec("user_broken:Net"), "user_broken cannot be imported (invalid syntax"),
        (NetworkSpec("user_networks:Other"), "user_networks has no such name"),
        (NetworkSpec("user_networks:Gain"), "no subclass of torch.nn.Module"),
        (NetworkSpec("user_networks:Brighten", {"stop": 1}), "it takes start"),
        (NetworkSpec("user_networks:Brighten", {"start": "bright"}), "user_networks:Brighten refuses its args ("),
    ],
)
def test_networks_that_cannot_be_made(user_module: str, spec: NetworkSpec, expected: str) -> None:
    assert expected in error_line(spec)


def test_a_class_of_the_users_own(user_module: str) -> None:
    network = build_network(NetworkSpec(f"{user_module}:Brighten", {"start": 2.0}))
    assert list(network.state_dict()) == ["gain"]
    probe_network(network, 32)
    assert network.training
    assert torch.equal(as_restoration(network(image(16))).scene, 2 * image(16))


class Wrong(nn.Module):
    """A network with a parameter and the given answer."""

    def __init__(self, answer: Any, **attributes: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.answer = answer
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, hazy: Tensor) -> Any:
        return self.answer(hazy)


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (nn.Identity(), "no parameters to train"),
        (Wrong(lambda x: x[..., ::2, ::2]), r"to \(2, 3, 16, 16\); the same shape is needed"),
        (Wrong(lambda x: x[:, :1]), r"to \(2, 1, 32, 32\)"),
        (Wrong(lambda x: (x, x)), r"its transmission has shape \(2, 3, 32, 32\); \(2, 1, 32, 32\) is needed"),
        (Wrong(lambda x: [x, x]), r"it fails on 32 px .* \(the network returned list; "),
        (Wrong(lambda x: x.view(1)), "it fails on 32 px RGB images in a batch of 2"),
        (Wrong(lambda x: x / 0), "what it makes of random images is inf at 6144 of 6144 values, not finite"),
        (Wrong(lambda x: x, size_multiple_px=24), r"does not take patches of 32 px \(the next .* is 48 px\)"),
        (Wrong(lambda x: x, size_min_px=40), "does not take patches of 32 px"),
    ],
)
def test_unfit_networks_are_found_before_training(network: nn.Module, expected: str) -> None:
    with pytest.raises(NetworkError, match=expected) as caught:
        probe_network(network.eval(), 32)
    assert "\n" not in str(caught.value)
    assert not network.training


def test_super_resolution_is_no_restoration() -> None:
    network = build_network(NetworkSpec("SAFMN", {"dim": 8, "n_blocks": 1, "upscaling_factor": 2}))
    with pytest.raises(NetworkError, match=r"to \(2, 3, 64, 64\)"):
        probe_network(network, 32)
    with pytest.raises(NetworkError, match="^SAFMN of 3 to 3 channels at scale 2; 3 to 3 channels at scale 1 are"):
        recognise(network.state_dict())
    grey = build_network(NetworkSpec("DnCNN", {"nc": 8, "act_mode": "R"}))
    with pytest.raises(NetworkError, match="^DnCNN of 1 to 1 channels"):
        recognise(grey.state_dict())


def test_other_state_dicts_are_not_recognised() -> None:
    with pytest.raises(NetworkError, match=r"neither CORUN nor .* needs its type \(module.path:ClassName\)"):
        recognise({"gain": torch.ones(1)})
    params = {name: tensor for name, tensor in small("NAFNet").state_dict().items() if name != "ending.bias"}
    with pytest.raises(NetworkError, match="cannot load it .*ending.bias"):
        recognise(params)
