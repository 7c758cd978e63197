"""Detectors of torchvision, built from files of weights; torchvision is imported on first use."""

from collections.abc import Callable, Mapping, Sequence
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from corun_ray.core.errors import format_error
from corun_ray.core.metrics.detection import Detections
from corun_ray.core.weights import WeightsError, WeightsSource, read_weights

NOT_CLASSES = ("__background__", "N/A")
"""What torchvision calls the numbers that stand for no class."""

Detect = Callable[[Tensor], Detections]
"""A picture, 1 3 H W in [0, 1] → what is found in it."""


def get_detector_url(name: str) -> str:
    """Return the URL of torchvision's own weights of a detector."""
    from torchvision.models import get_model_weights

    return get_model_weights(name)["DEFAULT"].url


def get_detector_file(name: str) -> str:
    """Return the name of torchvision's own file of a detector."""
    return get_detector_url(name).rpartition("/")[2]


def list_detector_classes(name: str, classes: Sequence[str] | None = None) -> dict[str, int]:
    """Return the classes of a detector with their numbers.

    `classes` are those of a detector of one's own, numbered from 1; None: those of torchvision's weights, numbered as
    in COCO.
    """
    if classes is not None:
        return {label: number for number, label in enumerate(classes, 1)}

    from torchvision.models import get_model_weights

    categories = get_model_weights(name)["DEFAULT"].meta["categories"]
    return {label: number for number, label in enumerate(categories) if label not in NOT_CLASSES}


def load_detector(
    name: str,
    file: str,
    classes: Sequence[str] | None,
    weights: WeightsSource,
    device: torch.device | str = "cpu",
) -> Detect:
    """Load a detector from a state dict.

    `file` comes from `weights`. With `classes` None it holds torchvision's classes, and the network is built as
    torchvision builds it for its own weights; else as for a training of one's own on these classes.

    Raises `WeightsError` for a file that is missing or holds anything but the tensors of this detector.
    """
    path = weights(file)
    tensors = read_weights(path)
    try:
        network = _build(name, tensors, classes).to(device).eval()
    except (RuntimeError, TypeError, AttributeError) as error:
        num_classes = len(list_detector_classes(name, classes))
        raise WeightsError(f"{path}: not {name} with {num_classes} classes ({format_error(error)})") from None

    @torch.no_grad()
    def detect(picture: Tensor) -> Detections:
        """Detect in one picture, in float32."""
        (found,) = network([picture[0].float()])
        arrays = {key: found[key].cpu().numpy() for key in ("boxes", "labels", "scores")}
        return Detections(
            corners=arrays["boxes"].astype(np.float64),
            labels=arrays["labels"].astype(np.int64),
            scores=arrays["scores"].astype(np.float64),
        )

    return detect


def _build(name: str, tensors: Mapping[str, Tensor], classes: Sequence[str] | None) -> nn.Module:
    """Build the network with these tensors.

    Raises `RuntimeError` and others where the tensors are not its own.
    """
    from torchvision.models import WeightsEnum, get_model, get_model_weights

    # One number more than classes: 0 is the background.
    if classes is not None:
        network = get_model(name, weights=None, weights_backbone=None, num_classes=len(classes) + 1)
        network.load_state_dict(tensors)
        return network

    # With weights of its own, torchvision builds some layers in another way: let it do so, but without a download.
    with mock.patch.object(WeightsEnum, "get_state_dict", return_value=tensors):
        return get_model(name, weights=get_model_weights(name)["DEFAULT"])
