"""The metrics of images, this package's and pyiqa's: names, ranges and directions, without importing pyiqa.

Job files are checked with this catalog, so it must be fast. pyiqa itself imports torch, timm and transformers and takes
seconds; the file in which it lists its metrics holds plain values only.
"""

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

CONFIGS_FILE = "default_model_configs.py"

RATE_SETS = {"FID", "InceptionScore"}
"""Types of pyiqa's metrics that rate sets of images."""
NEED_TEXT = {"CLIPScore"}
"""Types that need a text beside the image."""
REPOSITORIES = {"QAlign", "QReAlign", "Compare2Score", "FGResQ"}
"""Types that load models of Hugging Face repositories, some with code of their own: not files of plain tensors."""
UNUSABLE = RATE_SETS | NEED_TEXT | REPOSITORIES


@dataclass(frozen=True)
class IqaFacts:
    """Facts of a metric: the range of its scores (None where open), and whether lower is better."""

    low: float | None
    high: float | None
    lower_better: bool
    needs_truth: bool = False


OWN_METRICS = {
    "psnr": IqaFacts(0, None, lower_better=False, needs_truth=True),
    "ssim": IqaFacts(-1, 1, lower_better=False, needs_truth=True),
    "fade": IqaFacts(0, None, lower_better=True),
}
"""Metrics of `core.metrics.measure` and `core.metrics.fade`, used instead of pyiqa's of the same names."""


TRANSMISSION_METRICS = {"transmission_rank": IqaFacts(-1, 1, lower_better=False, needs_truth=True)}
"""Metrics of the network's transmission, which only a validation during training measures."""


@cache
def list_metrics() -> dict[str, IqaFacts]:
    """List all metrics of single images, own ones first.

    Returns name → facts.
    """
    metrics = dict(OWN_METRICS)
    for name, facts in (_list_pyiqa_metrics("NR") | _list_pyiqa_metrics("FR")).items():
        metrics.setdefault(name, facts)
    return metrics


def list_validation_metrics() -> dict[str, IqaFacts]:
    """List the metrics that a validation may have: those of images and of transmissions.

    Returns name → facts.
    """
    return TRANSMISSION_METRICS | list_metrics()


def choose_mode(metric: str) -> Literal["min", "max"]:
    """Tell which value of a validation's metric is the best; `metric` is a name such as `val/psnr`.

    `min` for a name that is no metric.
    """
    facts = list_validation_metrics().get(metric.rpartition("/")[2])
    return "min" if facts is None or facts.lower_better else "max"


@cache
def list_no_reference_metrics() -> dict[str, IqaFacts]:
    """List pyiqa's metrics that need no truth.

    Returns name → facts of metrics that rate one image by itself, from files of plain numbers.
    """
    return _list_pyiqa_metrics("NR")


def _list_pyiqa_metrics(mode: str) -> dict[str, IqaFacts]:
    """List pyiqa's usable metrics of one mode.

    Returns name → facts. Modes are `NR` (no reference) and `FR` (full reference).
    """
    metrics = {}
    for name, config in _read_configs().items():
        if config["metric_mode"] != mode or config["metric_opts"]["type"] in UNUSABLE:
            continue
        low, high = _parse_bounds(config.get("score_range", ""))
        metrics[name] = IqaFacts(low, high, config.get("lower_better", False), needs_truth=mode == "FR")
    return metrics


def _read_configs() -> dict[str, dict[str, Any]]:
    """Read pyiqa's list of metrics: name → configuration.

    Raises `ImportError` where pyiqa is not installed.
    """
    package = importlib.util.find_spec("pyiqa")
    if package is None or package.origin is None:
        raise ImportError("pyiqa is not installed")

    # Run the one file by its path: importing it by its name would import all of pyiqa.
    file = Path(package.origin).with_name(CONFIGS_FILE)
    spec = importlib.util.spec_from_file_location("pyiqa_configs", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DEFAULT_CONFIGS


def _parse_bounds(score_range: str) -> tuple[float | None, float | None]:
    """Parse a range: `"~0, ~100"` is (0, 100).

    A tilde marks an estimate; a lone tilde stands for no bound.
    """
    low, _, high = score_range.partition(",")
    return _parse_bound(low), _parse_bound(high)


def _parse_bound(text: str) -> float | None:
    """Parse one bound; None where it is open."""
    try:
        return float(text.strip().removeprefix("~"))
    except ValueError:
        return None
