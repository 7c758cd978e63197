"""VGG-19 against torchvision's own, and the files that are refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from corun_ray.core.training.losses import LAYER_WEIGHTS, Vgg19Features, load_vgg19
from corun_ray.core.weights import WeightsError


def random_weights(scale: float = 1.0) -> dict[str, Tensor]:
    """The tensors of the feature part, by the names of torchvision's file."""
    torch.manual_seed(0)
    weights = {}
    for name, tensor in Vgg19Features().state_dict().items():
        spread = scale / tensor[0].numel() ** 0.5 if tensor.ndim == 4 else 0.1
        weights[name] = spread * torch.randn(tensor.shape)
    return weights


def test_features_are_torchvision_s(tmp_path: Path) -> None:
    from torchvision.models import vgg19

    weights = random_weights(1.4)
    with torch.device("meta"):
        theirs = vgg19().features
    theirs.load_state_dict({name.removeprefix("features."): w for name, w in weights.items()}, False, assign=True)
    torch.save({**weights, "classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg19.pth")
    ours = load_vgg19(tmp_path / "vgg19.pth")

    images = torch.rand(2, 3, 32, 48)
    found = ours(images)
    for index, feature in zip((1, 6, 11, 20, 29), found, strict=True):  # relu1_1, 2_1, 3_1, 4_1, 5_1
        expected = theirs[: index + 1](images.clone())
        assert expected.std() > 0.01
        torch.testing.assert_close(feature, expected)
    assert len(found) == len(LAYER_WEIGHTS)
    assert [tuple(feature.shape[1:]) for feature in found[::4]] == [(64, 32, 48), (512, 2, 3)]


def test_the_loaded_network_is_frozen(tmp_path: Path) -> None:
    torch.save({name: tensor.half() for name, tensor in random_weights().items()}, tmp_path / "vgg19.pt")
    network = load_vgg19(tmp_path / "vgg19.pt")
    assert not network.training
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in network.parameters())
    image = torch.rand(1, 3, 16, 16, requires_grad=True)
    network(image)[-1].sum().backward()
    assert image.grad is not None and image.grad.abs().max() > 0


@pytest.mark.parametrize("wrong", ["another network", "a list", "a missing layer", "another shape", "no file"])
def test_other_files_are_refused_in_one_line(tmp_path: Path, wrong: str) -> None:
    file = tmp_path / "vgg19.pth"
    weights: object = {"conv1.weight": torch.zeros(1)}
    if wrong == "a list":
        weights = [torch.zeros(1)]
    elif wrong != "another network":
        weights = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in random_weights().items()}
        if wrong == "a missing layer":
            del weights["features.28.bias"]
        elif wrong == "another shape":
            weights["features.28.bias"] = torch.zeros(3)
    if wrong != "no file":
        torch.save(weights, file)
    with pytest.raises(WeightsError) as caught:
        load_vgg19(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and "\n" not in message
    if wrong in ("a missing layer", "another shape"):
        assert message.endswith("not the weights of VGG-19 (no features.28.bias of shape (512,))")
