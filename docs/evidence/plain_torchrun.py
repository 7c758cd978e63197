"""Train a job file without the service: `torchrun`, a DataLoader and, for Colabator, a pool in each process.

`beside_torchrun.py` times the service against this script. Network, losses, samples and their order are the job's own,
from `corun_ray.core` and the stream's `SampleMaker`. There is no Ray process, storage, tracking or checkpoint:

    torchrun --nproc-per-node 2 docs/evidence/plain_torchrun.py job.yaml rates.json

Writes the steps per second of every `train.log_every` steps, as the service's `rate/steps_per_s` counts them, and when
the first step ended.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from corun_ray.config.jobs import TrainingJob
from corun_ray.config.loading import load_jobs
from corun_ray.core.networks.corun import CORUN
from corun_ray.core.training.labels import LocalPool
from corun_ray.core.training.state import TrainState, compute_learning_rate
from corun_ray.service.data.manifest import build_manifest
from corun_ray.service.data.sample_maker import Batch, SampleMaker
from corun_ray.service.data.stream import plan_remaining_phases
from corun_ray.service.train.coherence import build_coherence, build_losses
from corun_ray.service.train.learner import Learner
from corun_ray.service.train.precision import agree_on_precision
from corun_ray.service.train.worker import list_learning_cycles
from corun_ray.service.weights.needed import open_weights


class Samples(Dataset):
    """A data set whose items are batches, by the indices of their samples."""

    def __init__(self, job: TrainingJob) -> None:
        self.make = SampleMaker(job, build_manifest(job), job.data.patch_px, _refuse)

    def __getitem__(self, indices: np.ndarray) -> Batch:
        # One thread for each decoding process, as in the service.
        cv2.setNumThreads(1)
        return self.make({"id": indices})


def _refuse(bad: dict[str, str]) -> None:
    """Refuse unusable files: both ways must see the same samples."""
    raise ValueError(f"files that cannot be used: {bad}")


def batches(job: TrainingJob, rank: int, workers: int) -> Iterator[Batch]:
    """Yield the batches of one rank, the same as the service's."""
    ((_, layout),) = plan_remaining_phases(job, 0, 0, workers)

    # Each step takes the next samples of the stream; each rank takes its part of them.
    first = layout.first_sample + np.arange(layout.num_steps) * layout.batch * workers + rank * layout.batch
    indices = [start + np.arange(layout.batch) for start in first]

    loader: DataLoader[Batch] = DataLoader(
        Samples(job),
        batch_size=None,
        sampler=indices,  # type: ignore[arg-type]
        num_workers=job.cluster.data_cpus,
        collate_fn=lambda batch: batch,
    )
    return iter(loader)


def train(job: TrainingJob, rank: int, workers: int) -> tuple[list[float], float]:
    """Train to the last step; return the rates, and the time at the end of the first step."""
    # Network, losses and pool, as a worker of the service builds them.
    torch.manual_seed(job.seed)
    network = CORUN(job.network.stages, job.network.width)
    state = TrainState.start(network)
    coherence = build_coherence(job.coherence, open_weights(None)) if job.kind == "colabator" else None
    losses = build_losses(job, open_weights(None), coherence)
    device = torch.device("cpu")
    precision, _ = agree_on_precision(job.optim.precision, device)
    learner = Learner(job, state, losses, coherence, LocalPool(), rank, device, precision)

    # Steps as in a worker's loop, with the rate of every `log_every` of them.
    cycles, rates, since_s = list_learning_cycles(job.optim), [], time.perf_counter()
    first_step_at_s = 0.0
    for batch in batches(job, rank, workers):
        for _ in learner.learn(batch):
            pass
        lr = compute_learning_rate(state.step, cycles, job.optim.warmup_steps)
        state.update(lr, job.optim.ema, len(batch["index"]) * workers)
        first_step_at_s = first_step_at_s or time.time()
        if state.step % job.train.log_every == 0:
            rates.append(job.train.log_every / (time.perf_counter() - since_s))
            since_s = time.perf_counter()
    return rates, first_step_at_s


def main() -> None:
    """Train as one process of `torchrun`; rank 0 writes the rates."""
    job_file, out = map(Path, sys.argv[1:])
    (job,) = load_jobs(job_file)
    assert isinstance(job, TrainingJob)

    # torchrun sets rank and number of processes.
    rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(max(1, int(job.cluster.cpus_per_worker)))
    with contextlib.ExitStack() as stack:
        if workers > 1:
            dist.init_process_group("gloo")
            stack.callback(dist.destroy_process_group)
        rates, first_step_at_s = train(job, rank, workers)

    if rank == 0:
        out.write_text(json.dumps({"rates": rates, "first_step_at_s": first_step_at_s}))


if __name__ == "__main__":
    main()
