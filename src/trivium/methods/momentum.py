"""A second set of weights that follows those that are trained, an exponential moving average, and what it teaches."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Self, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def follower(module: Module) -> Module:
    """A copy that starts with the same weights, and wants no gradient."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, momentum: float) -> None:
    """average <- momentum x average + (1 - momentum) x module, for every parameter; buffers stay as they are.

    All tensors in one call, not one after the other.
    """
    averages, others = ([parameter.detach() for parameter in each.parameters()] for each in (average, module))
    torch._foreach_lerp_(averages, others, 1 - momentum)


@dataclass(frozen=True)
class Teaching:
    """How a momentum copy follows, and when it begins to teach. The defaults are ALBEF's but for its dropout."""

    ramp: float | None = None  # steps over which its share rises from 0; below 1: share of the run; None: one epoch
    reach: float = 200.0  # steps that it looks back on: momentum 1 - 1 / reach, here 0.995; below 1: share of the run
    dropout: bool = False  # True: the teacher has the student's dropout, as in the public code
    ramp_samples: int | None = None  # the ramp in samples, which is the same at any batch; None: as `ramp` says

    def in_steps(self, batch: int) -> Self:
        """The same with its ramp in steps of so many samples."""
        if self.ramp_samples is None:
            return self
        steps = -(-self.ramp_samples // batch)  # whole ones: below 1 it were a share of the run
        return replace(self, ramp=float(steps), ramp_samples=None)

    def ramp_at(self, step: int, num_steps: int, epoch_steps: int) -> float:
        """What its share is multiplied by at a step."""
        assert self.ramp_samples is None, "see in_steps"
        ramp = epoch_steps if self.ramp is None else self.ramp * (num_steps if self.ramp < 1 else 1)
        return min(1.0, step / ramp) if ramp else 1.0

    def momentum(self, num_steps: int) -> float:
        return 1 - 1 / max(1.0, self.reach * (num_steps if self.reach < 1 else 1))


@dataclass(frozen=True)
class SoftTargets(Teaching):
    """Momentum distillation of one loss (ALBEF, section 3.4): targets are alpha q + (1 - alpha) y, q what the copy
    says."""

    alpha: float = 0.0  # its share in the targets, after the ramp; 0: there is no copy. As published: 0.4


class Teacher(nn.Module):
    """The momentum copy of a student that is fine-tuned, and its share in the targets.

    Whoever holds one calls `schedule` before a step, reads `alpha` and runs `copy` in it, and calls `follow` after it.

    Args:
        num_steps, epoch_steps: of the whole run and of one epoch, which the schedules are shares of.
    """

    def __init__(self, student: nn.Module, targets: SoftTargets, num_steps: int, epoch_steps: int) -> None:
        super().__init__()
        self.copy = follower(student)
        self.targets = targets
        self.num_steps, self.epoch_steps = num_steps, epoch_steps
        self.schedule(0)

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and self.targets.dropout)

    def schedule(self, step: int) -> None:
        self.alpha = self.targets.alpha * self.targets.ramp_at(step, self.num_steps, self.epoch_steps)

    def follow(self, student: nn.Module) -> None:
        """Once per accepted step."""
        follow(self.copy, student, self.targets.momentum(self.num_steps))
