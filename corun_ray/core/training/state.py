"""Everything that training changes, in one place: networks, optimizer, schedule and position in the stream."""

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from corun_ray.core.spans import span

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
            ema_step(self.teacher, self.student, ema)
        self.step += 1
        self.num_images_seen += batch_images

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state, not copied: `student.NAME`, `teacher.NAME` and `optimizer.NAME.KEY`.

        The last are AdamW's, with every KEY of `MOMENTS` for each of the student's parameters that has had a gradient.
        """
        moments = {
            f"optimizer.{name}.{key}": tensor
            for name, parameter in self.student.named_parameters()
            for key, tensor in self.optimizer.state.get(parameter, {}).items()
        }
        return self._network_tensors() | moments

    def values(self) -> dict[str, Any]:
        """Everything of the state that is no tensor, as plain values: both counters and AdamW's groups, lr included."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        return {"step": self.step, "num_images_seen": self.num_images_seen, "param_groups": groups}

    def wanted(self, stored: Collection[str]) -> dict[str, Tensor]:
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
def ema_step(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """`teacher = decay * teacher + (1 - decay) * student`, parameter by parameter.

    Buffers are copied: those that training changes (batch norm's statistics) are moving averages already.
    """
    targets = [parameter.data for parameter in teacher.parameters()]
    sources = [parameter.data for parameter in student.parameters()]
    torch._foreach_lerp_(targets, sources, 1 - decay)
    for target, source in zip(teacher.buffers(), student.buffers(), strict=True):
        target.copy_(source)
