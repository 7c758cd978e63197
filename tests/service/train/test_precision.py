"""The precision on which the workers of a training agree, and what is told of it."""

import pytest
import torch

from corun_ray.core.choices import Precision
from corun_ray.core.training.precision import PrecisionChoice, Processor
from corun_ray.service.train import precision
from corun_ray.service.train.follower import describe_precision
from corun_ray.service.train.precision import agree_on_precision, describe_slow_bf16

AVX2, AVX512_BF16 = Processor(), Processor(cpu_features=("AVX512-BF16",))
BF16, FP32 = "bf16 (auto: AVX512-BF16)", "fp32 (auto: the processor has no fast bfloat16)"


@pytest.mark.parametrize(
    ("asked", "processor", "name", "warns"),
    [
        ("auto", AVX2, "fp32", False),
        ("auto", AVX512_BF16, "bf16", False),
        ("bf16", AVX2, "bf16", True),
        ("bf16", AVX512_BF16, "bf16", False),
        ("fp32", AVX2, "fp32", False),
    ],
)
def test_only_a_slow_bf16_that_was_asked_for_is_warned_of(
    asked: Precision, processor: Processor, name: str, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "read_processor", lambda device: processor)
    monkeypatch.setattr(precision, "measure_slowdown", lambda device: 15.2)
    choice, warning = agree_on_precision(asked, torch.device("cpu"))
    assert choice.name == name and (choice.reason is not None) == (asked == "auto")
    assert (warning is not None) == warns


def test_workers_that_are_not_alike_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is fast among three of which one is slow, and 40 times as slow."""
    monkeypatch.setattr(precision, "read_processor", lambda device: AVX512_BF16)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    of_others = {torch.distributed.ReduceOp.SUM: 1.0, torch.distributed.ReduceOp.MAX: 40.0}
    monkeypatch.setattr("torch.distributed.all_reduce", lambda numbers, operation: numbers.fill_(of_others[operation]))

    choice, _ = agree_on_precision("auto", torch.device("cpu"))
    assert choice == PrecisionChoice("fp32", "no fast bfloat16 on 1 of 3 workers")
    _, warning = agree_on_precision("bf16", torch.device("cpu"))
    assert warning is not None
    assert "slow on 1 of 3 workers' processors: a matrix product takes 40 times as long as in fp32" in warning


def test_the_warning_has_the_measured_ratio() -> None:
    assert describe_slow_bf16(15.24, 2, 2) == (
        "optim.precision: bf16 is slow on the workers' processors: a matrix product takes 15 times as long as in fp32 "
        "(auto and fp32 avoid this)"
    )
    assert "takes 2.5 times" in str(describe_slow_bf16(2.51, 1, 1))
    assert describe_slow_bf16(0.8, 1, 1) is None, "a processor that nobody knew to be fast"


@pytest.mark.parametrize(
    ("chosen", "asked", "before", "is_first", "line"),
    [
        (BF16, "auto", None, True, f"precision {BF16}"),
        (BF16, "auto", BF16, True, f"precision {BF16}"),
        (BF16, "auto", BF16, False, None),
        (FP32, "auto", BF16, True, f"precision {FP32}; so far {BF16}"),
        (FP32, "auto", BF16, False, f"precision {FP32}; so far {BF16}"),
        ("bf16", "bf16", None, True, None),
        ("fp32", "fp32", BF16, True, None),
    ],
)
def test_the_choice_is_told_at_the_start_and_where_it_changes(
    chosen: str, asked: str, before: str | None, is_first: bool, line: str | None
) -> None:
    assert describe_precision(chosen, asked, before, is_first) == line
