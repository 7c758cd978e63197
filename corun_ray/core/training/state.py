"""Everything that training changes, in one place: networks, optimizer, schedule and position in the stream.

The learning rate of every step: linear warm-up, then cosine with restarts.

Source: Loshchilov and Hutter, SGDR, ICLR 2017. The published recipe is one cycle without warm-up (arXiv 2406.07966)."""

import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from corun_ray.core.timing import span

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter from its first gradient on."""


@dataclass
class TrainState:
    """The state of a run between two steps."""

    student: nn.Module
    teacher: nn.Module
    """The student's exponential moving average; also what validation and the registered model use."""
    optimizer: torch.optim.AdamW
    step: int = 0
    num_images_seen: int = 0
    """The position in the run's sample stream."""

    @classmethod
    def start(cls, network: nn.Module, device: torch.device | str = "cpu") -> "TrainState":
        """A fresh state around `network` (any that can be copied), its teacher an equal copy."""
        student = network.to(device).train()
        teacher = copy.deepcopy(student).requires_grad_(False).eval()
        # lr is set at every step by the schedule. Fused: one pass over all parameters, not one for each operation.
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
        return cls(student, teacher, optimizer)

    def backward(self, losses: dict[str, Tensor], share: float = 1.0) -> None:
        """Adds `share` of the gradient of the losses' sum to those that the next update will use.

        Raises `ValueError` where there is no loss.
        """
        if not losses:
            raise ValueError("nothing to learn from: every loss has weight 0 or lacks the network it needs")
        with span("backward"):
            (share * sum(losses.values())).backward()  # type: ignore[union-attr]

    def update(self, lr: float, ema: float, batch_images: int) -> None:
        """One AdamW step at `lr`, one EMA step of decay `ema`; counts `batch_images` of the stream."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with span("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        with span("ema"):
            update_ema(self.teacher, self.student, ema)
        self.step += 1
        self.num_images_seen += batch_images

    def collect_tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, not copied: `student.NAME`, `teacher.NAME` and `optimizer.NAME.KEY`.

        The last are AdamW's, with every KEY of `MOMENTS` for each of the student's parameters that has had a gradient.
        """
        moments = {
            f"optimizer.{name}.{key}": tensor
            for name, parameter in self.student.named_parameters()
            for key, tensor in self.optimizer.state.get(parameter, {}).items()
        }
        return self._network_tensors() | moments

    def collect_values(self) -> dict[str, Any]:
        """Everything of the state that is no tensor, as plain values: both counters and AdamW's groups, lr included."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        return {"step": self.step, "num_images_seen": self.num_images_seen, "param_groups": groups}

    def list_expected_tensors(self, stored: Collection[str]) -> dict[str, Tensor]:
        """What `restore` takes of a state stored under these names: tensors of the right shapes and dtypes.

        The names decide only which parameters have had a gradient: AdamW has all of `MOMENTS` for them, else none.
        """
        wanted = self._network_tensors()
        for name, parameter in self.student.named_parameters():
            like = dict.fromkeys(MOMENTS, parameter) | {"step": torch.tensor(0.0, dtype=torch.float32)}
            moments = {f"optimizer.{name}.{key}": tensor for key, tensor in like.items()}
            if not moments.keys().isdisjoint(stored):
                wanted |= moments
        return wanted

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """The inverse of `tensors` and `values`, which must be those of a state like this one; all are copied."""
        for part, network in self._networks().items():
            network.load_state_dict({name: tensors[f"{part}.{name}"] for name in network.state_dict()})
        moments = {}
        for index, (name, parameter) in enumerate(self.student.named_parameters()):
            if f"optimizer.{name}.step" in tensors:
                # Copies, since AdamW keeps what it is given and these may be mapped from a file that goes away; laid
                # out in memory as the parameter is, since the fused kernel counts on that.
                step, *averages = (tensors[f"optimizer.{name}.{key}"] for key in MOMENTS)
                copies = [torch.empty_like(parameter).copy_(average) for average in averages]
                moments[index] = dict(zip(MOMENTS, [step.clone(), *copies], strict=True))
        groups = [
            # JSON has no tuples, which betas are. How a step is computed is this optimizer's, whoever saved the state.
            {k: tuple(v) if isinstance(v, list) else v for k, v in group.items()}
            | {key: own[key] for key in ("params", "fused", "foreach")}
            for group, own in zip(values["param_groups"], self.optimizer.state_dict()["param_groups"], strict=True)
        ]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.step, self.num_images_seen = values["step"], values["num_images_seen"]

    def _networks(self) -> dict[str, nn.Module]:
        return {"student": self.student, "teacher": self.teacher}

    def _network_tensors(self) -> dict[str, Tensor]:
        return {
            f"{part}.{name}": tensor
            for part, network in self._networks().items()
            for name, tensor in network.state_dict().items()
        }


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """`teacher = decay * teacher + (1 - decay) * student`, parameter by parameter.

    Buffers are copied: those that training changes (batch norm's statistics) are moving averages already.
    """
    targets = [parameter.data for parameter in teacher.parameters()]
    sources = [parameter.data for parameter in student.parameters()]
    torch._foreach_lerp_(targets, sources, 1 - decay)
    for target, source in zip(teacher.buffers(), student.buffers(), strict=True):
        target.copy_(source)


class Cycle(NamedTuple):
    """A fall by half a cosine from `lr` to `min_lr` over `steps` (at least 1) steps; constant where both are equal."""

    steps: int
    lr: float
    min_lr: float


def compute_learning_rate(step: int, cycles: Sequence[Cycle], warmup_steps: int = 0) -> float:
    """The learning rate of 0-based `step`: the cycles one after the other, then the last one's `min_lr`.

    Warm-up is a factor on that schedule: 1 / `warmup_steps` at step 0, rising by as much every step until it is 1 at
    step `warmup_steps` - 1. So it moves no restart. Raises `ValueError` where there is no cycle.
    """
    if not cycles:
        raise ValueError("learning rate: at least one cycle expected")
    warmth = min((step + 1) / warmup_steps, 1.0) if warmup_steps else 1.0
    return warmth * _cosine(step, cycles)


def _cosine(step: int, cycles: Sequence[Cycle]) -> float:
    for steps, lr, min_lr in cycles:
        if step < steps:
            progress = step / steps
            return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        step -= steps
    return cycles[-1].min_lr
