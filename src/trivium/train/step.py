"""The one place where a training step happens.

A step means the same on one process and on many, in one micro-batch or in several:

* every loss is a sum over rows, divided by a count that comes from labels alone and is summed over the global
  batch before the first backward;
* what couples rows (`embed` and `couple`) is split off from what does not (`separate`), so that accumulation over
  micro-batches is GradCache (Gao et al. 2021): the contrastive loss still sees the whole global batch;
* gradients are summed over processes, never averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trivium.errors import TriviumError
from trivium.train import distributed
from trivium.train.protocol import Batch, Key, Method, Rows, Sums

Context = Callable[[], AbstractContextManager]


@dataclass
class StepResult:
    losses: dict[str, float]  # name -> mean over the global batch, unweighted
    stats: dict[str, float]  # name -> sum over the global batch; those without a dimension
    counts: dict[str, float]  # what each loss was divided by, and what else the method counts
    grad_norm: float  # before clipping
    accepted: bool  # False: a gradient or a loss was not finite, nothing changed
    rows: Rows = field(default_factory=Rows)  # what coupled, of all processes, detached


def backward(
    method: Method, batches: Sequence[Batch], key: Key, autocast: Context = nullcontext
) -> tuple[Sums, Sums, Rows]:
    """Forward and backward of this process's micro-batches; gradients are left in ``.grad``, not yet summed over
    processes.

    Returns:
        sums of every loss and stat over this process's rows, the divisors of the global batch, and the coupled rows
        of all processes, detached.
    """
    counts = _divisors(method, batches)
    if len(batches) == 1:
        batch = batches[0]
        key.reseed(batch.number)
        with autocast():
            rows, states = method.embed(batch)
            everyone = distributed.gather(rows)
            sums = method.couple(rows, everyone) | method.separate(batch, rows, states, counts, key)
        _backward(_total(method, sums, counts))
        return _detached(sums), counts, _frozen(everyone)

    rows_of, leaves, everyone, sums = _couple_cached(method, batches, key, autocast, counts)
    for index, batch in enumerate(batches):
        key.reseed(batch.number)
        with autocast():
            rows, states = method.embed(batch)
            separate = method.separate(batch, rows, states, counts, key)
        total = _total(method, separate, counts)
        for name, rows_BD in rows.rows.items():
            grad = leaves.rows[name].grad
            if grad is not None:
                total = total + (rows_BD * grad[rows_of[index]]).sum()
        _backward(total)
        for name, value in _detached(separate).items():
            sums[name] = sums.get(name, 0) + value
    return sums, counts, _frozen(everyone)


def _couple_cached(
    method: Method, batches: Sequence[Batch], key: Key, autocast: Context, counts: Sums
) -> tuple[list[slice], Rows, Rows, Sums]:
    """First pass of GradCache: rows without graph, then the coupled losses on them as leaves."""
    parts = []
    for batch in batches:
        key.reseed(batch.number)
        with torch.no_grad(), autocast():
            parts.append(method.embed(batch)[0])
    ends = torch.tensor([0, *[len(batch) for batch in batches]]).cumsum(0).tolist()
    rows_of = [slice(first, last) for first, last in zip(ends[:-1], ends[1:], strict=True)]
    leaves = Rows(
        {name: torch.cat([part.rows[name] for part in parts]).requires_grad_() for name in parts[0].rows},
        {name: torch.cat([part.marks[name] for part in parts]) for name in parts[0].marks},
    )
    if not leaves.rows:
        return rows_of, leaves, leaves, {}
    with autocast():
        everyone = distributed.gather(leaves)
        sums = method.couple(leaves, everyone)
    if sums:
        _backward(_total(method, sums, counts))
    return rows_of, leaves, everyone, _detached(sums)


def step(
    method: Method,
    batches: Sequence[Batch],
    key: Key,
    optimizer: torch.optim.Optimizer,
    *,
    clip: str = "none",
    clip_norm: float = 1.0,
    autocast: Context = nullcontext,
) -> StepResult:
    """One update from this process's micro-batches of one global batch.

    A gradient or a loss that is not finite on any process skips the update on all of them: parameters, optimizer and
    every other state stay as they were to the bit.

    Args:
        clip: "none"; "global": scale all gradients to a joint norm of at most `clip_norm`; "per_tensor": each.

    Raises:
        TriviumError: no parameter has a gradient, since all that the losses of this stream depend on is frozen.
    """
    method.train()
    method.schedule(key.step)
    optimizer.zero_grad(set_to_none=True)
    sums, counts, everyone = backward(method, batches, key, autocast)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if all(parameter.grad is None for parameter in parameters):
        raise TriviumError(
            f"a step of stream {key.stream} trains nothing, since all that its losses depend on is frozen: narrow"
            " --optim.freeze or a group's freeze_until, or leave the stream out by weights of 0 for its losses"
        )
    distributed.sum_gradients(parameters)

    whole_grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = distributed.norms(whole_grads)
    norm = norms.norm()
    grads = [distributed.own_part(grad) for grad in whole_grads]
    agreed = distributed.sum_over_processes({**sums, "/norm": norm})  # what is not finite anywhere is so in the sum
    numbers = _numbers({"/own norm": norm, **agreed})
    accepted = all(math.isfinite(value) for value in numbers.values())
    grad_norm, _ = numbers.pop("/own norm"), numbers.pop("/norm")
    for name in [name for name, value in agreed.items() if value.ndim]:
        del numbers[name]  # nothing to log
    if accepted:
        if clip == "global" and (factor := clip_norm / (grad_norm + 1e-6)) < 1.0:
            torch._foreach_mul_(grads, factor)
        elif clip == "per_tensor":
            scales = (clip_norm / (norms + 1e-6)).clamp(max=1.0)
            for grad, scale in zip(grads, scales.to(grads[0].dtype), strict=True):
                grad.mul_(scale)
        optimizer.step()
        with torch.no_grad():
            method.after_step(key.step, everyone, {k: v for k, v in agreed.items() if k.startswith("stat/")})
    optimizer.zero_grad(set_to_none=True)
    return _result(numbers, counts, grad_norm, accepted, everyone)


def measure(
    method: Method, global_batches: Iterable[Sequence[Batch]], key: Key, autocast: Context = nullcontext
) -> dict[str, float]:
    """The same losses without graph, dropout or update: means over all the batches given.

    Each element is this process's micro-batches of one global batch; contrastive rows see that batch alone.
    """
    was_training = method.training
    method.eval()
    sums: Sums = {}
    counts: Sums = {}
    with torch.no_grad(), autocast():
        for batches in global_batches:
            divisors = _divisors(method, batches)
            embedded = [method.embed(batch) for batch in batches]
            rows = Rows(
                {name: torch.cat([rows.rows[name] for rows, _ in embedded]) for name in embedded[0][0].rows},
                {name: torch.cat([rows.marks[name] for rows, _ in embedded]) for name in embedded[0][0].marks},
            )
            found = [method.couple(rows, distributed.gather(rows)) if rows.rows else {}]
            for batch, (part, states) in zip(batches, embedded, strict=True):
                found.append(method.separate(batch, part, states, divisors, key))
            for name, value in [item for part in found for item in part.items()]:
                sums[name] = sums.get(name, 0) + value.double()
            for name, value in divisors.items():
                counts[name] = counts.get(name, 0) + value
    method.train(was_training)
    return _result(_numbers(distributed.sum_over_processes(sums)), counts, 0.0, True, Rows()).losses


def _divisors(method: Method, batches: Sequence[Batch]) -> Sums:
    counts: Sums = {}
    for batch in batches:
        for name, value in method.counts(batch).items():
            counts[name] = counts.get(name, 0) + value.double()
    return method.divisors(distributed.sum_over_processes(counts))


def _total(method: Method, sums: Sums, counts: Sums) -> Tensor:
    """Sum of weight x sum / count over the losses present; a count of 0 divides by 1."""
    terms = [
        method.weights[name] * value / counts[name].clamp(min=1).to(value.device, value.dtype, non_blocking=True)
        for name, value in sums.items()
        if not name.startswith("stat/")
    ]
    if not terms:  # a micro-batch whose only loss is a coupled one, taken care of in the first pass
        return torch.zeros(())
    return torch.stack([term.float() if term.dtype != torch.float64 else term for term in terms]).sum()


def _backward(total: Tensor) -> None:
    """Where all of it is frozen there is no graph: of a part of a step that is no mistake, of a whole one `step` says
    it."""
    if total.requires_grad:
        total.backward()


def _frozen(rows: Rows) -> Rows:
    return Rows({name: rows_BD.detach() for name, rows_BD in rows.rows.items()}, rows.marks)


def _detached(sums: Sums) -> Sums:
    return {name: value.detach().double() for name, value in sums.items()}


def _numbers(sums: Sums) -> dict[str, float]:
    """All of them in one copy from the device: each copy waits until the device has nothing left to do.

    A tensor with dimensions gives its sum, which is not finite where one of its numbers is not.
    """
    if not sums:
        return {}
    home = next(iter(sums.values())).device
    values = [value.double().sum().to(home) for value in sums.values()]
    return dict(zip(sums, torch.stack(values).tolist(), strict=True))


def _result(sums: dict[str, float], counts: Sums, grad_norm: float, accepted: bool, rows: Rows) -> StepResult:
    losses = {n: v / float(counts[n].clamp(min=1)) for n, v in sums.items() if not n.startswith("stat/")}
    stats = {name[5:]: value for name, value in sums.items() if name.startswith("stat/")}
    return StepResult(losses, stats, {name: float(value) for name, value in counts.items()}, grad_norm, accepted, rows)
