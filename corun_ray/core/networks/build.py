"""Building any restoration network from its description, and probing whether Colabator can train it.

A restoration network maps hazy images (`B 3 H W`, RGB in [0, 1]) to a scene of the same shape, or to a pair of a scene
and a transmission (`B 1 H W` in (0, 1]). `compute_padded_size` says which attributes state the sizes that it takes.
"""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from corun_ray.core.errors import format_error
from corun_ray.core.networks.corun import CORUN, Restoration, as_restoration
from corun_ray.core.networks.finite import NotFinite, refuse_not_finite
from corun_ray.core.networks.spandrel import EXTRA_PACKAGE, build_spandrel_network, is_extra, list_classes
from corun_ray.core.networks.spec import CORUN_TYPE, NetworkError, NetworkSpec, compute_padded_size, construct

PROBE_IMAGES = 2


def build_network(spec: NetworkSpec) -> nn.Module:
    """Build a freshly initialised network on the CPU.

    A type `module.path:ClassName` imports that module. Raises `NetworkError`.
    """
    # CORUN: a job file may set its size, and no other argument of the class.
    if spec.type == CORUN_TYPE:
        if spec.args.keys() - {"stages", "width"}:
            raise NetworkError(f"corun refuses its args ({', '.join(spec.args)}); it takes stages, width")
        return construct(CORUN, spec)

    # A class of the user's own.
    if ":" in spec.type:
        return construct(_import_class(spec.type), spec)

    return build_spandrel_network(spec)


def list_architectures() -> list[str]:
    """List the names of spandrel's network classes, sorted.

    Not all of them restore images; `probe_network` finds those that do.
    """
    return sorted(list_classes(), key=str.lower)


def list_required_packages(spec: NetworkSpec) -> list[str]:
    """List the packages, beside torch, that building a network needs.

    The packages that a user's own class needs are unknown, so none are listed for it.
    """
    if spec.type == CORUN_TYPE or ":" in spec.type:
        return []
    if is_extra(spec.type):
        return ["spandrel", EXTRA_PACKAGE]
    return ["spandrel"]


@torch.no_grad()
def probe_network(network: nn.Module, patch_px: int) -> Restoration:
    """Check that a network restores square images of `patch_px`.

    Returns what it made of random images. Raises `NetworkError` unless they come back as finite scenes of their own
    size.
    """
    parameter = next(network.parameters(), None)
    if parameter is None:
        raise NetworkError("it has no parameters to train")

    # Training does not pad, so the network must take the patches as they are.
    padded_px, _ = compute_padded_size(network, patch_px, patch_px)
    if padded_px != patch_px:
        raise NetworkError(f"it does not take patches of {patch_px} px (the next size that it takes is {padded_px} px)")

    # The images come from a generator of their own: probing leaves the global random state alone.
    shape = (PROBE_IMAGES, 3, patch_px, patch_px)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(parameter.device)

    # Restore them in eval mode, so that batch norm keeps its statistics.
    was_training = network.training
    try:
        restoration = as_restoration(network.eval()(images))
        _check_shapes(restoration, shape)
    except NetworkError:
        raise
    except Exception as error:
        raise NetworkError(f"it fails on {patch_px} px RGB images in a batch of 2 ({format_error(error)})") from None
    finally:
        network.train(was_training)

    # No training mends it: the first loss would be no number either.
    try:
        refuse_not_finite(restoration.scene, "what it makes of random images")
    except NotFinite as error:
        raise NetworkError(str(error)) from None
    return restoration


def _check_shapes(restoration: Restoration, shape: tuple[int, ...]) -> None:
    """Raise `NetworkError` unless scene and transmission fit images of `shape`."""
    scene, transmission = restoration
    if scene.shape != shape:
        raise NetworkError(f"it maps images of shape {shape} to {tuple(scene.shape)}; the same shape is needed")

    expected = (shape[0], 1, *shape[2:])
    if isinstance(transmission, Tensor) and transmission.shape != expected:
        raise NetworkError(f"its transmission has shape {tuple(transmission.shape)}; {expected} is needed")


def _import_class(path: str) -> type[nn.Module]:
    """Import the network class `module.path:ClassName`."""
    module_name, _, class_name = path.partition(":")
    try:
        module: Any = importlib.import_module(module_name)
    except Exception as error:
        raise NetworkError(f"{path}: {module_name} cannot be imported ({format_error(error)})") from None

    found = getattr(module, class_name, None)
    if found is None:
        raise NetworkError(f"{path}: {module_name} has no such name")
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise NetworkError(f"{path} is no subclass of torch.nn.Module")
    return found
