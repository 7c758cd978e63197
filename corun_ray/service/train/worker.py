"""What one training worker runs: the loop over the stream, and what happens every so many steps."""

import traceback
from collections.abc import Iterator
from pathlib import Path

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint
from ray.train.collective import broadcast_from_rank_zero
from torch import nn

from corun_ray.config.jobs import ColabatorJob
from corun_ray.config.training import OptimSection
from corun_ray.core.networks.corun import CORUN
from corun_ray.core.training import checkpoints
from corun_ray.core.training.acceleration import keep_freed_memory
from corun_ray.core.training.state import Cycle, TrainState, compute_learning_rate
from corun_ray.service.data.manifest import Manifest
from corun_ray.service.data.sample_maker import Batch
from corun_ray.service.data.stream import StreamTask, iterate_batches, plan_remaining_phases, split_stream
from corun_ray.service.models.sources import Model
from corun_ray.service.pool.client import PoolClient
from corun_ray.service.pool.keeper import PoolKeeper, collect_counters
from corun_ray.service.storage import locate
from corun_ray.service.telemetry.logs import Log
from corun_ray.service.train.board import Attempt
from corun_ray.service.train.checkpointing import Checkpointer, PreemptionWatch
from corun_ray.service.train.coherence import SharedCoherence, TimedCoherence, build_coherence, build_losses
from corun_ray.service.train.learner import Learner
from corun_ray.service.train.meter import Meter, WorkerTelemetry
from corun_ray.service.train.plan import WorkerPlan
from corun_ray.service.train.validation import Validator
from corun_ray.service.weights.needed import open_weights


def list_learning_cycles(optim: OptimSection) -> list[Cycle]:
    """The cosine cycles of a job: those it lists, else one."""
    if optim.cycles:
        return [Cycle(cycle.steps, cycle.lr, cycle.min_lr) for cycle in optim.cycles]
    return [Cycle(optim.schedule_steps, optim.lr, optim.min_lr)]


def train_worker(plan: WorkerPlan) -> None:
    """Trains until the job's last step, from the last checkpoint if there is one."""
    rank, worker = ray.train.get_context().get_world_rank(), None
    log = Log("worker", plan.labels, rank=rank)
    try:
        worker = Worker(plan, log)
        worker.train()
    except Exception:
        log.error("worker failed", step=None if worker is None else worker.state.step)
        ray.get(plan.board.post_error.remote(rank, traceback.format_exc()))
        raise


class Worker:
    """One rank of the training: its state, and its part in what all ranks do together."""

    def __init__(self, plan: WorkerPlan, log: Log) -> None:
        context = ray.train.get_context()
        self.plan, self.job, self.log = plan, plan.job, log
        self.rank, self.num_workers = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            keep_freed_memory()
            torch.set_num_threads(max(1, int(self.job.cluster.cpus_per_worker)))
        self.model: Model = ray.get(plan.model)
        torch.manual_seed(self.job.seed)  # of a network that begins without parameters; the same on every rank
        self.state = TrainState.start(self._initial_network(), self.device)
        self.keeper = PoolKeeper(plan.shards, locate(plan.pool_uri)) if plan.shards and self.rank == 0 else None
        self.pool = self._restored_pool(self._resume())
        run = locate(plan.run_uri)
        self.saver = Checkpointer(run, self.state, self.model.spec, self.job.seed, self.rank, plan.board, log)
        if self.rank == 0:
            self.saver.discard_later()
        self.manifest: Manifest = ray.get(plan.manifest)
        self.coherence = self._coherence()
        losses = build_losses(self.job, open_weights(self.job.loss.weights), self.coherence, self.device)
        self.learner = Learner(self.job, self.state, losses, self.coherence, self.pool, self.rank, self.device)
        self.preemption = PreemptionWatch(self.rank, plan.board, log)
        self.cycles = list_learning_cycles(self.job.optim)
        self.meter = Meter(self.device)
        self.telemetry = WorkerTelemetry(plan.labels, self.rank, self.device, self.pool, self.coherence)
        self.validator = Validator(self.job, self.manifest, self.rank, self.num_workers, self.device)

    def train(self) -> None:
        """The loop."""
        job, state = self.job, self.state
        self.log.info("worker started", step=state.step, workers=self.num_workers, device=str(self.device))
        for batch in self.telemetry.watched(self._stream()):
            for output in self.learner.learn(batch):
                self.meter.add(output)
            lr = compute_learning_rate(state.step, self.cycles, job.optim.warmup_steps)
            state.update(lr, job.optim.ema, len(batch["index"]) * self.num_workers)
            self.meter.end_step(lr)
            if self.rank == 0:
                self.plan.board.post_step.remote(state.step)
            if self._due(job.train.log_every) and self._log_and_look_for_trouble():
                return
            if self._due(job.train.validate_every):
                with self.telemetry.pause("validation"):
                    self._validate()
            if self._due(job.train.checkpoint_every) or self.preemption.is_due(state.step):
                with self.telemetry.pause("checkpoint"):
                    self.saver.save(self.pool, self.keeper)
        self.log.info("worker finished", step=state.step)

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.job.train.steps

    def _initial_network(self) -> nn.Module:
        network = self.model.build()
        if isinstance(network, CORUN):
            network.checkpoint_activations = self.job.network.checkpoint_activations
        return network

    def _resume(self) -> str | None:
        """Restores the state from the last checkpoint; returns the pool snapshot taken with it."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None and self.plan.start_from is not None:
            place = locate(self.plan.start_from)
            checkpoint = Checkpoint(place.path, place.filesystem)
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            return checkpoints.load_run(Path(folder), self.state, self.model.spec)["pool_snapshot"]

    def _restored_pool(self, snapshot: str | None) -> PoolClient | None:
        """The label pool, standing where the checkpoint stood."""
        if not self.plan.shards:
            return None
        generation = None if self.keeper is None else self.keeper.restore(snapshot)
        return PoolClient(self.plan.shards, broadcast_from_rank_zero(generation))

    def _coherence(self) -> TimedCoherence | None:
        if not isinstance(self.job, ColabatorJob):
            return None
        plain = build_coherence(self.job.coherence, open_weights(self.job.coherence.weights), self.device)
        is_shared = self.job.coherence.share_blocks and self.num_workers > 1
        return TimedCoherence(SharedCoherence(plain) if is_shared else plain, self.device)

    def _stream(self) -> Iterator[Batch]:
        """This rank's batches from where the state stands to the end of the run, phase by phase."""
        state = self.state
        if self.rank == 0:
            attempt = Attempt(state.step, state.num_images_seen, self.num_workers)
            self.plan.board.post_attempt.remote(attempt)
        for phase, layout in plan_remaining_phases(self.job, state.step, state.num_images_seen, self.num_workers):
            shards = None
            if self.rank == 0:
                plan = self.plan
                task = StreamTask(plan.job, plan.manifest, plan.board, layout, phase.patch_px, plan.labels, plan.cache)
                shards = split_stream(task)
            yield from iterate_batches(broadcast_from_rank_zero(shards)[self.rank], layout, self.rank)

    def _log_and_look_for_trouble(self) -> bool:
        """Posts the metrics since the last call; says, on all ranks alike, whether too many images are bad."""
        is_bad = False
        metrics = self.meter.reduce()
        if self.rank == 0:
            if self.plan.shards:
                metrics |= {f"pool/{name}": n for name, n in collect_counters(self.plan.shards).items()}
            num_bad = ray.get(self.plan.board.count_bad_files.remote())
            metrics["data/bad_files"] = num_bad
            self.plan.board.post_metrics.remote(self.state.step, metrics)
            is_bad = num_bad > self.job.data.max_bad_fraction * self.manifest.num_images
        return broadcast_from_rank_zero(is_bad)

    def _validate(self) -> None:
        metrics, measured = self.validator.measure(self.state.teacher)
        if measured:
            self.plan.board.post_measured.remote(self.state.step, measured)
        if self.rank != 0:
            return
        if metrics:
            self.plan.board.post_metrics.remote(self.state.step, metrics)
        picture = self.validator.picture(self.state.teacher, self.learner.colabator)
        self.plan.board.post_picture.remote(self.state.step, "restorations", picture)
