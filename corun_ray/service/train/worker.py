"""One training worker: the loop over the stream, and the work that is due every so many steps."""

import math
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import ray
import ray.train
import ray.train.torch
import torch
from ray.data import DataIterator
from ray.train import Checkpoint
from ray.train.collective import broadcast_from_rank_zero
from torch import nn

from corun_ray.config.jobs import ColabatorJob
from corun_ray.config.training import OptimSection
from corun_ray.core.networks.corun import CORUN
from corun_ray.core.networks.finite import NotFinite
from corun_ray.core.scoring.arithmetic import CudaCapture
from corun_ray.core.training import checkpoints
from corun_ray.core.training.acceleration import keep_freed_memory, try_compiling
from corun_ray.core.training.precision import PrecisionChoice
from corun_ray.core.training.state import Cycle, TrainState, compute_learning_rate
from corun_ray.core.training.streams import Columns, copy_ahead, open_stream
from corun_ray.service.data.manifest import Manifest
from corun_ray.service.data.sample_maker import Batch
from corun_ray.service.data.stream import (
    BlockLayout,
    StreamPhase,
    StreamTask,
    iterate_batches,
    plan_remaining_phases,
    split_stream,
)
from corun_ray.service.models.sources import Model
from corun_ray.service.pool.client import PoolClient
from corun_ray.service.pool.keeper import PoolKeeper, collect_counters
from corun_ray.service.start_times import note_phase, take_phases, timing_phase
from corun_ray.service.storage import locate
from corun_ray.service.telemetry.logs import Log
from corun_ray.service.train.board import Attempt
from corun_ray.service.train.checkpointing import Checkpointer, PreemptionWatch
from corun_ray.service.train.coherence import (
    SharedCoherence,
    TimedCoherence,
    build_coherence,
    build_losses,
    replay_scorers,
)
from corun_ray.service.train.controller import LastingFailure
from corun_ray.service.train.failures import can_restart_help, describe_cause
from corun_ray.service.train.learner import Learner
from corun_ray.service.train.meter import Meter, WorkerTelemetry
from corun_ray.service.train.plan import WorkerPlan
from corun_ray.service.train.precision import agree_on_precision
from corun_ray.service.train.validation import Validator
from corun_ray.service.weights.needed import open_weights


def train_worker(plan: WorkerPlan) -> None:
    """Train to the job's last step, in a worker of Ray Train."""
    rank, worker = ray.train.get_context().get_world_rank(), None
    log = Log("worker", plan.labels, rank=rank)
    try:
        with timing_phase("worker: network, label pool, scorers, losses"):
            worker = Worker(plan, log)
        worker.train()
    except Exception as error:
        # Report the cause before Ray Train ends the process.
        step = None if worker is None else worker.state.step
        log.error("worker failed", step=step)
        if isinstance(error, NotFinite):
            error.add_note(f"(after step {step})")
        cause = describe_cause(error)
        ray.get(plan.board.post_error.remote(rank, cause, traceback.format_exc()))

        # Tell Ray Train where a restart is of no use.
        if not can_restart_help(error):
            raise LastingFailure(cause) from None
        raise


def list_learning_cycles(optim: OptimSection) -> list[Cycle]:
    """List the cosine cycles of a job: those of `optim.cycles`, else one."""
    if optim.cycles:
        return [Cycle(cycle.steps, cycle.lr, cycle.min_lr) for cycle in optim.cycles]
    return [Cycle(optim.schedule_steps, optim.lr, optim.min_lr)]


class Worker:
    """One rank of the training: its state, and its part in the work that all ranks do together."""

    def __init__(self, plan: WorkerPlan, log: Log) -> None:
        context = ray.train.get_context()
        self.plan, self.job, self.log = plan, plan.job, log
        self.rank, self.num_workers = context.get_world_rank(), context.get_world_size()
        self.device = self._prepare_device()
        self.precision = self._prepare_arithmetic()
        self.manifest: Manifest = ray.get(plan.manifest)
        self.model: Model = ray.get(plan.model)

        # The network. A network without parameters to start from draws them, alike on every rank.
        torch.manual_seed(self.job.seed)
        self.state = TrainState.start(self._build_network(), self.device)

        # The last checkpoint: first the state, then the label pool's snapshot that belongs to it.
        self.keeper = PoolKeeper(plan.shards, locate(plan.pool_uri)) if plan.shards and self.rank == 0 else None
        snapshot = self._restore_state()

        # The stream's coordinator takes seconds to start, as what follows does.
        self.phases = plan_remaining_phases(self.job, self.state.step, self.state.num_images_seen, self.num_workers)
        self.early_stream = self._split_stream(*self.phases[0]) if self.phases else None
        self.pool = self._restore_pool(snapshot)
        run, spec = locate(plan.run_uri), self.model.spec
        best = self.job.train.best
        lease = None if plan.lease_uri is None else locate(plan.lease_uri)
        self.checkpointer = Checkpointer(run, self.state, spec, self.job.seed, self.rank, plan.board, log, best, lease)
        if self.rank == 0:
            self.checkpointer.discard_later()

        # The method.
        self.coherence = self._build_coherence()
        losses = build_losses(self.job, open_weights(self.job.loss.weights), self.coherence, self.device)
        self.learner = Learner(
            self.job, self.state, losses, self.coherence, self.pool, self.rank, self.device, self.precision
        )
        self.cycles = list_learning_cycles(self.job.optim)

        # What is watched along the way.
        self.meter = Meter(self.device)
        self.telemetry = WorkerTelemetry(plan.labels, self.rank, self.device, self.pool, self.coherence)
        self.validator = Validator(self.job, self.manifest, self.rank, self.num_workers, self.device)
        self.preemption = PreemptionWatch(self.rank, plan.board, log)
        self.first_step_since_s: float | None = None
        """When the first step began; None before it, and after it was posted."""

    def train(self) -> None:
        """Train on this rank's batches, one optimizer step each."""
        job, state = self.job, self.state
        self.log.info("worker started", step=state.step, workers=self.num_workers, device=str(self.device))

        # On a GPU, a batch is copied while the step before runs.
        batches = copy_ahead(self._stream(), open_stream(self.device))
        for batch in self.telemetry.watch(self._note_first_batch(batches)):
            # Add up the gradients of the batch's parts, then update student and teacher.
            for output in self.learner.learn(batch):
                self.meter.add(output)
            lr = compute_learning_rate(state.step, self.cycles, job.optim.warmup_steps)
            state.update(lr, job.optim.ema, len(batch["index"]) * self.num_workers, job.optim.clip_norm)

            # Report progress. The driver fails the job for too many bad images; there is no use in going further.
            self.meter.end_step(lr)
            if self.rank == 0:
                self._post_step()
            if self._is_due(job.train.log_every):
                num_bad_files = self._post_metrics()
                if num_bad_files > job.data.max_bad_fraction * self.manifest.num_images:
                    return

            # Measure the teacher on the validation sets.
            scores: dict[str, float] = {}
            if self._is_due(job.train.validate_every):
                with self.telemetry.pause("validation"):
                    scores = self._validate()

            # Save, in time before nodes are taken away. The best checkpoint can be any that was measured.
            may_be_best = job.train.best in scores
            if may_be_best or self._is_due(job.train.checkpoint_every) or self.preemption.is_due(state.step):
                with self.telemetry.pause("checkpoint"):
                    self.checkpointer.save(self.pool, self.keeper, scores)

        self.log.info("worker finished", step=state.step)

    # --- Before the loop ---

    def _prepare_device(self) -> torch.device:
        """Return this worker's device; set torch up for a CPU."""
        device = ray.train.torch.get_device()
        if device.type == "cpu":
            keep_freed_memory()
            torch.set_num_threads(max(1, int(self.job.cluster.cpus_per_worker)))
        return device

    def _prepare_arithmetic(self) -> PrecisionChoice:
        """Agree with the other workers on the precision; refuse a compilation that is not to be had.

        Raises `CannotCompile`.
        """
        choice, warning = agree_on_precision(self.job.optim.precision, self.device)
        if warning is not None and self.rank == 0:
            self.plan.board.post_note.remote(warning)
        if self.job.optim.compile:
            try_compiling(self.device, "optim.compile")
        return choice

    def _build_network(self) -> nn.Module:
        """Build the network to start from."""
        network = self.model.build()
        if isinstance(network, CORUN):
            network.checkpoint_activations = self.job.network.checkpoint_activations
        return network

    def _restore_state(self) -> str | None:
        """Restore the last checkpoint's state; return its pool snapshot, if any."""
        # Ray Train's own checkpoint comes first. After a restart of Ray Train, the driver may have found one.
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None and self.plan.start_from is not None:
            place = locate(self.plan.start_from)
            checkpoint = Checkpoint(place.path, place.filesystem)
        if checkpoint is None:
            return None

        with checkpoint.as_directory() as folder:
            try:
                return checkpoints.load_run(Path(folder), self.state, self.model.spec)["pool_snapshot"]
            except checkpoints.CheckpointError as error:
                # A checkpoint of an object store is read from a copy, whose name says nothing.
                raise type(error)(str(error).replace(folder, checkpoint.path)) from None

    def _restore_pool(self, snapshot: str | None) -> PoolClient | None:
        """Restore the label pool to a snapshot, and connect to it.

        Rank 0 restores. None for a job without a pool.
        """
        if not self.plan.shards:
            return None
        generation = None
        if self.keeper is not None:
            generation = self.keeper.restore(snapshot)
            if self.keeper.num_rejected:
                text = f"labels rejected in review left the pool: {self.keeper.num_rejected}"
                self.plan.board.post_note.remote(text)
        return PoolClient(self.plan.shards, broadcast_from_rank_zero(generation))

    def _build_coherence(self) -> TimedCoherence | None:
        """Build the scorers of a Colabator job; None for other jobs.

        Raises `CannotCapture`.
        """
        if not isinstance(self.job, ColabatorJob):
            return None

        section = self.job.coherence
        coherence = build_coherence(section, open_weights(section.weights), self.device)
        if "graphs" in section.gpu:
            shape = (self.job.train.batch_per_worker, 3, self.job.data.patch_px, self.job.data.patch_px)
            replay_scorers(coherence, torch.rand(shape, device=self.device), CudaCapture(self.device))
        if section.share_blocks and self.num_workers > 1:
            coherence = SharedCoherence(coherence)
        return TimedCoherence(coherence, self.device)

    # --- In the loop ---

    def _stream(self) -> Iterator[Batch]:
        """Yield this rank's batches to the end of the run."""
        state, plan = self.state, self.plan
        if self.rank == 0:
            attempt = Attempt(state.step, state.num_images_seen, self.num_workers, str(self.precision))
            plan.board.post_attempt.remote(attempt)

        # Rank 0 hands every rank its iterator of a phase.
        iterators = self.early_stream
        for number, (phase, layout) in enumerate(self.phases):
            if number > 0:
                iterators = self._split_stream(phase, layout)
            yield from iterate_batches(broadcast_from_rank_zero(iterators)[self.rank], layout, self.rank)

    def _split_stream(self, phase: StreamPhase, layout: BlockLayout) -> list[DataIterator] | None:
        """Start the coordinator of a phase's stream, by rank 0; return one iterator per rank, None on other ranks.

        Samples are made once somebody asks for them.
        """
        if self.rank != 0:
            return None
        plan = self.plan
        return split_stream(
            StreamTask(plan.job, plan.manifest, plan.board, layout, phase.patch_px, plan.labels, plan.cache)
        )

    def _note_first_batch(self, batches: Iterator[Columns]) -> Iterator[Columns]:
        """Yield the batches; note how long the first is in coming."""
        since_s, is_first = time.time(), True
        for batch in batches:
            if is_first:
                note_phase("worker: first batch", since_s)
                self.first_step_since_s, is_first = time.time(), False
            yield batch

    def _post_step(self) -> None:
        """Post the number of steps, with the first one also what the start took."""
        if self.first_step_since_s is not None:
            note_phase("worker: first step", self.first_step_since_s)
            self.first_step_since_s = None
            self.plan.board.post_start.remote(take_phases())
        self.plan.board.post_step.remote(self.state.step)

    def _is_due(self, every: int) -> bool:
        """Tell whether work of every so many steps is due.

        After the last step, all work is due.
        """
        return self.state.step % every == 0 or self.state.step == self.job.train.steps

    def _post_metrics(self) -> int:
        """Report the means since the last call; return the number of bad files.

        All ranks return the same number.
        """
        metrics, num_bad_files = self.meter.reduce(), 0
        if self.rank == 0:
            if self.plan.shards:
                for name, value in collect_counters(self.plan.shards).items():
                    metrics[f"pool/{name}"] = value
            num_bad_files = ray.get(self.plan.board.count_bad_files.remote())
            metrics["data/bad_files"] = num_bad_files
            self.plan.board.post_metrics.remote(self.state.step, metrics)

        # All ranks must stop at the same step, so all decide on the same number.
        return broadcast_from_rank_zero(num_bad_files)

    def _validate(self) -> dict[str, float]:
        """Measure the teacher, and post values and pictures; return the finite means, alike on every rank."""
        board, step = self.plan.board, self.state.step

        # Every rank measures its share of the images; the metrics are means over all.
        result = self.validator.measure(self.state.teacher)
        for note in result.own_notes:
            board.post_note.remote(note)
        if result.measured:
            board.post_measured.remote(step, result.measured)

        if self.rank == 0:
            if result.metrics:
                board.post_metrics.remote(step, result.metrics)
            for note in result.notes:
                board.post_note.remote(f"step {step}: {note}")
            picture = self.validator.draw_picture(self.state.teacher, self.learner.colabator)
            board.post_picture.remote(step, "restorations", picture)
        return {name: mean for name, mean in result.metrics.items() if math.isfinite(mean)}
