"""The list of keys and the text made from it."""

from corun_ray.config.jobs import KINDS
from corun_ray.config.reference import ORDER, format_reference, list_keys


def test_every_key_is_described_and_listed() -> None:
    text = format_reference()
    for kind, job in KINDS.items():
        assert set(job.model_fields) <= set(ORDER)
        for path, field in list_keys(job).items():
            assert path == "kind" or field.description, f"{path} of {kind} says nothing"
            assert f"\n{path}: " in text or f"  {path} " in text


def test_reference_begins_with_the_kinds() -> None:
    first, second, *_ = format_reference().splitlines()
    assert first.split() == ["kind", "required"]
    assert second.strip() == f"{' | '.join(KINDS)}; what the job does"


def test_reference_gives_defaults_ranges_and_kinds() -> None:
    lines = [" ".join(line.split()) for line in format_reference().splitlines()]
    assert "optim.lr 0.0001 in pretrain, 5e-05 in colabator and tune" in lines
    assert "train.steps 30000 in pretrain, 5000 in colabator and tune" in lines
    assert "whole number, at least 2, at most 16; number of unfolding stages; corun only" in lines
    assert "train.progressive []" in lines and lines.index("train.progressive []") > lines.index(
        "train.steps 30000 in pretrain, 5000 in colabator and tune"
    )
    assert "pool: the optimal label pool (colabator, tune only)" in lines
    assert "text; folder, pack or URI of real hazy images (colabator, tune only)" in lines
    assert lines[lines.index("cluster.workers 1") + 1] == (
        "whole number or [low, high]; training workers; [low, high]: as many as fit the cluster"
    )
