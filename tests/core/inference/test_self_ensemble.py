"""The mean over eight views: each is seen once, each is turned back, and bands give what the whole image gives."""

import numpy as np
import torch

from corun_ray.core.inference.banded import in_bands
from corun_ray.core.inference.restore import restore
from corun_ray.core.inference.self_ensemble import VIEWS, restore_by_self_ensemble
from corun_ray.core.networks.corun import Restoration
from tests.core.inference.test_tiled import network, photograph


def test_each_view_is_seen_once_and_turned_back() -> None:
    hazy = photograph(24, 40)
    seen = []

    def return_view(view: torch.Tensor) -> Restoration:
        seen.append(view.clone())
        return Restoration(view, None)

    scene, transmission = restore_by_self_ensemble(return_view, hazy)
    torch.testing.assert_close(scene, hazy, rtol=0, atol=1e-6)
    assert transmission is None
    assert len({view.numpy().tobytes() for view in seen}) == VIEWS
    assert [view.shape[-2:] for view in seen].count((40, 24)) == VIEWS // 2


def test_the_mean_is_over_what_is_seen_in_every_direction() -> None:
    """What a network adds at the left of each view comes out an eighth as strong, twice at each of the four sides."""
    hazy = torch.zeros(2, 3, 16, 20)

    def brighten_left(view: torch.Tensor) -> Restoration:
        scene = view.clone()
        scene[..., 2:-2, 0] += 1
        return Restoration(scene, scene[:, :1])

    scene, transmission = restore_by_self_ensemble(brighten_left, hazy)
    expected = np.zeros((16, 20), np.float32)
    expected[[0, -1], 2:-2] = 2 / 8
    expected[2:-2, [0, -1]] = 2 / 8
    torch.testing.assert_close(scene, torch.from_numpy(expected).expand(2, 3, 16, 20))
    assert transmission is not None
    torch.testing.assert_close(transmission, torch.from_numpy(expected).expand(2, 1, 16, 20))


def test_corun_whole_and_in_bands_gives_a_result_that_turns_with_the_image() -> None:
    net, hazy = network(), photograph(50, 72)
    banded = in_bands(net, 1000)
    whole = restore_by_self_ensemble(lambda view: restore(net, view), hazy)
    assert (whole.scene - restore(net, hazy).scene).abs().max() > 1e-3

    turned = restore_by_self_ensemble(lambda view: restore(banded, view), hazy.rot90(1, (-2, -1)))
    torch.testing.assert_close(turned.scene.rot90(-1, (-2, -1)), whole.scene, rtol=0, atol=2e-4)
    assert whole.transmission is not None and turned.transmission is not None
    torch.testing.assert_close(turned.transmission.rot90(-1, (-2, -1)), whole.transmission, rtol=0, atol=2e-4)
