"""How a run's stream is cut: into phases of one patch and batch size, and each phase into Ray Data's blocks."""

from dataclasses import dataclass

import numpy as np

from corun_ray.config.jobs import PretrainJob, TrainingJob

STEPS_PER_BLOCK = 16
"""Steps that a block of the stream lasts: few blocks to schedule, and still an early first one."""
MAX_BLOCKS = 20_000
"""Ray Data plans every block before the first; a longer run has longer blocks."""


@dataclass(frozen=True)
class Phase:
    """The steps from `first_step` up to, not including, `end_step`: all of one patch and batch size."""

    first_step: int
    end_step: int
    patch_px: int
    batch: int
    """Images of each kind in a worker's step."""


def phases(job: TrainingJob) -> list[Phase]:
    """The whole run's phases: one, unless `train.progressive` names later ones."""
    later = job.train.progressive if isinstance(job, PretrainJob) else ()
    sizes = [(0, job.data.patch_px, job.train.batch_per_worker)]
    sizes += [(phase.from_step, phase.patch_px, phase.batch_per_worker) for phase in later]
    sizes = [(first_step, patch_px, batch * job.train.accumulate) for first_step, patch_px, batch in sizes]
    ends = [first_step for first_step, _, _ in sizes[1:]] + [job.train.steps]
    found = [Phase(first, min(end, job.train.steps), *size) for (first, *size), end in zip(sizes, ends, strict=True)]
    return [phase for phase in found if phase.first_step < phase.end_step]


@dataclass(frozen=True)
class Layout:
    """How the stream of (the rest of) a phase is cut into blocks, so that each rank gets its own samples in order.

    Each step takes the next `batch * num_workers` samples, its r-th `batch` of them on rank r. A block
    holds one rank's share of several consecutive steps, since a block a step would keep Ray Data busier with blocks
    than with images. Block `j` is rank `j % num_workers`'s: the splitter deals ordered, equal blocks out in turn.
    """

    first_sample: int
    num_steps: int
    batch: int
    num_workers: int

    @property
    def blocks_per_worker(self) -> int:
        """Blocks that each rank will read."""
        wanted = -(-self.num_steps // STEPS_PER_BLOCK)
        return min(wanted, max(1, MAX_BLOCKS // self.num_workers))

    @property
    def steps_per_block(self) -> int:
        """Steps that a block lasts; the last one may hold a few that nobody takes."""
        return -(-self.num_steps // self.blocks_per_worker)

    @property
    def rows_per_block(self) -> int:
        """Samples in a block."""
        return self.steps_per_block * self.batch

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return self.blocks_per_worker * self.num_workers

    def samples(self, rows: np.ndarray) -> np.ndarray:
        """Row numbers of the dataset → indices in the run's stream."""
        block, row = np.divmod(rows, self.rows_per_block)
        step, place = np.divmod(row, self.batch)
        turn, rank = np.divmod(block, self.num_workers)
        step = turn * self.steps_per_block + step
        return self.first_sample + (step * self.num_workers + rank) * self.batch + place


def remaining_phases(job: TrainingJob, step: int, num_images_seen: int, num_workers: int) -> list[tuple[Phase, Layout]]:
    """What is left of the run after `step` steps and `num_images_seen` samples: phases and how each is cut.

    Samples are counted on across phases, so a restart within one goes on where the run stopped. Empty at the end.
    """
    remaining, first_sample = [], num_images_seen
    for phase in phases(job):
        num_steps = phase.end_step - max(step, phase.first_step)
        if num_steps > 0:
            layout = Layout(first_sample, num_steps, phase.batch, num_workers)
            remaining.append((phase, layout))
            first_sample += num_steps * phase.batch * num_workers
    return remaining
