"""Whether a step means the same on any number of processes and at any micro-batch, tried on this machine.

From one state, every loss and every gradient of one global batch is computed at each layout and compared with those of
one process that takes the whole batch at once. With dropout the micro-batch is held and the processes vary, since the
draws belong to the number of the micro-batch. Processes speak through gloo.
"""

from __future__ import annotations

import math
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trivium.invariance import albef, clip, dino, dvae, finetune, flava, unit
from trivium.train import distributed
from trivium.train.protocol import Batch, Key, Method
from trivium.train.step import backward, measure

Make = Callable[[torch.dtype, float], tuple[Method, Batch]]  # precision, dropout -> a method and one global batch

CASES: dict[str, Make] = {
    "FLAVA, pairs": partial(flava.case, "pairs", false_rows=(1, 6, 7)),
    "FLAVA, images": partial(flava.case, "images"),
    "FLAVA, text": partial(flava.case, "text"),
    "CLIP": partial(clip.case, false_rows=(6,)),
    "DINO": dino.case,
    "DINO, options": partial(dino.case, centring="sinkhorn", weights={"koleo": 0.1, "ibot": 1.0}),
    "dVAE": partial(dvae.case, split_every=25),  # 0, as published, counts less and is otherwise the same
    "fine-tuning, BERT": finetune.case,
    "ALBEF": albef.case,
    "retrieval, FLAVA": flava.retrieval_case,
    "UniT, boxes": partial(unit.case, "vg"),
    "UniT, answers": partial(unit.case, "vqav2"),
}

WORLDS = (1, 2, 4)
MICRO_BATCHES = (1, 2, 4, 8)  # that the global batch is cut into
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}  # of the tensor's norm
DROPOUT = 0.1


@dataclass(frozen=True)
class Layout:
    processes: int
    micro_batches: int  # of the whole global batch
    dropout: float
    precision: str

    @property
    def reference(self) -> Layout:
        return Layout(1, max(MICRO_BATCHES) if self.dropout else 1, self.dropout, self.precision)


@dataclass(frozen=True)
class Deviation:
    """Of a layout from its reference: the worst over all cases, tensors and processes."""

    layout: Layout
    worst: float  # of the tensor's norm
    where: str  # case and tensor

    @property
    def within(self) -> bool:
        return self.worst <= TOLERANCE[self.layout.precision]


def layouts(processes: int) -> Iterator[Layout]:
    """Those of so many processes: every micro-batch that they can share, and the smallest one with dropout."""
    for precision in TOLERANCE:
        for micro_batches in MICRO_BATCHES:
            if micro_batches % processes == 0:
                yield Layout(processes, micro_batches, 0.0, precision)
        yield Layout(processes, max(MICRO_BATCHES), DROPOUT, precision)


def compare(cases: Mapping[str, Make] = CASES, worlds: Sequence[int] = WORLDS) -> list[Deviation]:
    """Run every case at every layout of these numbers of processes, and once at the layouts they are compared with."""
    found: dict[Layout, list[dict[str, Tensor]]] = {}  # one entry for each process
    for processes in sorted({1, *worlds}):
        everywhere = on_processes(processes, partial(_all_layouts, dict(cases), processes))
        for layout in layouts(processes):
            prefix = f"{layout}|"
            found[layout] = [
                {name.removeprefix(prefix): value for name, value in one.items() if name.startswith(prefix)}
                for one in everywhere
            ]
    return [
        Deviation(layout, *max(_deviation(one, found[layout.reference][0]) for one in of_processes))
        for layout, of_processes in found.items()
    ]


def sentence(found: Sequence[Deviation]) -> str:
    """What a comparison comes to."""
    allowed = ", ".join(f"{value:g} in {precision}" for precision, value in TOLERANCE.items())
    wrong = [each for each in found if not each.within]
    if not wrong:
        return f"a step means the same at all {len(found)} layouts: every loss and gradient agrees within {allowed}"
    worst = max(wrong, key=lambda each: each.worst / TOLERANCE[each.layout.precision])
    return (
        f"a step does not mean the same at {len(wrong)} of {len(found)} layouts, allowed is {allowed}: on"
        f" {worst.layout.processes} processes in {worst.layout.micro_batches} micro-batches {worst.where} differs by"
        f" {worst.worst:.1e}; do not train on several processes here, and report this with the output of trivium doctor"
    )


def losses_and_gradients(make: Make, layout: Layout) -> dict[str, Tensor]:
    """Of one global batch, as this process sees them after the sums over processes; validation losses too."""
    method, batch = make(getattr(torch, layout.precision), layout.dropout)
    mine = share_of_this_process(split(batch, layout.micro_batches))
    key = Key(0, batch.stream, 0)
    method.train()
    sums, counts, _ = backward(method, mine, key)
    distributed.sum_gradients(list(method.parameters()))
    sums = distributed.sum_over_processes(sums)
    found = {
        name if name.startswith("stat/") else f"loss of {name}": value / counts.get(name, torch.ones(())).clamp(min=1)
        for name, value in sums.items()
    }
    grads = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    found |= {f"gradient of {n}": distributed.whole(grad) for n, grad in grads.items()}
    measured = measure(method, [mine], key)
    return found | {f"validation loss of {n}": torch.tensor(value).double() for n, value in measured.items()}


def split(batch: Batch, parts: int) -> list[Batch]:
    """The same global batch as contiguous micro-batches."""
    assert len(batch) % parts == 0
    size = len(batch) // parts
    return [batch.part(number * size, (number + 1) * size, number) for number in range(parts)]


def share_of_this_process(batches: Sequence[Batch]) -> list[Batch]:
    share = len(batches) // distributed.world()
    return list(batches[distributed.rank() * share :][:share])


def on_processes(world: int, action: Callable[[], dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """What a function (importable by name) gives on each of `world` new gloo processes; on 1: on this one."""
    if world == 1:
        return [action()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (world, port, action, folder), nprocs=world)
        return [load_file(Path(folder) / f"{rank}.safetensors") for rank in range(world)]


def _process(rank: int, world: int, port: int, action: Callable[[], dict[str, Tensor]], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.start()
    found = {name: value.detach().contiguous() for name, value in action().items()}
    save_file(found, Path(folder) / f"{rank}.safetensors")
    distributed.stop()


def _all_layouts(cases: dict[str, Make], processes: int) -> dict[str, Tensor]:
    return {
        f"{layout}|{name}: {tensor}": value
        for layout in layouts(processes)
        for name, make in cases.items()
        for tensor, value in losses_and_gradients(make, layout).items()
    }


def _deviation(mine: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, str]:
    """The largest, and of which tensor. Infinite where one of both has a tensor that the other hasn't."""
    worst = (0.0, "")
    for name in mine.keys() | reference.keys():
        if name not in mine or name not in reference:
            return math.inf, name
        expected = reference[name].double()
        error, norm = float((mine[name].double() - expected).norm()), float(expected.norm())
        relative = 0.0 if error == 0 else error / norm if norm and math.isfinite(error) else math.inf
        worst = max(worst, (relative, name))
    return worst
