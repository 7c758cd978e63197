"""The best checkpoint of a run by a metric of its validations (`train.best`)."""

from dataclasses import dataclass

from corun_ray.core.metrics.catalog import choose_mode
from corun_ray.service.runs.held_out import ValidationLog
from corun_ray.service.runs.record import list_checkpoint_steps
from corun_ray.service.storage import Location


@dataclass(frozen=True)
class BestCheckpoint:
    """The checkpoint with the best validation."""

    metric: str
    """Such as `val/psnr`."""
    step: int
    value: float
    """The mean over the images that all compared validations have in common."""

    def describe(self) -> str:
        """Describe it in a few words: `step 500, val/psnr 21.3400`."""
        return f"step {self.step}, {self.metric} {self.value:.4f}"


def find_best_checkpoint(metric: str | None, run: Location, log: ValidationLog) -> BestCheckpoint | None:
    """Find the checkpoint of a run with the best validation; the earlier one of equals.

    None without a metric, and where no checkpoint that is there was measured by it.

    Raises `StorageError`.
    """
    if metric is None:
        return None

    # Ray Train has kept the best checkpoints; of these, the log tells the best over the same images.
    means = log.compare_steps(metric)
    steps = [step for step in list_checkpoint_steps(run) if step in means]
    if not steps:
        return None
    choose = min if choose_mode(metric) == "min" else max
    step = choose(steps, key=means.__getitem__)
    return BestCheckpoint(metric, step, means[step])
