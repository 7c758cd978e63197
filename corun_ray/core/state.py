"""Everything that training changes, in one place: networks, optimizer, schedule and position in the stream."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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
        # lr is set at every step by the schedule.
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, betas=(0.9, 0.999), weight_decay=0.0)
        return cls(student, teacher, optimizer)

    def update(self, losses: dict[str, Tensor], lr: float, ema: float, batch_images: int) -> None:
        """Backward, one AdamW step at `lr`, one EMA step of decay `ema`; counts `batch_images` of the stream.

        Raises `ValueError` where there is no loss.
        """
        if not losses:
            raise ValueError("nothing to learn from: every loss has weight 0 or lacks the network it needs")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()  # type: ignore[union-attr]
        self.optimizer.step()
        ema_step(self.teacher, self.student, ema)
        self.step += 1
        self.num_images_seen += batch_images

    def training_record(self) -> dict[str, Any]:
        """What a checkpoint needs beside the networks: tensors and plain values only, so that it loads as data."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "num_images_seen": self.num_images_seen,
        }

    def restore(self, params: dict[str, Tensor], params_ema: dict[str, Tensor], record: dict[str, Any]) -> None:
        """The inverse of saving: see `checkpoints`."""
        self.student.load_state_dict(params)
        self.teacher.load_state_dict(params_ema)
        self.optimizer.load_state_dict(record["optimizer"])
        self.step, self.num_images_seen = record["step"], record["num_images_seen"]


@torch.no_grad()
def ema_step(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """`teacher = decay * teacher + (1 - decay) * student`, parameter by parameter.

    Buffers are copied: those that training changes (batch norm's statistics) are moving averages already.
    """
    targets = [parameter.data for parameter in teacher.parameters()]
    sources = [parameter.data for parameter in student.parameters()]
    torch._foreach_lerp_(targets, sources, 1 - decay)
    for target, source in zip(teacher.buffers(), student.buffers(), strict=True):
        target.copy_(source)
