"""The precision of a training, on which all of its workers agree."""

import torch
import torch.distributed as dist

from corun_ray.core.choices import Precision
from corun_ray.core.training.precision import (
    PrecisionChoice,
    choose_precision,
    judge_bfloat16,
    measure_slowdown,
    read_processor,
)


def agree_on_precision(asked: Precision, device: torch.device) -> tuple[PrecisionChoice, str | None]:
    """Choose the precision together with the other workers, by all of their devices.

    Returns the choice and, where bf16 was asked for and is slow, a warning with the measured ratio. All workers must
    call this together. Outside of a process group, this process is the only worker.
    """
    bfloat16 = judge_bfloat16(read_processor(device))
    num_workers = dist.get_world_size() if dist.is_initialized() else 1
    num_slow = round(_reduce(float(not bfloat16.is_fast), dist.ReduceOp.SUM, device))
    choice = choose_precision(asked, bfloat16, num_slow, num_workers)
    if asked != "bf16" or num_slow == 0:
        return choice, None

    # Every worker that is slow measures its own device, at the same time as the others, as it will compute.
    own = 0.0 if bfloat16.is_fast else measure_slowdown(device)
    return choice, describe_slow_bf16(_reduce(own, dist.ReduceOp.MAX, device), num_slow, num_workers)


def describe_slow_bf16(slowdown: float, num_slow: int, num_workers: int) -> str | None:
    """Return the warning of bf16 where it is slow; None where it is measured to be no slower than fp32.

    `slowdown` is how many times as long as in fp32 a product takes, the most of all workers.
    """
    if slowdown <= 1:
        return None
    times = f"{slowdown:.0f}" if slowdown >= 10 else f"{slowdown:.1f}"
    where = "the workers' processors" if num_slow == num_workers else f"{num_slow} of {num_workers} workers' processors"
    return (
        f"optim.precision: bf16 is slow on {where}: a matrix product takes {times} times as long as in fp32 "
        "(auto and fp32 avoid this)"
    )


def _reduce(value: float, operation: dist.ReduceOp.RedOpType, device: torch.device) -> float:
    """Reduce a number over all workers."""
    if not dist.is_initialized():
        return value
    numbers = torch.tensor(value, device=device)
    dist.all_reduce(numbers, operation)
    return numbers.item()
