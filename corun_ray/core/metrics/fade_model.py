"""The two patch models of FADE as its authors published them (notice in `NOTICE`)."""

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

NUM_FEATURES = 12


@dataclass(frozen=True)
class PatchModel:
    """A Gaussian over the log features of 8 x 8 patches: mean of 12, covariance 12 x 12."""

    mean: list[float]
    covariance: list[list[float]]


@cache
def load_patch_models() -> tuple[PatchModel, PatchModel]:
    """The model of fog-free and that of foggy photographs (Choi, You, Bovik, IEEE TIP 2015)."""
    text = resources.files("corun_ray.core.metrics").joinpath("fade_models.json").read_text()
    models = json.loads(text)
    return PatchModel(**models["fogfree"]), PatchModel(**models["foggy"])
