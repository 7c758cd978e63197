"""Restoring images of any size."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from corun_ray.core.corun import CORUN, Restoration
from corun_ray.core.restore import restore, to_image, to_tensor


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


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 31), (100, 60), (33, 16), (16, 47)])
def test_every_size_comes_back_as_it_was(height: int, width: int) -> None:
    network, hazy = Recorder(), photograph(height, width, batch=2)
    scene, transmission = restore(network, hazy)
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
    assert not scene.requires_grad and not transmission.requires_grad
    with torch.no_grad():
        expected = network(nn.functional.pad(hazy, (0, 1, 0, 15), mode="reflect"))
    assert torch.equal(scene, expected.scene[..., :17, :31].clamp(0, 1))
    assert torch.equal(transmission, expected.transmission[..., :17, :31])


@pytest.mark.parametrize(("height", "width"), [(15, 40), (40, 15), (1, 1)])
def test_too_small_images_are_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=rf"^an image of {width} x {height} px is too small .*at least 16 px"):
        restore(Recorder(), photograph(height, width))


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
