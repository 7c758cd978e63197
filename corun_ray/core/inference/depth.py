"""Depth of single photographs, by the depth estimators of transformers."""

import inspect
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from corun_ray.core.choices import DepthKind
from corun_ray.core.data.depth import DepthMap
from corun_ray.core.data.images import ImageU8
from corun_ray.core.errors import format_error
from corun_ray.core.weights import WeightsError, WeightsSource

MODEL_FILES = ("config.json", "preprocessor_config.json", "model.safetensors")
"""Files of a depth estimator, as transformers writes and Hugging Face hosts them."""
INVERSE_TYPES = frozenset({"dpt"})
METRES_TYPES = frozenset({"glpn", "zoedepth", "depth_pro", "tipsv2_dpt"})
"""Model types by their prediction; those of Depth Anything come in both kinds, and their configuration tells."""
NEAREST_M = 1 / 256
"""Least depth of a map in metres: 0 would say that there is no reading."""


@dataclass(frozen=True)
class DepthEstimator:
    """A network that estimates depth, and how photographs become its input."""

    network: nn.Module
    processor: Any
    """The image processor of transformers that belongs to the network."""
    kind: DepthKind
    """What a map of this estimator is."""

    def estimate(self, photo: ImageU8) -> NDArray[np.float32]:
        """Estimate the depth of a photograph `H W 3`, as `h w`.

        The map has the photograph's aspect ratio. It is as large as the photograph, or smaller where the network gives
        no more detail: training then reads less, and resizes the map. Inverse depth is scaled to [0, 1] within the
        photograph; metres stay metres, above 0.

        Raises `BadImage` for a map that training would refuse: with values that are not finite, or all equal.
        """
        # The processor resizes and normalises; the network's own device is where it runs.
        device = next(self.network.parameters()).device
        inputs = self.processor(images=photo, input_data_format="channels_last", return_tensors="pt").to(device)
        with torch.inference_mode():
            outputs = self.network(**inputs)

        # Back to the photograph's shape; some processors need its size besides, to cut off a border.
        resize = self.processor.post_process_depth_estimation
        size = photo.shape[:2]
        sizes = {"target_sizes": [_choose_map_size(size, outputs.predicted_depth.shape[-2:])]}
        if "source_sizes" in inspect.signature(resize).parameters:
            sizes["source_sizes"] = [size]
        depth = resize(outputs, **sizes)[0]["predicted_depth"].float().cpu().numpy()

        if self.kind == "metres":
            depth = np.maximum(depth, np.float32(NEAREST_M))
        depth_map = DepthMap.from_pixels(depth, self.kind)
        return depth_map.to_inverse(depth) if self.kind == "inverse" else depth


def _choose_map_size(photo: tuple[int, int], predicted: Sequence[int]) -> tuple[int, int]:
    """Return height and width of a photograph's depth map.

    `photo` and `predicted` are heights and widths too. Networks may predict another shape than the photograph's.
    """
    scale = min(1.0, max(predicted[0] / photo[0], predicted[1] / photo[1]))
    return round(photo[0] * scale), round(photo[1] * scale)


@dataclass(frozen=True)
class DepthModel:
    """The files of a depth estimator of transformers, which go to any process and become an estimator there."""

    name: str
    """For messages."""
    files: Mapping[str, bytes]
    kind: DepthKind | None = None
    """What the model predicts; None: its type tells."""

    def build(self) -> DepthEstimator:
        """Build the estimator, on the CPU.

        Raises `WeightsError` for files of no depth estimator, and where nothing tells what it predicts.
        """
        # Only these files lie in the folder that transformers reads: no pickle, no code.
        with tempfile.TemporaryDirectory() as folder:
            for file, content in self.files.items():
                Path(folder, file).write_bytes(content)
            return _load_folder(self.name, folder, self.kind)


def find_model_files(source: WeightsSource) -> dict[str, Path]:
    """Return the files of a depth estimator, by name.

    Raises `WeightsError`.
    """
    return {name: source(name) for name in MODEL_FILES}


def _load_folder(name: str, folder: str, kind: DepthKind | None) -> DepthEstimator:
    """Load the estimator in a local folder.

    Raises `WeightsError`.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES as DEPTH_MODELS

    # What transformers would log is an error below, or of no use to the user.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}

    try:
        config = transformers.AutoConfig.from_pretrained(folder, **local)
        if config.model_type not in DEPTH_MODELS:
            raise WeightsError(f"a model of type {config.model_type}, which estimates no depth")

        processor = transformers.AutoImageProcessor.from_pretrained(folder, **local)
        if not hasattr(processor, "post_process_depth_estimation"):
            raise WeightsError(f"{type(processor).__name__} of its preprocessor_config.json is not for depth")

        network, report = transformers.AutoModelForDepthEstimation.from_pretrained(
            folder, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **local
        )
    except Exception as error:
        # A damaged file can raise any error of the libraries.
        raise WeightsError(f"{name}: not a depth estimator of transformers ({format_error(error)})") from None

    # transformers would draw at random what the file lacks.
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise WeightsError(f"{name}: {len(lacking)} tensors are not in its model.safetensors ({lacking[0]}, ...)")

    found_kind = kind or _find_kind(config)
    if found_kind is None:
        raise WeightsError(
            f"{name}: a model of type {config.model_type} may predict anything; give depth_kind: inverse or metres"
        )
    return DepthEstimator(network.eval(), processor, found_kind)


def _find_kind(config: Any) -> DepthKind | None:
    """Return what a model predicts by its configuration, if that tells."""
    if hasattr(config, "depth_estimation_type"):
        return "metres" if config.depth_estimation_type == "metric" else "inverse"
    if config.model_type in METRES_TYPES:
        return "metres"
    return "inverse" if config.model_type in INVERSE_TYPES else None
