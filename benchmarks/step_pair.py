"""A method of ours and a peer's model as one pair: same weights, same batches, a step of each.

What is the same whatever the family; flava_pair.py, clip_step.py and albef_step.py say what a batch is and what the
peer computes. Ours takes its whole step as a run does: pixels come as bytes and are normalised in it, the gradient's
norm is taken over all parameters and looked at before the update. The peer gets pixels that are ready, and checks and
clips nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import side_by_side
import torch
from torch import Tensor, nn

from trivium.train.protocol import Batch, Key, Method
from trivium.train.step import backward, step

OPTIMIZER: dict[str, Any] = {"lr": 1e-6, "weight_decay": 0.1, "fused": True}  # a rate at which losses stay as they are


class Trick(NamedTuple):
    """One that our step can do without."""

    without: Callable[[], AbstractContextManager]  # how it is patched
    inputs: str = "equal"  # of Pair.case, that it then takes
    modalities: Sequence[str] | None = None  # on which the trick can make a difference; None: on all
    whole: str | None = None  # inputs of the step with all tricks, where it can make one on these alone

    def touches(self, modality: str) -> bool:
        return self.modalities is None or modality in self.modalities


class StepPair(ABC):
    """Both models, and a step of each with the same optimizer and in the same precision."""

    def __init__(
        self, method: Method, peer: nn.Module, autocast: Callable[[], AbstractContextManager], device: torch.device
    ) -> None:
        self.method: Any = method.to(device)
        self.peer = peer.train().to(device)
        self.optimizer = torch.optim.AdamW(method.model.parameters(), **OPTIMIZER)
        self.peer_optimizer = torch.optim.AdamW([p for p in self.peer.parameters() if p.requires_grad], **OPTIMIZER)
        self.autocast = autocast
        if device.type == "cuda":  # losses are compared in float32, convolutions of the peer included
            torch.backends.cudnn.allow_tf32 = False

    @abstractmethod
    def peer_losses(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each loss under our name, and their sum as "total"; under `autocast`."""

    def step(self, batch: Batch) -> dict[str, float]:
        return step(self.method, [batch], Key(0, batch.stream, 0), self.optimizer, autocast=self.autocast).losses

    def peer_step(self, inputs: dict[str, Tensor]) -> dict[str, float]:
        self.peer_optimizer.zero_grad(set_to_none=True)
        losses = self.peer_losses(inputs)
        losses["total"].backward()
        self.peer_optimizer.step()
        return {name: value.item() for name, value in losses.items()}

    def memory(self, batch: Batch | dict[str, Tensor]) -> int:
        """Peak of a forward and backward above the state; a Batch is ours, a dict the peer's."""
        if isinstance(batch, Batch):
            key = Key(0, batch.stream, 0)
            return memory_above_state(lambda: backward(self.method, [batch], key, self.autocast), self.optimizer)
        return memory_above_state(lambda: self.peer_losses(batch)["total"].backward(), self.peer_optimizer)

    def same_losses(self, batch: Batch, inputs: dict[str, Tensor]) -> None:
        """Both sides in float32, or nothing is timed."""
        autocast, self.autocast = self.autocast, nullcontext
        self.method.zero_grad(set_to_none=True)
        sums, counts, _ = backward(self.method, [batch], Key(0, batch.stream, 0))
        self.method.zero_grad(set_to_none=True)
        with torch.no_grad():
            theirs = self.peer_losses(inputs)
        self.autocast = autocast
        for name, value in sums.items():
            if name.startswith("stat/"):
                continue
            mine, other = float(value / counts[name].clamp(min=1)), float(theirs[name])
            assert abs(mine - other) <= 1e-5 * max(1.0, abs(other)), f"{name}: {mine} against the peer's {other}"
            print(f"  {name}: {mine:.6f} = {other:.6f}")

    def ready(self, kind: str) -> None:  # noqa: B027
        """Called once losses were compared: what has to be made ready to be timed in "bf16" or "fp32"."""

    def compare(self, name: str, batch: Batch, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """One case of a results file: times and memory of both."""
        steps = partial(self.step, batch), partial(self.peer_step, inputs)
        return compare(name, *steps, lambda: (self.memory(batch), self.memory(inputs)))


def compare(
    name: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    memory: Callable[[], tuple[int, int]],
    rounds: int | None = None,
) -> dict[str, Any]:
    """A step of ours and one of the peer's in turns, then the memory of both; printed too."""
    times = side_by_side.interleaved(ours, peer, rounds)
    row = side_by_side.row(*times, memory())
    print(
        f"  {name}: ours {row['ours']:.2f} s, peer {row['peer']:.2f} s, ratio {row['ratio']:.2f}, of the fastest steps"
        f" {row['least']:.2f}, memory ratio {row['memory_ratio']:.2f}",
        flush=True,
    )
    return row


def memory_above_state(function: Callable[[], object], optimizer: torch.optim.Optimizer) -> int:
    """Peak of a forward and backward above weights, gradients and optimizer state.

    The gradients lie in memory before it begins: taken off afterwards they would count as if all had been there at
    the peak, which stands where the backward begins.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter).zero_()  # written, so that it is resident
    peak = side_by_side.peak_memory(function)
    optimizer.zero_grad(set_to_none=True)
    return peak
