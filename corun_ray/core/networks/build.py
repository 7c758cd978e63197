"""Networks that Colabator can train: what they map to what, and where they come from.

A network maps hazy images (B 3 H W, RGB in [0, 1]) to a scene of the same shape, or to a pair of scene and
transmission (B 1 H W in (0, 1]). What sizes it takes it may say in attributes, see `core.restore`.
"""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from corun_ray.core.errors import format_error
from corun_ray.core.networks.corun import CORUN, Restoration, as_restoration
from corun_ray.core.networks.spandrel import EXTRA_PACKAGE, build_spandrel_network, is_extra, list_classes
from corun_ray.core.networks.spec import CORUN_TYPE, NetworkError, NetworkSpec, compute_padded_size, construct

PROBE_IMAGES = 2


def build_network(spec: NetworkSpec) -> nn.Module:
    """A freshly initialised network on the CPU; raises `NetworkError`. A module that `spec` names is imported."""
    if spec.type == CORUN_TYPE:
        if spec.args.keys() - {"stages", "width"}:
            raise NetworkError(f"corun refuses its args ({', '.join(spec.args)}); it takes stages, width")
        return construct(CORUN, spec)
    if ":" in spec.type:
        return construct(_imported_class(spec.type), spec)
    return build_spandrel_network(spec)


def list_architectures() -> list[str]:
    """List the names of spandrel's network classes, sorted; `probe_network` finds those that suit restoration."""
    return sorted(list_classes(), key=str.lower)


def list_required_packages(spec: NetworkSpec) -> list[str]:
    """The packages, beside torch, that building the network needs; those of a user's own class are not known."""
    if spec.type == CORUN_TYPE or ":" in spec.type:
        return []
    extra = [EXTRA_PACKAGE] if is_extra(spec.type) else []
    return ["spandrel", *extra]


@torch.no_grad()
def probe_network(network: nn.Module, patch_px: int) -> None:
    """Runs random square images of `patch_px` through; raises `NetworkError` unless scenes of their size come back."""
    parameter = next(network.parameters(), None)
    if parameter is None:
        raise NetworkError("it has no parameters to train")
    if compute_padded_size(network, patch_px, patch_px) != (patch_px, patch_px):
        taken = compute_padded_size(network, patch_px, patch_px)[0]
        raise NetworkError(f"it does not take patches of {patch_px} px (the next size that it takes is {taken} px)")
    shape = (PROBE_IMAGES, 3, patch_px, patch_px)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(parameter.device)
    was_training = network.training
    try:
        _check_shapes(as_restoration(network.eval()(images)), shape)
    except NetworkError:
        raise
    except Exception as error:
        raise NetworkError(f"it fails on {patch_px} px RGB images in a batch of 2 ({format_error(error)})") from None
    finally:
        network.train(was_training)


def _check_shapes(restoration: Restoration, shape: tuple[int, ...]) -> None:
    scene, transmission = restoration
    if scene.shape != shape:
        raise NetworkError(f"it maps images of shape {shape} to {tuple(scene.shape)}; the same shape is needed")
    expected = (shape[0], 1, *shape[2:])
    if isinstance(transmission, Tensor) and transmission.shape != expected:
        raise NetworkError(f"its transmission has shape {tuple(transmission.shape)}; {expected} is needed")


def _imported_class(path: str) -> type[nn.Module]:
    module_name, _, class_name = path.partition(":")
    try:
        module: Any = importlib.import_module(module_name)
    except Exception as error:
        raise NetworkError(f"{path}: {module_name} cannot be imported ({format_error(error)})") from None
    found = getattr(module, class_name, None)
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        what = "has no such name" if found is None else "has it, but as no subclass of torch.nn.Module"
        raise NetworkError(f"{path}: {module_name} {what}")
    return found
