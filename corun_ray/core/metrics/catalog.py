"""The metrics of images, ours and those of the installed pyiqa: names, ranges and directions, without importing pyiqa.

Job files are checked with this, so it must be fast: pyiqa itself brings torch, timm and transformers and takes
seconds, the file in which it lists its metrics holds plain values only.
"""

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

CONFIGS_FILE = "default_model_configs.py"

RATE_SETS = {"FID", "InceptionScore"}  # of images, not an image
NEED_TEXT = {"CLIPScore"}
# Models of Hugging Face repositories, some of which run code of their own: not files of plain tensors.
REPOSITORIES = {"QAlign", "QReAlign", "Compare2Score", "FGResQ"}
UNUSABLE = RATE_SETS | NEED_TEXT | REPOSITORIES


@dataclass(frozen=True)
class IqaFacts:
    """What is known of a metric: the range of its scores (None where open), and whether lower is better."""

    low: float | None
    high: float | None
    lower_better: bool
    needs_truth: bool = False


OWN_METRICS = {
    "psnr": IqaFacts(0, None, lower_better=False, needs_truth=True),
    "ssim": IqaFacts(-1, 1, lower_better=False, needs_truth=True),
    "fade": IqaFacts(0, None, lower_better=True),
}
"""Those of `core.metrics` and `core.fade`, which go before pyiqa's of the same names."""


@cache
def list_metrics() -> dict[str, IqaFacts]:
    """Name → facts of every metric that an image can be measured by: ours first."""
    return OWN_METRICS | {
        name: facts for name, facts in (_of_pyiqa("NR") | _of_pyiqa("FR")).items() if name not in OWN_METRICS
    }


@cache
def list_no_reference_metrics() -> dict[str, IqaFacts]:
    """Name → facts of every metric of pyiqa that rates one image by itself from files of plain numbers."""
    return _of_pyiqa("NR")


def _of_pyiqa(mode: str) -> dict[str, IqaFacts]:
    return {
        name: IqaFacts(*_bounds(config.get("score_range", "")), config.get("lower_better", False), mode == "FR")
        for name, config in _configs().items()
        if config["metric_mode"] == mode and config["metric_opts"]["type"] not in UNUSABLE
    }


def _configs() -> dict[str, dict[str, Any]]:
    package = importlib.util.find_spec("pyiqa")
    if package is None or package.origin is None:
        raise ImportError("pyiqa is not installed")
    file = Path(package.origin).with_name(CONFIGS_FILE)
    spec = importlib.util.spec_from_file_location("pyiqa_configs", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DEFAULT_CONFIGS


def _bounds(score_range: str) -> tuple[float | None, float | None]:
    """`"~0, ~100"` to (0, 100): a tilde marks an estimate, alone it stands for no bound."""
    low, _, high = score_range.partition(",")
    return _number(low), _number(high)


def _number(text: str) -> float | None:
    try:
        return float(text.strip().removeprefix("~"))
    except ValueError:
        return None
