"""Collectives, as few as the contract needs; with one process each of them does nothing.

B rows on this process, G rows on all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from trivium.errors import TriviumError
from trivium.train.protocol import Rows, Sums

T = TypeVar("T")


def launched() -> int:
    """How many processes torchrun started, whether they have met already or not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start() -> None:
    """Join the process group when torchrun started us; without its variables, stay a single process."""
    if launched() == 1 or dist.is_initialized():
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    global _patient
    _patient = dist.new_group(backend="gloo", timeout=PATIENCE)


# What the first process does alone (an evaluation, a save, learning from data) may take longer than any message: torch
# gives up after half an hour. A process that ends closes its connections, and the others know at once all the same.
PATIENCE = timedelta(days=30)
_patient: dist.ProcessGroup | None = None


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() and not _alone else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is the whole world: for what the first process does while the others wait."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def stop() -> None:
    global _patient
    _patient = None
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_processes(sums: Sums) -> Sums:
    """Add up named tensors over processes in one message. Every process must hold the same names and shapes."""
    if world() == 1 or not sums:
        return sums
    names = sorted(sums)
    home = sums[names[0]].device
    packed = torch.cat([sums[name].detach().double().reshape(-1).to(home) for name in names])
    dist.all_reduce(packed)
    parts = packed.split([sums[name].numel() for name in names])
    return {name: part.view(sums[name].shape) for name, part in zip(names, parts, strict=True)}


def any_process(flag: bool, group: dist.ProcessGroup | None = None) -> bool:
    """True where at least one process says so; every process gets the same answer. group: that the vote goes through;
    None: the usual one."""
    if world() == 1:
        return flag
    vote = torch.tensor(float(flag))
    dist.all_reduce(vote, group=group)
    return bool(vote.item() > 0)


def first_process_does(action: Callable[[], T]) -> T | None:
    """Run an action on the first process while the others wait, however long; an error there stops all of them."""
    result, error = None, None
    if rank() == 0:
        try:
            with alone():
                result = action()
        except TriviumError as raised:
            error = raised
    if any_process(error is not None, _patient):
        raise error or TriviumError("the first process stopped: its message says why")
    return result


def chosen_by_first(choose: Callable[[], T]) -> T:
    """What the first process chooses, a small value, on every process; an error there stops all of them."""
    chosen: list[Any] = [first_process_does(choose)]
    if world() > 1:
        dist.broadcast_object_list(chosen, src=0)
    result: T = chosen[0]
    return result


def everywhere(value: T) -> list[T]:
    """A small value of every process, in their order."""
    if world() == 1:
        return [value]
    everyone: list[Any] = [None] * world()
    dist.all_gather_object(everyone, value)
    return everyone


def all_do(action: Callable[[], None]) -> None:
    """Run an action on every process; what is wrong on one of them stops all with the same sentence."""
    told = None
    try:
        action()
    except TriviumError as error:
        told = str(error)
    for process, sentence in enumerate(everywhere(told)):
        if sentence is not None:
            raise TriviumError(f"process {process} of {world()}: {sentence}" if world() > 1 else sentence)


def refuse_differences(facts: Mapping[str, Any], advice: str) -> None:
    """Raises TriviumError on every process, naming the first of these facts that is not the same on all of them."""
    everyone = everywhere(dict(facts))
    for process, theirs in enumerate(everyone):
        for name in sorted(theirs.keys() | everyone[0].keys()):
            first, here = everyone[0].get(name), theirs.get(name)
            if first != here:
                raise TriviumError(f"{name} is {first} on the first process and {here} on process {process}: {advice}")


def from_first(make: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """Tensors that the first process makes, on every process: what is learned from data is learned once."""
    made = [tensor.detach().contiguous() for tensor in first_process_does(make) or ()]
    if world() == 1:
        return made
    described = [[(tensor.shape, tensor.dtype, tensor.device) for tensor in made]]
    dist.broadcast_object_list(described, src=0)
    received = made or [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in described[0]]
    for tensor in received:
        dist.broadcast(tensor, src=0)
    return received


class _Gather(torch.autograd.Function):
    """All processes' rows in rank order; the gradient is summed over processes and sliced back.

    Each process computes the loss of its own rows against all rows, so the gradient of one row is spread over
    every process: the sum is its true gradient (Eq. 1 of CLIP with a global batch). ``torch.distributed.nn`` has
    the same thing under names that changed between releases, hence these lines.
    """

    @staticmethod
    def forward(ctx: Any, mine_BD: Tensor) -> Tensor:
        ctx.num_rows = len(mine_BD)
        everyone = [torch.empty_like(mine_BD) for _ in range(world())]
        dist.all_gather(everyone, mine_BD.contiguous())
        return torch.cat(everyone)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad_GD = grads[0].clone(memory_format=torch.contiguous_format)  # autograd may still need the other
        dist.all_reduce(grad_GD)
        first = rank() * ctx.num_rows
        return grad_GD[first : first + ctx.num_rows]


def gather(mine: Rows) -> Rows:
    """Rows of all processes, with gradient for `rows` and without for `marks`. Same number of rows everywhere."""
    if world() == 1:
        return mine
    marks: dict[str, Tensor] = {}
    for name, mark_B in mine.marks.items():
        everyone = [torch.empty_like(mark_B) for _ in range(world())]
        dist.all_gather(everyone, mark_B.contiguous())
        marks[name] = torch.cat(everyone)
    return Rows({name: _Gather.apply(rows_BD) for name, rows_BD in mine.rows.items()}, marks)


def sum_gradients(parameters: list[torch.nn.Parameter], bytes_per_message: int = 64 << 20) -> None:
    """Sum over processes the gradients that exist, many tensors to a message.

    All processes draw the same stream at a step, so the same parameters have gradients everywhere. Those of a sharded
    method (see train/sharding.py) were summed when they were scattered.
    """
    if world() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    while grads:
        size, bucket = 0, list[Tensor]()
        dtype = grads[0].dtype
        while grads and grads[0].dtype == dtype and (not bucket or size < bytes_per_message):
            bucket.append(grads.pop(0))
            size += bucket[-1].numel() * bucket[-1].element_size()
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        dist.all_reduce(flat)
        for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


def own_part(tensor: Tensor) -> Tensor:
    """What of a tensor this process holds; all of it, where nothing is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Norm of each whole tensor, float64 [n]; of sharded ones every process holds a part."""
    norms_of_parts = torch.stack(list(torch._foreach_norm([own_part(each) for each in tensors]))).double()
    sharded = [isinstance(tensor, DTensor) for tensor in tensors]
    if not any(sharded):
        return norms_of_parts
    squares = norms_of_parts.square()
    summed = squares.clone()
    dist.all_reduce(summed)
    return torch.where(torch.tensor(sharded, device=squares.device), summed, squares).sqrt()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that lies in parts. All processes call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(example: Tensor, value: Tensor) -> Tensor:
    """This process's part of a tensor, cut as the example is. Every process brings the whole."""
    if not isinstance(example, DTensor):
        return value
    value = value.to(example.device)
    return distribute_tensor(value, example.device_mesh, example.placements, src_data_rank=None)
