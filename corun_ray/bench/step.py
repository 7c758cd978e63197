"""Time training steps of CORUN, part by part, on random images: no data, no weights, no cluster."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.profiler import profile

from corun_ray.bench.machine import (
    Machine,
    Work,
    choose_device,
    count_work,
    measure_machine,
    time_call,
    track_peak_memory,
)
from corun_ray.core.networks.corun import CORUN
from corun_ray.core.scoring.coherence import Coherence
from corun_ray.core.timing import SpanTimes, synchronize
from corun_ray.core.training.acceleration import compile_network, keep_freed_memory, try_compiling
from corun_ray.core.training.labels import Label, ReadyLabels, Scores
from corun_ray.core.training.losses import COLABATOR_WEIGHTS, PRETRAIN_WEIGHTS, Losses, Vgg19Features
from corun_ray.core.training.state import TrainState
from corun_ray.core.training.steps import Colabator, RealBatch, StepOutput, SyntheticBatch, run_pretraining_step

WARM_UP_STEPS = 2
LEARNING_RATE = 5e-5
EMA_DECAY = 0.999
GREY = 128
"""Value of every byte of a stored label."""
LOSING_SCORE, WINNING_SCORE = -1.0, 2.0
"""Global scores of stored labels outside [0, 1]: every candidate beats the first and none beats the second."""


@dataclass(frozen=True)
class StepSettings:
    """The method, the network, the images and the device of a measurement."""

    method: str = "colabator"
    size_px: int = 288
    batch: int = 1
    stages: int = 4
    width: int = 30
    precision: str = "fp32"
    """fp32, or bf16: the network's arithmetic, apart from the closed-form steps."""
    compile: bool = False
    perceptual: bool = True
    """Whether the losses include VGG-19, here with random weights."""
    win_rate: float = 0.1
    """Share of steps whose candidates win, so that their blocks are rated. The default is that of a warm label pool."""
    checkpoint_activations: bool = False
    repeats: int = 10
    device: torch.device = field(default_factory=choose_device)


@dataclass(frozen=True)
class StepReport:
    """The results of a measurement."""

    settings: StepSettings
    step_s: float
    """Median of whole steps, timed without timing their parts."""
    parts_s: dict[str, float]
    """Mean seconds of each part, in the order of their first run; timed in steps of their own."""
    work: Work
    machine: Machine
    peak_bytes: int


def bench_step(settings: StepSettings, trace: Path | None = None) -> StepReport:
    """Measure training steps on random images.

    With `trace`, also write a profiler's trace of one more step, for chrome://tracing.

    Raises `CannotCompile`.
    """
    if settings.compile:
        try_compiling(settings.device, "--compile")

    # As a training worker does on a CPU.
    if settings.device.type == "cpu":
        keep_freed_memory()

    # Whole steps first: timing the parts waits for the device and slows a step down.
    runner = _StepRunner(settings)
    with track_peak_memory(settings.device) as read_peak_bytes:
        for _ in range(WARM_UP_STEPS):
            runner.run_step()
        whole_s = [time_call(runner.run_step, settings.device) for _ in range(settings.repeats)]
        peak_bytes = read_peak_bytes()

    # The parts, in further steps.
    times = SpanTimes(settings.device)
    with times.listen():
        for _ in range(settings.repeats):
            runner.run_step()
    parts_s = {name: total_s / settings.repeats for name, total_s in times.seconds.items()}

    # One more step for the profiler.
    if trace is not None:
        with profile() as profiler:
            runner.run_step()
            synchronize(settings.device)
        profiler.export_chrome_trace(str(trace))

    # Operations can only be counted in eager code: a second runner that is not compiled.
    work = _StepRunner(replace(settings, compile=False)).count_work()
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    machine = measure_machine(settings.device, dtype)
    return StepReport(settings, statistics.median(whole_s), parts_s, work, machine, peak_bytes)


class _WarmPool:
    """A `LabelPool` with a label for every image; a share of the steps, evenly spread, has winning candidates."""

    def __init__(self, settings: StepSettings, block_px: int) -> None:
        self.win_rate = settings.win_rate
        self._size_px = settings.size_px
        self._blocks = settings.size_px // block_px
        self._due_wins = 0.0
        """Wins that are due at the given rate, less those that there were."""

    def prefetch(self, keys: Sequence[str]) -> ReadyLabels:
        """Return a label for each key.

        The labels lose to the candidates where a win is due; otherwise they win.
        """
        # A win is due whenever the sum of the rates passes a whole number.
        self._due_wins += self.win_rate
        is_win_due = self._due_wins >= 1
        self._due_wins %= 1

        score = LOSING_SCORE if is_win_due else WINNING_SCORE
        return ReadyLabels([self._make_label(key, score) for key in keys])

    def offer(self, labels: Sequence[Label]) -> None:
        """Ignore the labels: the next step finds the same ones again."""

    def _make_label(self, key: str, score: float) -> Label:
        """Return a grey label with the given global scores."""
        planes = np.full((4, self._size_px, self._size_px), GREY, np.uint8)
        blocks = np.full((self._blocks, self._blocks), 0.5, np.float32)
        return Label(key, Scores(score, score), 0, planes[:3], planes[3:], blocks, blocks)


class _StepRunner:
    """A training state that takes steps on the same random images."""

    def __init__(self, settings: StepSettings) -> None:
        torch.manual_seed(0)
        self.settings = settings
        device = settings.device

        # Student and teacher.
        network = CORUN(settings.stages, settings.width, settings.checkpoint_activations)
        self.state = TrainState.start(network, device)
        student, teacher = self.state.student, self.state.teacher
        if settings.compile:
            student, teacher = compile_network(student), compile_network(teacher)
        self.student: nn.Module = student

        # Losses, with a VGG-19 of random weights: its time does not depend on them.
        features = None
        if settings.perceptual:
            features = Vgg19Features().requires_grad_(False).eval().to(device)
        weights = COLABATOR_WEIGHTS if settings.method == "colabator" else PRETRAIN_WEIGHTS
        self.losses = Losses(weights, features)

        # The coherence of candidates, by the scorers that need no weights.
        coherence = Coherence()
        self.pool = _WarmPool(settings, coherence.block_px)
        self.colabator = Colabator(teacher, coherence, self.pool, self.losses)

        # B 3 H W: hazy and clear images, then weak and strong views of real hazy images.
        shape = (settings.batch, 3, settings.size_px, settings.size_px)
        self.synthetic = SyntheticBatch(torch.rand(shape, device=device), torch.rand(shape, device=device))
        keys = [str(number) for number in range(settings.batch)]
        self.real = RealBatch(torch.rand(shape, device=device), torch.rand(shape, device=device), keys)

    def run_step(self) -> None:
        """Run one whole training step."""
        settings = self.settings
        with torch.autocast(settings.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            output = self._run_forward()
        self.state.backward(output.losses)
        self.state.update(LEARNING_RATE, EMA_DECAY, settings.batch)

    def count_work(self) -> Work:
        """Count the work of one eager step whose candidates lose."""
        self.pool.win_rate = 0

        # The first step creates the optimizer's state, which later steps do not.
        self.run_step()
        return count_work(self.run_step)

    def _run_forward(self) -> StepOutput:
        """Run the forward part of a step."""
        if self.settings.method == "pretrain":
            return run_pretraining_step(self.student, self.synthetic, self.losses)
        return self.colabator.step(self.student, self.synthetic, self.real, self.state.step)
