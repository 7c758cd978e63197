"""Self-ensemble: the mean of the restorations of an image's eight flips and quarter turns, each turned back.

A network that saw flipped and turned patches in training makes other small errors on each of them; the mean has less.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from corun_ray.core.networks.corun import Restoration

VIEWS = 8
"""Four quarter turns of the image, and four of its mirror image."""
SIDES = (-2, -1)
"""The dimensions that a quarter turn exchanges: rows and columns."""


@torch.no_grad()
def restore_by_self_ensemble(restore_view: Callable[[Tensor], Restoration], hazy: Tensor) -> Restoration:
    """Restore images by the mean over their eight views.

    `hazy` is B 3 H W in [0, 1]. `restore_view` restores one view, of H x W or W x H px. The views are restored one
    after another and summed in float32: beside one restoration, memory holds the sum and one turned image.
    """
    scene_sum = transmission_sum = None
    for turns, mirrored in _list_views():
        scene, transmission = restore_view(_turn(hazy, turns, mirrored))

        # Turn the results back before they are added.
        scene_sum = _add(scene_sum, _turn_back(scene, turns, mirrored))
        if transmission is not None:
            transmission_sum = _add(transmission_sum, _turn_back(transmission, turns, mirrored))

    assert scene_sum is not None
    return Restoration(scene_sum.div_(VIEWS), None if transmission_sum is None else transmission_sum.div_(VIEWS))


def _list_views() -> Iterator[tuple[int, bool]]:
    """Yield the quarter turns of each view, and whether it is mirrored before them."""
    for mirrored in (False, True):
        for turns in range(4):
            yield turns, mirrored


def _turn(images: Tensor, turns: int, mirrored: bool) -> Tensor:
    """Mirror images left to right if asked, then turn them by quarter turns."""
    if mirrored:
        images = images.flip(-1)
    return images.rot90(turns, SIDES)


def _turn_back(images: Tensor, turns: int, mirrored: bool) -> Tensor:
    """Undo `_turn`."""
    images = images.rot90(-turns, SIDES)
    return images.flip(-1) if mirrored else images


def _add(total: Tensor | None, images: Tensor) -> Tensor:
    """Add images to a float32 sum in place; None begins one."""
    if total is None:
        return images.float().clone(memory_format=torch.contiguous_format)
    return total.add_(images)
