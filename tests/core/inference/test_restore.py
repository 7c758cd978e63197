"""Restoring images of any size."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from corun_ray.core.inference.restore import restore, restore_stages, to_image, to_tensor
from corun_ray.core.networks.corun import CORUN, Restoration
from corun_ray.core.networks.finite import NotFinite
from corun_ray.core.networks.spec import compute_padded_size


class Recorder(nn.Module):
    """Answers with its input, brightened beyond [0, 1]; remembers it."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def forward(self, hazy: Tensor) -> Restoration:
        self.inputs.append(hazy)
        return Restoration((2 * hazy - 0.5).bfloat16(), hazy[:, :1])


def photograph(height_px: int, width_px: int, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, height_px, width_px, generator=torch.Generator().manual_seed(0))


class Broken(nn.Module):
    """Answers with a scene and a transmission, one of which has a value that is not finite."""

    def __init__(self, scene: float, transmission: float) -> None:
        super().__init__()
        self.values = scene, transmission

    def forward(self, hazy: Tensor) -> Restoration:
        scene, transmission = hazy.clone(), hazy[:, :1].clone()
        scene[0, 0, 3, 5], transmission[0, 0, 3, 5] = self.values
        return Restoration(scene, transmission)

    def unfold(self, hazy: Tensor) -> list[Restoration]:
        return [self.forward(hazy)]


@pytest.mark.parametrize(
    ("scene", "transmission", "expected"),
    [
        (float("nan"), 0.5, "the restored image is nan at"),
        (float("inf"), 0.5, "the restored image is inf at"),
        (0.5, float("nan"), "the transmission is nan at"),
    ],
)
def test_a_restoration_that_is_not_finite_is_no_picture(scene: float, transmission: float, expected: str) -> None:
    network = Broken(scene, transmission)
    for make in (restore, restore_stages):
        with pytest.raises(NotFinite, match=f"^{expected} .*, not finite$"):
            make(network, photograph(16, 16))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 31), (100, 60), (33, 16), (16, 47)])
def test_every_size_comes_back_as_it_was(height: int, width: int) -> None:
    network, hazy = Recorder(), photograph(height, width, batch=2)
    scene, transmission = restore(network, hazy)
    assert transmission is not None
    assert scene.shape == (2, 3, height, width) and transmission.shape == (2, 1, height, width)

    (padded,) = network.inputs
    rows, columns = padded.shape[-2:]
    assert rows % 16 == columns % 16 == 0 and rows - height < 16 and columns - width < 16
    mirrored = np.pad(hazy.numpy(), ((0, 0), (0, 0), (0, rows - height), (0, columns - width)), mode="reflect")
    np.testing.assert_array_equal(padded.numpy(), mirrored)

    assert scene.dtype == torch.float32
    assert scene.min() == 0 and scene.max() == 1
    torch.testing.assert_close(scene, (2 * hazy - 0.5).bfloat16().float().clamp(0, 1))
    assert torch.equal(transmission, hazy[:, :1])


def test_it_is_the_network_on_the_padded_image() -> None:
    torch.manual_seed(0)
    network = CORUN(2, 4)
    for cpmm in (network.first.trans_net, network.first.dehaze_net, network.last.dehaze_net):
        nn.init.normal_(cpmm.mapping.weight, std=0.05)
    hazy = photograph(17, 31)
    scene, transmission = restore(network, hazy)
    assert transmission is not None and not scene.requires_grad and not transmission.requires_grad
    with torch.no_grad():
        expected = network(nn.functional.pad(hazy, (0, 1, 0, 15), mode="reflect"))
    assert torch.equal(scene, expected.scene[..., :17, :31].clamp(0, 1))
    assert torch.equal(transmission, expected.transmission[..., :17, :31])


@pytest.mark.parametrize(("height", "width"), [(15, 40), (40, 15), (1, 1)])
def test_too_small_images_are_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=rf"^an image of {width} x {height} px is too small .*at least 16 px"):
        restore(Recorder(), photograph(height, width))


class Sized(Recorder):
    """A network without a transmission that takes only certain sizes."""

    def __init__(self, **attributes: int) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, hazy: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hazy).scene


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({}, (32, 112)),
        ({"size_multiple_px": 64}, (64, 128)),
        ({"size_multiple_px": 8}, (24, 104)),
        ({"size_min_px": 40}, (48, 112)),
        ({"size_multiple_px": 64, "size_square": True}, (128, 128)),
    ],
)
def test_networks_say_what_sizes_they_take(attributes: dict[str, int], expected: tuple[int, int]) -> None:
    network, hazy = Sized(**attributes), photograph(20, 101)
    scene, transmission = restore(network, hazy)
    assert transmission is None
    torch.testing.assert_close(scene, (2 * hazy - 0.5).bfloat16().float().clamp(0, 1))
    (padded,) = network.inputs
    assert tuple(padded.shape[-2:]) == compute_padded_size(network, 20, 101) == expected
    # numpy reflects to and fro where the padding is longer than the side.
    margins = ((0, 0), (0, 0), (0, expected[0] - 20), (0, expected[1] - 101))
    np.testing.assert_array_equal(padded.numpy(), np.pad(hazy.numpy(), margins, mode="reflect"))


def test_every_stage_is_restored_like_the_last() -> None:
    torch.manual_seed(0)
    network, hazy = CORUN(3, 4), photograph(17, 31)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    shown = restore_stages(network, hazy)
    assert len(shown) == 3
    torch.testing.assert_close(shown[-1], restore(network, hazy), rtol=0, atol=0)
    assert not torch.equal(shown[0].scene, shown[1].scene)
    for scene, transmission in shown:
        assert transmission is not None and not scene.requires_grad
        assert scene.shape == (1, 3, 17, 31) and transmission.shape == (1, 1, 17, 31)
        assert scene.min() >= 0 and scene.max() <= 1


def test_other_networks_have_no_stages() -> None:
    with pytest.raises(ValueError, match="^Recorder has no stages to show"):
        restore_stages(Recorder(), photograph(16, 16))


def test_eight_bit_images_survive_the_way_through_tensors() -> None:
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3).copy()
    image[0, 0] = 10, 20, 30
    tensor = to_tensor(image)
    assert tensor.shape == (1, 3, 16, 16) and tensor.dtype == torch.float32
    assert (tensor[0, :, 0, 0] * 255).round().tolist() == [10, 20, 30]
    assert tensor.max() == 1
    np.testing.assert_array_equal(to_image(tensor), image)
    mirrored = image[:, ::-1]  # not contiguous
    np.testing.assert_array_equal(to_image(to_tensor(mirrored)), mirrored)


def test_images_are_rounded_and_clamped() -> None:
    levels = torch.tensor([-0.5, 0.0, 0.49 / 255, 0.51 / 255, 0.5, 254.6 / 255, 1.0, 1.5])
    image = to_image(levels.view(1, 1, 2, 4))
    assert image.shape == (2, 4, 1) and image.dtype == np.uint8
    assert image.ravel().tolist() == [0, 0, 0, 1, 128, 255, 255, 255]
