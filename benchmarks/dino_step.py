"""Full training steps of DINO against a plain step over transformers.ViTModel: forward, backward, optimizer, teacher.

    python benchmarks/dino_step.py                 # B/16, 4 pictures of 2 + 8 crops: about 4 minutes on two cores
    python benchmarks/dino_step.py --size tiny     # seconds, to see that it runs

Same weights, crops, optimizer, threads and precision on both sides; the losses of both agree to 1e-5 in float32, or
nothing is timed. The plain step is what the paper's algorithm 1 says and nothing more: one call of the tower for each
crop, the head on each, the loss pair by pair with a log-softmax for each, the average and the centre parameter by
parameter. Its attention is transformers' default, which is fused as well.

The ladder takes one trick away at a time: its factor is the time without the trick over the time with all.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import side_by_side
import torch
from flava_pair import every_row
from step_pair import memory_above_state
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig as PeerConfig
from transformers import ViTModel

from trivium.convert.vit import config_to_hf, to_hf
from trivium.methods import dino as method_file
from trivium.methods.dino import DinoMethod, Distillation
from trivium.methods.pixels import Pixels
from trivium.models.dino import Dino, DinoConfig
from trivium.objectives.dino import num_pairs
from trivium.train import precision
from trivium.train.initial import initialise
from trivium.train.protocol import Batch, Images, Key
from trivium.train.step import backward, step

TEMPERATURE, TEACHER_TEMPERATURE, MOMENTUM, CENTER_MOMENTUM = 0.1, 0.04, 0.996, 0.9
KEY = Key(0, "crops", 0)


def make_batch(config: DinoConfig, rows: int, local_size: int, num_local: int) -> Batch:
    """Crops of noise: no step here takes another time for meaning."""
    draw = torch.Generator().manual_seed(0)
    row_B = torch.arange(rows)
    sizes = [config.image_size] * 2 + [local_size] * num_local
    images = tuple(
        Images(torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8, generator=draw), row_B) for size in sizes
    )
    return Batch("crops", row_B, row_B, images)


class PlainHead(nn.Module):
    """Three layers, unit length, torch's weight-normalised linear layer."""

    def __init__(self, model: Dino) -> None:
        super().__init__()
        self.mlp = copy.deepcopy(model.head.mlp)
        last = nn.Linear(model.config.bottleneck_width, model.config.num_prototypes, bias=False)
        last.weight.data.copy_(model.head.prototypes.data)
        self.last_layer = nn.utils.parametrizations.weight_norm(last)
        gain: Any = self.last_layer.parametrizations
        gain.weight.original0.data.fill_(1)
        gain.weight.original0.requires_grad_(False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(rows), dim=-1))


class Peer(nn.Module):
    """A tower of transformers with the plain head."""

    def __init__(self, model: Dino) -> None:
        super().__init__()
        config = PeerConfig(**config_to_hf(model.config))
        self.tower = ViTModel(config, add_pooling_layer=False)
        self.tower.load_state_dict(_in_memory(to_hf(model), self.tower))
        self.head = PlainHead(model)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.head(self.tower(pixels_BCHW, interpolate_pos_encoding=True).last_hidden_state[:, 0])


def _in_memory(state: dict[str, Tensor], tower: ViTModel) -> dict[str, Tensor]:
    """Names of files -> those that this release of the library has in memory."""
    pieces = (("layers.", "encoder.layer."), ("attention.q_proj", "attention.attention.query"),
              ("attention.k_proj", "attention.attention.key"), ("attention.v_proj", "attention.attention.value"),
              ("attention.o_proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"),
              ("mlp.fc2", "output.dense"))  # fmt: skip
    found = {}
    for name in tower.state_dict():
        on_file = name
        for new, old in pieces:
            on_file = on_file.replace(new, old)
        found[name] = state[on_file]
    return found


class Pair:
    """Both sides with the same weights, and a step of each."""

    def __init__(
        self, config: DinoConfig, autocast: Callable[[], AbstractContextManager], device: torch.device
    ) -> None:
        model = Dino(config)
        initialise(model, 0)
        distillation = Distillation(MOMENTUM, TEMPERATURE, TEACHER_TEMPERATURE, temperature_warmup=0.0)
        self.method = DinoMethod(model, Pixels((0.5,) * 3, (0.25,) * 3), distillation, 10**6).to(device)
        self.student = Peer(model).train().to(device)
        self.teacher = Peer(model).requires_grad_(False).to(device)
        self.center_K = torch.zeros(config.num_prototypes, device=device)
        options: dict[str, Any] = {"lr": 1e-6, "weight_decay": 0.04, "fused": True}
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **options)
        self.peer_optimizer = torch.optim.AdamW([p for p in self.student.parameters() if p.requires_grad], **options)
        self.autocast = autocast

    def step(self, batch: Batch) -> dict[str, float]:
        return step(self.method, [batch], KEY, self.optimizer, autocast=self.autocast).losses

    def peer_loss(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Algorithm 1 of the paper with multi-crop: its loss, and the teacher's outputs."""
        with self.autocast():
            crops = [self.method.pixels(images.pixels_BCHW) for images in batch.images]
            with torch.no_grad():
                taught = [self.teacher(pixels).float() for pixels in crops[:2]]
            students = [self.student(pixels).float() for pixels in crops]
            loss = torch.zeros((), device=self.center_K.device)
            for first, outputs_BK in enumerate(taught):
                share_BK = ((outputs_BK - self.center_K) / TEACHER_TEMPERATURE).softmax(-1)
                for second, logits_BK in enumerate(students):
                    if first != second:
                        crossed_B = -(share_BK * F.log_softmax(logits_BK / TEMPERATURE, dim=-1)).sum(-1)
                        loss = loss + crossed_B.mean()
        return loss / num_pairs(len(crops)), taught

    def peer_step(self, batch: Batch) -> float:
        self.peer_optimizer.zero_grad(set_to_none=True)
        loss, taught = self.peer_loss(batch)
        loss.backward()
        self.peer_optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.mul_(MOMENTUM).add_((1 - MOMENTUM) * theirs)
            self.center_K.mul_(CENTER_MOMENTUM).add_(torch.cat(taught).mean(0), alpha=1 - CENTER_MOMENTUM)
        return loss.item()

    def memory(self, batch: Batch) -> tuple[int, int]:
        """Peak of a forward and backward above the state, ours and the peer's."""
        ours = memory_above_state(lambda: backward(self.method, [batch], KEY, self.autocast), self.optimizer)
        return ours, memory_above_state(lambda: self.peer_loss(batch)[0].backward(), self.peer_optimizer)

    def same_losses(self, batch: Batch) -> None:
        """Both sides in float32, or nothing is timed."""
        autocast, self.autocast = self.autocast, nullcontext
        self.method.train()
        self.method.schedule(0)
        with torch.no_grad():
            mine = float(self.method.separate(batch, *self.method.embed(batch), {}, KEY)["crops"]) / len(batch)
            theirs = self.peer_loss(batch)[0].item()
        self.autocast = autocast
        assert abs(mine - theirs) <= 1e-5 * abs(theirs), f"{mine} against the peer's {theirs}"
        print(f"  crops: {mine:.6f} = {theirs:.6f}", flush=True)


# ---------------------------------------------------------------------------------------- steps without one trick


def crop_by_crop(self: Any, batch: Batch) -> Any:
    """One forward of tower and head for each crop."""
    crops = [self.pixels(images.pixels_BCHW) for images in batch.images]
    tokens = [self.model.encode_image(pixels, rows=1).pooled for pixels in crops]
    student_VBK = torch.stack([self.model.head(class_BD) for class_BD in tokens])
    with torch.no_grad():
        taught = [self.teacher.head(self.teacher.encode_image(pixels, rows=1).pooled) for pixels in crops[:2]]
    return method_file._Seen(torch.stack(tokens), student_VBK, torch.stack(taught))


def pair_by_pair(student_VBK: Tensor, shares_2BK: Tensor, temperature: float) -> Tensor:
    losses = [
        -(shares_2BK[first] * F.log_softmax(student_VBK[second] / temperature, dim=-1)).sum()
        for first in range(2)
        for second in range(len(student_VBK))
        if first != second
    ]
    return torch.stack(losses).sum() / num_pairs(len(student_VBK))


@torch.no_grad()
def one_by_one(average: nn.Module, module: nn.Module, momentum: float) -> None:
    for mine, theirs in zip(average.parameters(), module.parameters(), strict=True):
        mine.mul_(momentum).add_((1 - momentum) * theirs)


WITHOUT: dict[str, Callable[[], AbstractContextManager]] = {
    "all crops of a size as one batch": lambda: mock.patch.object(DinoMethod, "_look", crop_by_crop),
    "one pass over logits for all pairs": lambda: mock.patch.object(method_file, "crop_loss", pair_by_pair),
    "last block at the class token only": every_row,
    "average of weights in one call": lambda: mock.patch.object(method_file, "follow", one_by_one),
}


def ladder(pair: Pair, batch: Batch) -> dict[str, float]:
    whole = partial(pair.step, batch)
    without = {trick: partial(side_by_side.under, patch, whole) for trick, patch in WITHOUT.items()}
    return side_by_side.ladder(whole, without)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=("tiny", "base"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--num-local", type=int, default=8)
    parser.add_argument("--rounds", type=int, help="by default 5, or 3 where a round takes over 30 seconds")
    parser.add_argument("--no-ladder", action="store_true")
    arguments = parser.parse_args()
    if arguments.size == "base":
        side_by_side.refuse_a_busy_machine()
    device = precision.choose_device("auto")
    kind = precision.choose("auto", device)
    # The peer resamples positions to the size itself; eps is the same on both sides either way.
    config = replace(DinoConfig.of_size(arguments.size), position_offset=0.0)
    pair = Pair(config, lambda: precision.autocast(device, kind), device)
    local_size = 96 if arguments.size == "base" else config.image_size // 2
    batch = make_batch(config, arguments.batch, local_size, arguments.num_local)
    pair.same_losses(batch)
    memory = pair.memory(batch)
    times = side_by_side.interleaved(partial(pair.step, batch), partial(pair.peer_step, batch), arguments.rounds)
    case = f"2 + {arguments.num_local} crops"
    results = {case: side_by_side.row(*times, memory)}
    found = results[case]
    print(
        f"  {case} ({kind}): ours {found['ours']:.2f} s, peer {found['peer']:.2f} s, ratio {found['ratio']:.2f},"
        f" memory ratio {found['memory_ratio']:.2f}",
        flush=True,
    )
    rungs = {} if arguments.no_ladder else ladder(pair, batch)
    if arguments.size == "base":
        name = side_by_side.of_this_class("dino_step")
        side_by_side.write(name, results, ladder=rungs, precision=kind, batch=arguments.batch)


if __name__ == "__main__":
    main()
