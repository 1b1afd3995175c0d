"""A second set of weights that follows those that are trained: an exponential moving average."""

from __future__ import annotations

import copy
from typing import TypeVar

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
