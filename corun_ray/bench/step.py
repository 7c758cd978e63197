"""Times training steps of CORUN, part by part, on synthetic images: no data, no weights, no cluster."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.profiler import profile

from corun_ray.bench.machine import Machine, Work, count_work, measure_machine, peak_memory, seconds
from corun_ray.core.networks.corun import CORUN
from corun_ray.core.scoring.coherence import Coherence
from corun_ray.core.timing import SpanTimes, synchronize
from corun_ray.core.training.acceleration import compile_network, keep_freed_memory
from corun_ray.core.training.labels import Label, ReadyLabels, Scores
from corun_ray.core.training.losses import COLABATOR_WEIGHTS, PRETRAIN_WEIGHTS, Losses, Vgg19Features
from corun_ray.core.training.state import TrainState
from corun_ray.core.training.steps import Colabator, RealBatch, StepOutput, SyntheticBatch, run_pretraining_step

WARM_UP = 2
LR, EMA = 5e-5, 0.999


@dataclass(frozen=True)
class StepSettings:
    """What is measured."""

    method: str = "colabator"
    size_px: int = 288
    batch: int = 1
    stages: int = 4
    width: int = 30
    precision: str = "fp32"
    """fp32, or bf16: the network's arithmetic, the closed-form steps aside."""
    compile: bool = False
    perceptual: bool = True
    """VGG-19, with random weights, in the losses."""
    win_rate: float = 0.1
    """Share of steps whose candidates win, so that their blocks are rated: what is left when the pool is warm."""
    checkpoint_activations: bool = False
    repeats: int = 10
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@dataclass(frozen=True)
class StepReport:
    """What was found out."""

    settings: StepSettings
    step_s: float
    """Median of whole steps, timed without looking into them."""
    parts_s: dict[str, float]
    """Mean seconds of every part, in the order in which they first ran; timed in steps of their own."""
    work: Work
    machine: Machine
    peak_bytes: int


def bench_step(settings: StepSettings, trace: Path | None = None) -> StepReport:
    """Runs steps on random images; with `trace`, writes a profiler's trace of one more, for chrome://tracing."""
    if settings.device.type == "cpu":  # as a worker does
        keep_freed_memory()
    run = _Run(settings)
    with peak_memory(settings.device) as peak:
        for _ in range(WARM_UP):
            run.step()
        whole = [seconds(run.step, settings.device) for _ in range(settings.repeats)]
        peak_bytes = peak()
    times = SpanTimes(settings.device)
    with times.listen():
        for _ in range(settings.repeats):
            run.step()
    if trace is not None:
        with profile() as profiler:
            run.step()
            synchronize(settings.device)
        profiler.export_chrome_trace(str(trace))
    parts = {name: total_s / settings.repeats for name, total_s in times.seconds.items()}
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    work = _Run(replace(settings, compile=False)).work()
    return StepReport(
        settings, statistics.median(whole), parts, work, measure_machine(settings.device, dtype), peak_bytes
    )


class _WarmPool:
    """Has a label for every image, which so many of the candidates beat, evenly spread, as the settings say."""

    def __init__(self, settings: StepSettings, block_px: int) -> None:
        self.win_rate = settings.win_rate
        self._size_px, self._blocks = settings.size_px, settings.size_px // block_px
        self._won = 0.0

    def prefetch(self, keys: Sequence[str]) -> ReadyLabels:
        """See `LabelPool`."""
        self._won += self.win_rate
        beaten, self._won = self._won >= 1, self._won % 1
        return ReadyLabels(self._label(key, -1.0 if beaten else 2.0) for key in keys)

    def offer(self, labels: Sequence[Label]) -> None:
        """See `LabelPool`; the next step finds the same labels."""

    def _label(self, key: str, score: float) -> Label:
        planes = np.full((4, self._size_px, self._size_px), 128, np.uint8)
        blocks = np.full((self._blocks, self._blocks), 0.5, np.float32)
        return Label(key, Scores(score, score), 0, planes[:3], planes[3:], blocks, blocks)


class _Run:
    """A training state and the same images at every step."""

    def __init__(self, settings: StepSettings) -> None:
        torch.manual_seed(0)
        self.settings = settings
        device = settings.device
        network = CORUN(settings.stages, settings.width, settings.checkpoint_activations)
        self.state = TrainState.start(network, device)
        student, teacher = self.state.student, self.state.teacher
        if settings.compile:
            student, teacher = compile_network(student), compile_network(teacher)
        self.student: nn.Module = student
        features = Vgg19Features().requires_grad_(False).eval().to(device) if settings.perceptual else None
        weights = COLABATOR_WEIGHTS if settings.method == "colabator" else PRETRAIN_WEIGHTS
        self.losses = Losses(weights, features)
        coherence = Coherence()  # the scorers without weights
        self.pool = _WarmPool(settings, coherence.block_px)
        self.colabator = Colabator(teacher, coherence, self.pool, self.losses)
        shape = (settings.batch, 3, settings.size_px, settings.size_px)
        self.synthetic = SyntheticBatch(torch.rand(shape, device=device), torch.rand(shape, device=device))
        keys = [str(number) for number in range(settings.batch)]
        self.real = RealBatch(torch.rand(shape, device=device), torch.rand(shape, device=device), keys)

    def step(self) -> None:
        """One whole training step."""
        settings = self.settings
        with torch.autocast(settings.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            output = self._forward()
        self.state.backward(output.losses)
        self.state.update(LR, EMA, settings.batch)

    def work(self) -> Work:
        """Of one eager step whose candidates lose."""
        self.pool.win_rate = 0
        self.step()
        return count_work(self.step)

    def _forward(self) -> StepOutput:
        if self.settings.method == "pretrain":
            return run_pretraining_step(self.student, self.synthetic, self.losses)
        return self.colabator.step(self.student, self.synthetic, self.real, self.state.step)
