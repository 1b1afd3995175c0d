"""A method in parts over all processes (FSDP2; Zhao et al. 2023), for sizes whose weights, gradients and optimizer
state do not fit one device together.

What a step asks of a method stays the same. Each block is gathered when it runs and let go afterwards; everything else
of the method is gathered from the first call of a micro-batch to the end of its backward pass. Gradients are summed,
never averaged, while they are scattered.

Checkpoints and evaluation know nothing of parts: the whole method and its optimizer stay in the main memory of the
first process, and `gather` brings them up to date.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from trivium.train import distributed, optim
from trivium.train.optim import Optim
from trivium.train.protocol import Method


class Trained:
    """The method and the optimizer that take the steps of a run."""

    def __init__(self, method: Method, optimizer: torch.optim.Optimizer) -> None:
        self.method, self.optimizer = method, optimizer

    def gather(self) -> None:
        """Bring what is saved and evaluated up to date. All processes call it."""


class Sharded(Trained):
    """The parts of both that this process holds.

    Args:
        whole: on CPU, the same on all processes; only the first keeps it.
        whole_optimizer: of it, with the state to go on from.
        blocks: modules in it that are gathered one by one.
    """

    def __init__(
        self,
        whole: Method,
        whole_optimizer: torch.optim.Optimizer,
        settings: Optim,
        blocks: Sequence[nn.Module],
        device: torch.device,
    ) -> None:
        self._whole, self._whole_optimizer = whole, whole_optimizer
        method = shard(*copy.deepcopy((whole, blocks)), device)
        super().__init__(method, optim.build(method, settings))
        optim.load_state_by_name(self.optimizer, method, optim.state_by_name(whole_optimizer, whole))
        if distributed.rank() > 0:
            whole.to("meta")
            whole_optimizer.state.clear()

    @torch.no_grad()
    def gather(self) -> None:
        whole = self._whole.state_dict()
        for name, part in self.method.state_dict().items():
            value = distributed.whole(part)
            if distributed.rank() == 0:
                whole[name].copy_(value)
        parts = optim.state_by_name(self.optimizer, self.method)
        state = {name: distributed.whole(part) for name, part in parts.items()}
        if distributed.rank() == 0:
            optim.load_state_by_name(self._whole_optimizer, self._whole, state)
            for mine, group in zip(self._whole_optimizer.param_groups, self.optimizer.param_groups, strict=True):
                mine |= {name: value for name, value in group.items() if name != "params"}


def shard(method: Method, blocks: Sequence[nn.Module], device: torch.device) -> Method:
    """Cut a method in place: each process keeps its part of every parameter, along the first dimension."""
    mesh = init_device_mesh(device.type, (distributed.world(),))
    for block in blocks:
        # What shares a tensor with something outside, or is used outside of its forward, stays with the rest.
        entered_apart = any(getattr(module, "entered_apart", False) for module in block.modules())
        if not entered_apart and not _is_tied(block, method):
            fully_shard(block, mesh=mesh)
    fully_shard(method, mesh=mesh, reshard_after_forward=False)
    for module in method.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    method.to(device)  # buffers
    _enter_through_forward(method)
    return method


def let_go(method: Method) -> None:
    """Of what was gathered, after a forward that no backward pass follows."""
    for module in method.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _is_tied(module: nn.Module, method: nn.Module) -> bool:
    uses = Counter(parameter for _, parameter in method.named_parameters(remove_duplicate=False))
    inside = Counter(parameter for _, parameter in module.named_parameters(remove_duplicate=False))
    return any(uses[parameter] > number for parameter, number in inside.items())


def _enter_through_forward(method: Method) -> None:
    """FSDP gathers parameters around a module's forward, so every entry of the contract goes through that.

    The arguments hide in a call without tensors. FSDP takes a gradient that reaches an argument for the end of the
    backward pass, and rows and states go from one entry to the next.
    """

    def run(call: Callable[[], Any]) -> Any:
        return call()

    method.forward = run
    for name in ("embed", "couple", "separate"):
        entry = getattr(method, name)
        setattr(method, name, partial(_entered, method, entry))


def _entered(method: Method, entry: Callable[..., Any], *arguments: Any) -> Any:
    return method(partial(entry, *arguments))
