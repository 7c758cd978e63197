"""Reference outputs of CORUN for weights that follow from names and shapes alone, so that no checkpoint is needed.

The rule: with `w = sin(0.7 i + crc32(name) % 997)` at the parameter's i-th entry, a step weight is `0.55 + 0.05 w`,
a scale `1 + 0.1 w`, a bias `0.01 w`, and any other weight `w` over the root of its fan-in.
"""

import json
import math
import zlib

import numpy as np
import torch
from torch import Tensor

from tests import DATA

FOLDER = DATA / "golden"


def golden_shapes(stages: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published network of 2 or 4 stages and width 30."""
    listed = json.loads((FOLDER / f"corun_keys_stages{stages}.json").read_text())
    return {name: tuple(shape) for name, shape in listed.items()}


def golden_state_dict(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The rule's weights for these names and shapes."""
    return {name: torch.from_numpy(_golden_weight(name, shape)) for name, shape in shapes.items()}


def golden_outputs() -> dict[str, np.ndarray]:
    """For two stages: `input`, `scene_1`, `transmission_1`, ..., `loss`, `grad_names`, `grad_norms`."""
    with np.load(FOLDER / "corun_stages2.npz") as file:
        return dict(file)


def _golden_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    phase = zlib.crc32(name.encode()) % 997
    wave = np.sin(0.7 * np.arange(math.prod(shape), dtype=np.float64) + phase)
    if name.endswith("step_lambda"):
        wave = 0.55 + 0.05 * wave
    elif name.endswith(("rescale", "norm.weight")):
        wave = 1 + 0.1 * wave
    elif len(shape) == 1:
        wave = 0.01 * wave
    else:
        wave = wave / math.sqrt(math.prod(shape[1:]))
    return wave.reshape(shape).astype(np.float32)
