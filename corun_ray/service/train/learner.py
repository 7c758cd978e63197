"""From a batch of the stream to gradients: one rank's part of a step."""

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from corun_ray.config.jobs import ColabatorJob, TrainingJob
from corun_ray.core.data.device_samples import make_pairs, make_strong_views
from corun_ray.core.networks.corun import CORUN
from corun_ray.core.scoring.coherence import Coherence
from corun_ray.core.training.acceleration import check_compiled, compile_network
from corun_ray.core.training.labels import LabelPool
from corun_ray.core.training.losses import Losses
from corun_ray.core.training.precision import PrecisionChoice
from corun_ray.core.training.state import TrainState
from corun_ray.core.training.steps import (
    Colabator,
    RealBatch,
    StepOutput,
    SyntheticBatch,
    apply_mixup,
    run_pretraining_step,
)
from corun_ray.core.training.streams import Columns, open_stream
from corun_ray.service.data.sample_maker import PAIR, STRONG
from corun_ray.service.data.stream import plan_phases


def derive_step_seed(seed: int, step: int, place: int) -> int:
    """Return the RNG seed of one batch.

    The batch is the `place`-th of all workers' at a step. The seed follows from the job alone, so a resumed run needs
    no saved RNG state.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{place}".encode(), digest_size=8).digest(), "big")


class Learner:
    """A student that learns by the job's method: Colabator with a label pool, else synthetic pairs alone.

    Raises `CannotCompile` where a compiled network restores wrongly.

    The batch of a step is taken in `train.accumulate` parts, each as the batch of a worker of its own: N workers with
    one part each, or one worker with N parts, have the same losses, random numbers and gradients.
    """

    def __init__(
        self,
        job: TrainingJob,
        state: TrainState,
        losses: Losses,
        coherence: Coherence | None,
        pool: LabelPool | None,
        rank: int,
        device: torch.device,
        precision: PrecisionChoice,
    ) -> None:
        self._job, self._state, self._losses = job, state, losses
        self._rank, self._device, self._precision = rank, device, precision
        self._student = self._wrap_student(self._compile(state.student, learns=True))

        self.colabator: Colabator | None = None
        if isinstance(job, ColabatorJob):
            assert pool is not None and coherence is not None
            teacher = self._compile(state.teacher, learns=False)
            side = open_stream(device) if "stream" in job.coherence.gpu else None
            self.colabator = Colabator(teacher, coherence, pool, losses, job.pool.encoding, side)

    def learn(self, batch: Columns) -> Iterator[StepOutput]:
        """Add a step's gradients to the state, part by part.

        They are means over the parts of `batch` and over all ranks. Yields the losses and labels of each part.
        """
        num_parts = self._job.train.accumulate
        part_images = len(batch["index"]) // num_parts
        for part in range(num_parts):
            # Cut the part out of the batch.
            images = {name: column[part * part_images : (part + 1) * part_images] for name, column in batch.items()}
            place = self._rank * num_parts + part

            # Ranks exchange gradients, and so wait for each other, once a step: at the last part.
            is_last = part == num_parts - 1
            with contextlib.nullcontext() if is_last else self._skip_exchange():
                torch.manual_seed(derive_step_seed(self._job.seed, self._state.step, place))
                synthetic, real = self.load(images, place)
                with self._autocast():
                    output = self._forward(synthetic, real)
                self._state.backward(output.losses, 1 / num_parts)
            yield output

    def load(self, batch: Columns, place: int) -> tuple[SyntheticBatch, RealBatch | None]:
        """Bring one part to the device, ready for the network; no views of real images in a batch without them."""
        return self._load_pairs(batch, place), self._load_views(batch)

    def _load_pairs(self, batch: Columns, place: int) -> SyntheticBatch:
        """Bring the pairs of one part to the device, or make there those that were only drawn."""
        job = self._job
        if PAIR in batch:
            with_transmission = job.loss.transmission > 0
            made = make_pairs(batch[PAIR].tolist(), self._device, with_transmission=with_transmission)
            synthetic = SyntheticBatch(*made)
        else:
            synthetic = SyntheticBatch(self._to_device(batch["hazy"]), self._to_device(batch["clear"]))
            if "transmission" in batch:
                synthetic = synthetic._replace(transmission=self._to_device(batch["transmission"][..., None]))

        # Every part of every step mixes by its own seed. A step repeated after a restart mixes as before.
        if job.data.mixup:
            synthetic = apply_mixup(synthetic, job.data.mixup, (job.seed, self._state.step, place))
        return synthetic

    def _load_views(self, batch: Columns) -> RealBatch | None:
        """Bring the views of one part's real images to the device; None for a batch without."""
        if "weak" not in batch:
            return None
        weak = self._to_device(batch["weak"])
        if STRONG in batch:
            strong = make_strong_views(weak, batch[STRONG].tolist())
        else:
            strong = self._to_device(batch["strong"])
        return RealBatch(weak, strong, batch["key"].tolist())

    def _forward(self, synthetic: SyntheticBatch, real: RealBatch | None) -> StepOutput:
        """Return the losses of one part."""
        if self.colabator is None:
            return run_pretraining_step(self._student, synthetic, self._losses)
        assert real is not None
        return self.colabator.step(self._student, synthetic, real, self._state.step)

    def _to_device(self, images: np.ndarray | Tensor) -> Tensor:
        """Convert uint8 `B H W C`, on the host or there already, to float `B C H W` in [0, 1].

        Bytes travel to the device, a quarter of the floats.
        """
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(images.copy()).to(self._device)
        return images.permute(0, 3, 1, 2).float() / 255

    def _autocast(self) -> contextlib.AbstractContextManager:
        """Compute in bfloat16 where that is the precision."""
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision.name == "bf16")

    def _compile(self, network: nn.Module, *, learns: bool) -> nn.Module:
        """Compile a network where the job asks for it; try CORUN on images as those of the next step.

        Raises `CannotCompile`.
        """
        phases = [phase for phase in plan_phases(self._job) if phase.end_step > self._state.step]
        if not self._job.optim.compile or not phases:
            return network
        compiled = compile_network(network)
        if not isinstance(network, CORUN):
            return compiled

        # Colabator's student restores synthetic and real images at once.
        num_images = phases[0].batch // self._job.train.accumulate
        num_images *= 2 if learns and isinstance(self._job, ColabatorJob) else 1
        shape = (num_images, phases[0].patch_px, phases[0].patch_px, 3)
        images = self._to_device(np.random.default_rng(self._job.seed).integers(256, size=shape, dtype=np.uint8))
        with self._autocast(), torch.set_grad_enabled(learns):
            check_compiled(compiled, network, images, "optim.compile")
        return compiled

    def _wrap_student(self, student: nn.Module) -> nn.Module:
        """Wrap the student for gradients averaged over ranks."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return student

        # Networks other than CORUN, subclasses included, may have parameters that take no part in restoring.
        return nn.parallel.DistributedDataParallel(
            student,
            device_ids=[self._device.index] if self._device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=type(self._state.student) is not CORUN,
        )

    def _skip_exchange(self) -> contextlib.AbstractContextManager:
        """Keep gradients on this rank within the context."""
        if isinstance(self._student, nn.parallel.DistributedDataParallel):
            return self._student.no_sync()
        return contextlib.nullcontext()
