"""Full training steps of UniT's detection, pictures of different sizes: forward, matching, losses, backward, optimizer.

    python benchmarks/unit_step.py                 # base size: half an hour on two cores
    python benchmarks/unit_step.py --size tiny     # seconds, to see that it runs

The public code cannot pad exactly, so it takes one picture a step. Ours takes all of them in one micro-batch (of
pictures of 800 pixels the recipe takes 4). Same weights, pictures and boxes, threads, optimizer and precision on both
sides, no dropout; in float32 the losses of the batch agree with the peer's, picture by picture, to 1e-5, or nothing is
timed. Cases:

    batch_256px   8 pictures whose shorter side has 256 pixels in one step, against 8 steps of one picture by the
                  computation of the public code (published_unit.py, with eager attention)
    batching      the same 8 pictures in one step, against 8 steps of one picture by this same model
    batch_800px   2 pictures of the published size in one step, against 2 steps of the public code
    sdpa          1 picture of the published size, against the same model with attention written out

Each side has a process of its own, and its allocator as it is used: ours keeps the memory of a step for the next, as
the trainer does (train/memory.py), the peer's is as it comes.

The ladder takes one trick away at a time from batch_256px: its factor is the time without the trick over the time with
all.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal
from unittest import mock

import side_by_side
import torch
from published_unit import PlainUnit, set_losses
from step_pair import StepPair, compare
from torch import Tensor
from torch.nn import functional as F

from trivium.convert.unit import to_mmf
from trivium.layers import resnet, shelves
from trivium.methods.pixels import Pixels
from trivium.methods.unit import UnitMethod
from trivium.models import unit_image, unit_transformer
from trivium.models.unit import PUBLISHED_TASKS, Unit, UnitConfig
from trivium.train import precision
from trivium.train.memory import keep_freed
from trivium.train.protocol import Batch, Images

# Width over height of COCO's pictures: two thirds lie, a quarter stand.
ASPECTS = (4 / 3, 3 / 2, 4 / 3, 3 / 4, 1.0, 4 / 3, 2 / 3, 16 / 9)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FROZEN = ("image.backbone.stem.", "image.backbone.stages.0.")  # as published
CASES = ("batch_256px", "batching", "batch_800px", "sdpa")
CPU = torch.device("cpu")
Kind = Literal["fp32", "bf16"]
CONFIGS = {
    "tiny": UnitConfig(
        tasks=PUBLISHED_TASKS[:1], decoder="separate", width=64, num_heads=4, mlp_width=128, decoder_layers=2,
        image_width=32, image_layers=2, backbone_widths=(8, 16, 32, 64), backbone_blocks=(1, 1, 1, 1), text_layers=1,
        text_width=64, text_heads=1, text_mlp_width=64, vocab_size=100, dropout=0.0,
    ),
    "base": UnitConfig(tasks=PUBLISHED_TASKS[:1], decoder="separate", dropout=0.0),
}  # fmt: skip


def make_batch(rows: int, short: int, longest: int) -> Batch:
    """Noise: no step here takes another time for meaning. Seven objects a picture, as COCO has."""
    draw = torch.Generator().manual_seed(0)
    sizes = []
    for row in range(rows):
        aspect = ASPECTS[row % len(ASPECTS)]
        other = min(longest, round(short * max(aspect, 1 / aspect)))
        sizes.append((short, other) if aspect >= 1 else (other, short))
    sizes_B2 = torch.tensor(sizes)
    height, width = sizes_B2.amax(0).tolist()
    pixels = torch.randint(0, 256, (rows, 3, height, width), generator=draw).to(torch.uint8)
    for row, (h, w) in enumerate(sizes):
        pixels[row, :, h:], pixels[row, :, :, w:] = 0, 0
    row_M = torch.arange(rows).repeat_interleave(7)
    size_M2 = torch.rand(len(row_M), 2, generator=draw) * 0.3 + 0.05
    box_M4 = torch.cat([size_M2 / 2 + torch.rand(len(row_M), 2, generator=draw) * (1 - size_M2), size_M2], 1)
    targets = {"box_row": row_M, "box_class": torch.randint(1, 91, (len(row_M),), generator=draw), "box": box_M4}
    number = torch.arange(rows)
    return Batch("coco", number, number, (Images(pixels, number, sizes_B2),), (), targets)


def one_by_one(batch: Batch) -> list[Batch]:
    """A batch of each picture, without padding."""
    images, targets, first = batch.images[0], batch.targets, torch.arange(1)
    assert images.sizes_B2 is not None
    alone = []
    for row, (height, width) in enumerate(images.sizes_B2.tolist()):
        pixels = images.pixels_BCHW[row : row + 1, :, :height, :width].contiguous()
        mine = {name: tensor[targets["box_row"] == row] for name, tensor in targets.items()}
        mine["box_row"] = torch.zeros_like(mine["box_row"])
        alone.append(
            Batch(batch.stream, first, first, (Images(pixels, first, images.sizes_B2[row : row + 1]),), (), mine)
        )
    return alone


class Pair(StepPair):
    """The two models with the same weights. The peer takes a list of pictures, and a step for each."""

    def __init__(self, size: str, autocast: Callable[[], AbstractContextManager], device: torch.device) -> None:
        config = CONFIGS[size]
        model = Unit(config)
        draw_weights(model)
        peer = PlainUnit(config)
        peer.load_state_dict(to_mmf(model.state_dict(), config), strict=False)  # all but BERT's pooler
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(FROZEN))
        body: Any = peer.unit_base_model.backbone[0].body  # type: ignore[index, union-attr]
        body.conv1.requires_grad_(False)
        body.layer1.requires_grad_(False)
        super().__init__(UnitMethod(model, Pixels(MEAN, STD), {}), peer, autocast, device)
        self.task = config.tasks[0]

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The same batch as the peer takes it."""
        pictures = [self.method.pixels(one.images[0].pixels_BCHW) for one in one_by_one(batch)]
        row_M = batch.targets["box_row"]
        targets = []
        for row in range(len(batch)):
            mine = {
                name: batch.targets[key][row_M == row]
                for name, key in (("class_labels", "box_class"), ("boxes", "box"))
            }
            targets.append({name: tensor.to(self.method.mean.device) for name, tensor in mine.items()})
        return {"pictures": pictures, "targets": targets}

    def peer_losses(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        peer: Any = self.peer
        with self.autocast():
            logits, boxes = peer.detected(self.task, peer(self.task, inputs["pictures"]))
        found, _ = set_losses(logits.float(), boxes.float(), inputs["targets"], self.task.num_labels)
        parts = {"class": found["loss_ce"], "box": found["loss_bbox"], "giou": found["loss_giou"]}
        losses = {f"{self.task.name}.{name}": value for name, value in parts.items()}
        weighted = [self.method.weights[name] * value for name, value in losses.items()]
        return losses | {"total": torch.stack(weighted).sum()}


def draw_weights(model: Unit) -> None:
    """Convolutions and norms that keep the scale of what passes, the rest N(0, 0.02)."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim >= 2:
                tensor.normal_(0, tensor[0].numel() ** -0.5 if tensor.ndim == 4 else 0.02, generator=draw)
            else:
                tensor.fill_(1.0 if name.endswith(("norm.weight", "running_var")) else 0.0)
            if name.endswith("convolutions.2.norm.weight"):
                tensor.fill_(0.2)  # or sixteen blocks, each added to its input, make numbers grow without end


# ---------------------------------------------------------------------------------------- steps without one trick


def written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    return F.dropout(scores.softmax(-1), dropout) @ value


def attention_of_torch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    mask = None if mask is None else mask[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


def norm_apart(self: resnet.Convolution, x: Tensor, before: resnet.Reach, after: resnet.Reach) -> Tensor:
    assert isinstance(self.norm, resnet.FrozenBatchNorm)
    scale, shift = self.norm.scale_and_shift()
    x = self.convolved(x, before, self.conv.weight, None)
    return x * scale + shift if x.ndim == 2 else x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


WITHOUT: dict[str, Callable[[], AbstractContextManager]] = {
    "weights laid out as maps are, once for all sizes": lambda: mock.patch.object(
        resnet, "LAYOUT", torch.contiguous_format
    ),
    "frozen norm multiplied into the weights": lambda: mock.patch.object(resnet.Convolution, "forward", norm_apart),
    "fused attention": lambda: mock.patch.object(unit_transformer, "attend", written_out),
    "backward of attention by whole products": lambda: mock.patch.object(
        unit_transformer, "attend", attention_of_torch
    ),
    "other sizes apart, in place of all padded to the largest": lambda: mock.patch.object(
        unit_image, "goes_apart", return_value=False
    ),
    "convolutions of 1 x 1 as one product for all sizes": lambda: mock.patch.object(
        resnet, "is_one_product", return_value=False
    ),
    "convolutions of 3 x 3 over small maps side by side": lambda: mock.patch.object(shelves, "POSITIONS", 0),
}


GIVEN_BACK = "memory of a step kept for the next"  # a trick that is not taken away by a patch


def make_batches(size: str, rows: int) -> dict[str, Batch]:
    """By the names of the cases: `rows` small pictures, two large ones, and one of these."""
    short, large = ((256, 1333), (800, 1333)) if size == "base" else ((64, 120), (96, 160))
    few = make_batch(2, *large)
    return {"256px": make_batch(rows, *short), "800px": few, "one": one_by_one(few)[0]}


class Ours:
    """Our step, in a process of its own. keeps: as the trainer does, the memory of a step for the next one."""

    def __init__(self, size: str, kind: Kind, rows: int, keeps: bool) -> None:
        if keeps:
            keep_freed()
        self.pair = Pair(size, lambda: precision.autocast(CPU, kind), CPU)
        self.batches = make_batches(size, rows)
        self.singly = one_by_one(self.batches["256px"])
        del self.pair.peer, self.pair.peer_optimizer
        gc.collect()

    def step(self, batch: str) -> None:
        self.pair.step(self.batches[batch])

    def one_by_one(self) -> None:
        for picture in self.singly:
            self.pair.step(picture)

    def without(self, trick: str, batch: str = "256px") -> None:
        with WITHOUT[trick]():
            self.pair.step(self.batches[batch])

    def memory(self, batch: str) -> int:
        return self.pair.memory(self.batches[batch])

    def memory_one_by_one(self) -> int:
        return max(map(self.pair.memory, self.singly))

    def memory_without(self, trick: str, batch: str) -> int:
        with WITHOUT[trick]():
            return self.memory(batch)


class Peer:
    """The public code's steps, in a process of their own, with the allocator as it comes."""

    def __init__(self, size: str, kind: Kind, rows: int) -> None:
        self.pair = Pair(size, lambda: precision.autocast(CPU, kind), CPU)
        batches = make_batches(size, rows)
        self.inputs = {name: self.pair.inputs(batch) for name, batch in batches.items()}
        # Before any step: afterwards weights may drift apart.
        self.pair.same_losses(batches["256px"], self.inputs["256px"])
        del self.pair.optimizer, self.pair.method.model
        gc.collect()

    def steps(self, batch: str) -> None:
        """One for each picture."""
        for alone in self.one_by_one(batch):
            self.pair.peer_step(alone)

    def memory(self, batch: str) -> int:
        return max(map(self.pair.memory, self.one_by_one(batch)))

    def one_by_one(self, batch: str) -> Iterator[dict[str, Any]]:
        inputs = self.inputs[batch]
        for picture, target in zip(inputs["pictures"], inputs["targets"], strict=True):
            yield {"pictures": [picture], "targets": [target]}


Side = Callable[..., Any]  # a side_by_side.Apart: the name of a method, and its arguments


def compare_case(case: str, ours: Side, peer: Side, rounds: int | None) -> dict[str, Any]:
    """One of CASES. Of several steps the one that takes the most memory counts."""
    written_out = "fused attention", "one"
    steps, memory = {
        "batch_256px": ((partial(ours, "step", "256px"), partial(peer, "steps", "256px")),
                        (partial(ours, "memory", "256px"), partial(peer, "memory", "256px"))),
        "batching": ((partial(ours, "step", "256px"), partial(ours, "one_by_one")),
                     (partial(ours, "memory", "256px"), partial(ours, "memory_one_by_one"))),
        "batch_800px": ((partial(ours, "step", "800px"), partial(peer, "steps", "800px")),
                        (partial(ours, "memory", "800px"), partial(peer, "memory", "800px"))),
        "sdpa": ((partial(ours, "step", "one"), partial(ours, "without", *written_out)),
                 (partial(ours, "memory", "one"), partial(ours, "memory_without", *written_out))),
    }[case]  # fmt: skip
    return compare(case, *steps, lambda: (memory[0](), memory[1]()), rounds)


def ladder(ours: Side, given_back: Side) -> dict[str, float]:
    """Factor of each trick. given_back: ours without `keeps`."""
    without: dict[str, Callable[[], object]] = {trick: partial(ours, "without", trick) for trick in WITHOUT}
    without[GIVEN_BACK] = partial(given_back, "step", "256px")
    return side_by_side.ladder(partial(ours, "step", "256px"), without)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=CONFIGS, default="base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, help="of each case; None: 5, or 3 where a round takes over 30 s")
    parser.add_argument("--no-ladder", action="store_true")
    arguments = parser.parse_args()
    size, rows = arguments.size, arguments.batch
    if size == "base":
        side_by_side.refuse_a_busy_machine()
    kind = precision.choose("auto", CPU)
    print(f"both in {kind}; losses", flush=True)
    peer, ours = side_by_side.Apart(Peer, size, kind, rows), side_by_side.Apart(Ours, size, kind, rows, True)
    results = {case: compare_case(case, ours, peer, arguments.rounds) for case in arguments.cases}
    peer.end()
    rungs: dict[str, float] = {}
    if not arguments.no_ladder:
        given_back = side_by_side.Apart(Ours, size, kind, rows, False)
        rungs = ladder(ours, given_back)
        given_back.end()
    ours.end()
    if size == "base":
        sizes = {name: batch.images[0].sizes_B2 for name, batch in make_batches(size, rows).items() if name != "one"}
        lists = {name: sizes_B2.tolist() for name, sizes_B2 in sizes.items() if sizes_B2 is not None}
        same = {"precision": kind, "batch": rows, "sizes": lists, "memory": "kept"}
        name = side_by_side.of_this_class("unit_step")
        results, rungs, command = side_by_side.beside_what_is_there(name, results, rungs, **same)
        side_by_side.write(name, results, command=command, ladder=rungs, **same)


if __name__ == "__main__":
    main()
