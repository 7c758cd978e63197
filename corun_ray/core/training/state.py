"""The state that training changes: networks, optimizer, learning rate, and the position in the sample stream.

The learning rate follows SGDR (Loshchilov and Hutter, ICLR 2017): linear warm-up, then cosine with restarts. The
published recipe (arXiv 2406.07966) is one cycle without warm-up.
"""

import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from corun_ray.core.networks.finite import find_bad_weight
from corun_ray.core.timing import span
from corun_ray.core.training.divergence import Diverged, measure_gradient

BETAS = (0.9, 0.999)
WEIGHT_DECAY = 0.0

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""The tensors that AdamW keeps of a parameter, from its first gradient on."""

COMPUTATION_KEYS = ("params", "fused", "foreach")
"""Entries of AdamW's groups that belong to the optimizer at hand, whichever one saved the state."""


class Cycle(NamedTuple):
    """A half cosine from `lr` down to `min_lr` over `steps` (at least 1) steps; constant where both are equal."""

    steps: int
    lr: float
    min_lr: float


@dataclass
class TrainState:
    """The state of a run between two steps."""

    student: nn.Module
    teacher: nn.Module
    """The student's exponential moving average (EMA); validation and the registered model use it too."""
    optimizer: torch.optim.AdamW
    step: int = 0
    num_images_seen: int = 0
    """The position in the run's sample stream."""
    _losses: list[dict[str, Tensor]] = field(default_factory=list)
    """The losses whose gradients the next update takes."""

    @classmethod
    def start(cls, network: nn.Module, device: torch.device | str = "cpu") -> "TrainState":
        """Start training a network.

        The network becomes the student, and an equal copy becomes the teacher.
        """
        student = network.to(device).train()
        teacher = copy.deepcopy(student).requires_grad_(False).eval()

        # `update` sets the learning rate at every step. Fused: one pass over all parameters, not one an operation.
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
        return cls(student, teacher, optimizer)

    # --- Training ---

    def backward(self, losses: dict[str, Tensor], share: float = 1.0) -> None:
        """Add `share` of the losses' gradient for the next update, which checks them.

        Raises `ValueError` where there is no loss.
        """
        if not losses:
            raise ValueError("nothing to learn from: every loss has weight 0 or lacks the network it needs")
        with span("backward"):
            (share * sum(losses.values())).backward()  # type: ignore[union-attr]
        self._losses.append({name: loss.detach() for name, loss in losses.items()})

    def update(self, lr: float, ema: float, batch_images: int, clip_norm: float = 0.0) -> None:
        """Update the student by AdamW, and the teacher by EMA.

        `lr` is the learning rate, `ema` the decay of the moving average. `batch_images` is the number of images by
        which the stream's position moves on. A gradient whose norm is above `clip_norm` is scaled down to that norm; 0
        leaves gradients alone. The closed-form steps divide by small numbers, so single gradients can be very large.

        Raises `Diverged` for losses or gradients that are not finite; the state then stays as it was.
        """
        losses, self._losses = self._losses, []
        norm = measure_gradient(losses, self.student, self.step)
        if clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.student.parameters(), clip_norm, norm)

        for group in self.optimizer.param_groups:
            group["lr"] = lr

        with span("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        with span("ema"):
            update_ema(self.teacher, self.student, ema)

        self.step += 1
        self.num_images_seen += batch_images

    # --- Saving and restoring ---

    def refuse_bad_weights(self) -> None:
        """Check the weights of both networks, before they are saved.

        Raises `Diverged`.
        """
        for part, network in self._get_networks().items():
            bad_weight = find_bad_weight(network.state_dict(), network)
            if bad_weight is not None:
                raise Diverged(f"step {self.step}: the weight {part}.{bad_weight}, not finite")

    def collect_tensors(self) -> dict[str, Tensor]:
        """Collect every tensor of the state, without copies.

        The names are `student.NAME`, `teacher.NAME` and `optimizer.NAME.KEY`: AdamW's, with every KEY of `MOMENTS`
        for each parameter of the student that has had a gradient.
        """
        tensors = self._collect_network_tensors()
        for name, parameter in self.student.named_parameters():
            for key, tensor in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = tensor
        return tensors

    def collect_values(self) -> dict[str, Any]:
        """Collect the rest of the state as plain values.

        These are both counters, and AdamW's groups with their lr.
        """
        groups = []
        for group in self.optimizer.param_groups:
            groups.append({key: value for key, value in group.items() if key != "params"})
        return {"step": self.step, "num_images_seen": self.num_images_seen, "param_groups": groups}

    def list_expected_tensors(self, stored: Collection[str]) -> dict[str, Tensor]:
        """List the tensors that `restore` takes of a stored state.

        The tensors listed are examples of the shapes and dtypes. `stored` are the names of the stored tensors. They
        decide only which parameters have had a gradient: AdamW has all of `MOMENTS` for these parameters, and none for
        the others.
        """
        expected = self._collect_network_tensors()
        for name, parameter in self.student.named_parameters():
            # The step counter is one float32 number, and the averages are like the parameter.
            examples = dict.fromkeys(MOMENTS, parameter) | {"step": torch.tensor(0.0, dtype=torch.float32)}
            moments = {f"optimizer.{name}.{key}": example for key, example in examples.items()}

            if not moments.keys().isdisjoint(stored):
                expected |= moments
        return expected

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restore a state from copies of `collect_tensors` and `collect_values`.

        Both must be those of a state like this one, see `list_expected_tensors`.
        """
        # Both networks.
        for part, network in self._get_networks().items():
            network.load_state_dict({name: tensors[f"{part}.{name}"] for name in network.state_dict()})

        # AdamW's tensors, by the index of the parameter. They are copied, since AdamW keeps what it is given, and these
        # may be mapped from a file that is deleted later. The fused kernel counts on the parameter's memory layout.
        moments = {}
        for index, (name, parameter) in enumerate(self.student.named_parameters()):
            if f"optimizer.{name}.step" in tensors:
                step, *averages = (tensors[f"optimizer.{name}.{key}"] for key in MOMENTS)
                copies = [torch.empty_like(parameter).copy_(average) for average in averages]
                moments[index] = dict(zip(MOMENTS, [step.clone(), *copies], strict=True))

        # AdamW's groups. JSON has no tuples, so the betas come as a list.
        groups = []
        for stored, own in zip(values["param_groups"], self.optimizer.state_dict()["param_groups"], strict=True):
            group = {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}
            for key in COMPUTATION_KEYS:
                group[key] = own[key]
            groups.append(group)
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

        # The counters.
        self.step, self.num_images_seen = values["step"], values["num_images_seen"]

    def _get_networks(self) -> dict[str, nn.Module]:
        """Return both networks by the prefixes of their tensors."""
        return {"student": self.student, "teacher": self.teacher}

    def _collect_network_tensors(self) -> dict[str, Tensor]:
        """Collect the tensors of both networks, without copies."""
        tensors = {}
        for part, network in self._get_networks().items():
            for name, tensor in network.state_dict().items():
                tensors[f"{part}.{name}"] = tensor
        return tensors


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Update the teacher, the moving average of the student.

    For each parameter, `teacher = decay * teacher + (1 - decay) * student`. Buffers are copied: those that training
    changes (batch norm's statistics) are moving averages already.
    """
    targets = [parameter.data for parameter in teacher.parameters()]
    sources = [parameter.data for parameter in student.parameters()]
    torch._foreach_lerp_(targets, sources, 1 - decay)

    for target, source in zip(teacher.buffers(), student.buffers(), strict=True):
        target.copy_(source)


def compute_learning_rate(step: int, cycles: Sequence[Cycle], warmup_steps: int = 0) -> float:
    """Compute the learning rate of a step, which counts from 0.

    The cycles follow each other, and then the last one's `min_lr` stays. Warm-up is a factor on that schedule:
    `1 / warmup_steps` at step 0, rising by as much every step, and 1 from step `warmup_steps - 1` on. So warm-up moves
    no restart. Raises `ValueError` where there is no cycle.
    """
    if not cycles:
        raise ValueError("learning rate: at least one cycle expected")
    warmth = min((step + 1) / warmup_steps, 1.0) if warmup_steps else 1.0
    return warmth * _compute_cosine(step, cycles)


def _compute_cosine(step: int, cycles: Sequence[Cycle]) -> float:
    """Compute the learning rate of a step without warm-up."""
    # Find the cycle in which the step lies, and count the step from the start of that cycle.
    for steps, lr, min_lr in cycles:
        if step < steps:
            progress = step / steps
            return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        step -= steps
    return cycles[-1].min_lr
