import subprocess
import sys
from typing import Any

import pytest

from corun_ray.core.metrics import catalog
from corun_ray.core.metrics.catalog import IqaFacts, list_no_reference_metrics


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("musiq", IqaFacts(0, 100, lower_better=False)),
        ("nima", IqaFacts(0, 10, lower_better=False)),
        ("clipiqa", IqaFacts(0, 1, lower_better=False)),
        ("topiq_nr", IqaFacts(0, 1, lower_better=False)),
        ("brisque", IqaFacts(0, 150, lower_better=True)),
        ("niqe", IqaFacts(0, 100, lower_better=True)),
        ("uranker", IqaFacts(-1, 2, lower_better=False)),
        ("wadiqam_nr", IqaFacts(-1, 0.1, lower_better=False)),
        ("pi", IqaFacts(0, None, lower_better=True)),
    ],
)
def test_range_and_direction(name: str, facts: IqaFacts) -> None:
    assert list_no_reference_metrics()[name] == facts


@pytest.mark.parametrize("name", ["lpips", "topiq_fr", "fid", "fid_dinov2", "inception_score", "clipscore", "qalign"])
def test_metrics_that_cannot_rate_one_image_from_files(name: str) -> None:
    assert name not in list_no_reference_metrics()


def test_ranges_that_pyiqa_leaves_open(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = {"a": "0, 1", "b": "~-2,~3.5", "c": "~0, ~", "d": "~, 2", "e": "quality: 0, 1; rank: 0, 2", "f": ""}
    configs: dict[str, dict[str, Any]] = {
        name: {"metric_mode": "NR", "metric_opts": {"type": "X"}, "score_range": text} for name, text in ranges.items()
    }
    configs["g"] = {"metric_mode": "NR", "metric_opts": {"type": "X"}}
    monkeypatch.setattr(catalog, "_read_configs", lambda: configs)
    bounds = {name: (facts.low, facts.high) for name, facts in list_no_reference_metrics.__wrapped__().items()}
    assert bounds == {
        "a": (0, 1),
        "b": (-2, 3.5),
        "c": (0, None),
        "d": (None, 2),
        "e": (None, None),
        "f": (None, None),
        "g": (None, None),
    }


def test_neither_pyiqa_nor_torch_is_imported() -> None:
    read = "from corun_ray.core.metrics.catalog import list_no_reference_metrics as read; read()"
    code = f"import sys; {read}; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "corun_ray.core.metrics.catalog" in modules
    assert not {"pyiqa", "torch", "numpy"} & set(modules)
