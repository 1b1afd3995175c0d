"""Full pretraining steps of ALBEF against the computation of its public code: forward, backward, optimizer, momentum.

    python benchmarks/albef_step.py                 # base size, batch 8: about 15 minutes on two cores with AMX
    python benchmarks/albef_step.py --size tiny     # half a minute, to see that it runs

The peer (published_albef.py) is built of transformers' ViT and BERT as the public code computes: eager attention, three
passes of fusion and one for the masked words, their head at every position, one draw after the other, the average of
weights tensor by tensor, the queue cloned and joined. Same weights, pictures, words, masks and false pairs on both
sides, no dropout; the losses of both agree to 1e-5 in float32, or nothing is timed. Captions are padded to 25 tokens
and of 8 to 25, spread evenly, 16.5 on average, so pads are a third of what the peer computes on words. Two cases:

    same_precision   both in the precision that this machine takes ("auto")
    as_published     the peer in float32, which is what the public scripts train in; ours as it runs by default

Each side has a process of its own: ours keeps the memory of a step for the next (train/memory.py), and what it left
lying would be the peer's to find. The ladder takes one trick away at a time: its factor is the time without the trick
over the time with all.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import side_by_side
import torch
from flava_pair import PADS, eager_attention, with_pads
from published_albef import Inputs, published_from
from step_pair import StepPair, compare
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.vit.modeling_vit import ViTLayer

from trivium.layers import attention
from trivium.methods import albef as method_module
from trivium.methods.albef import AlbefMethod, Distillation
from trivium.methods.albef_flops import useful_flops
from trivium.methods.pixels import Pixels
from trivium.models.albef import Albef, AlbefConfig, Negatives
from trivium.models.encoded import Encoded
from trivium.train import precision
from trivium.train.initial import initialise
from trivium.train.memory import keep_freed
from trivium.train.protocol import Batch, Images, Key, Texts

TOKENS, QUEUE = 25, 65_536
CASES = ("same_precision", "as_published")
CPU = torch.device("cpu")
ROWS = {"pairs": 128}  # of a step at size base on a GPU of 80 GB; halved where too many
LADDER_ROUNDS = 4  # of each trick
COMPARED = ("equal",)  # inputs on which the losses of both sides are compared


def make_batch(config: AlbefConfig, rows: int) -> Batch:
    """Noise: no step here takes another time for meaning. Captions of 8 to 25 tokens, spread evenly."""
    draw = torch.Generator().manual_seed(0)
    length_B = torch.linspace(TOKENS // 3, TOKENS, rows).round().long()
    mask_BT = torch.arange(TOKENS) < length_B[:, None]
    ids_BT = torch.randint(1000, config.vocab_size, (rows, TOKENS), generator=draw) * mask_BT
    selected_BT = (torch.rand(rows, TOKENS, generator=draw) < 0.15) & mask_BT
    selected_BT[:, 1] = True
    pixels = torch.randint(0, 256, (rows, 3, config.image_size, config.image_size), generator=draw)
    rows_B = torch.arange(rows)
    targets = {
        "masked_ids": torch.where(selected_BT, 103, ids_BT),
        "selected": selected_BT,
        "matched": torch.ones(rows, dtype=torch.bool),
    }
    images = (Images(pixels.to(torch.uint8), rows_B),)
    return Batch("pairs", rows_B, rows_B, images, (Texts(ids_BT, mask_BT, rows_B),), targets)


class Pair(StepPair):
    """The two with the same weights, teacher and queues."""

    def __init__(
        self,
        size: str,
        autocast: Callable[[], AbstractContextManager],
        device: torch.device,
        queue: int = QUEUE,
    ) -> None:
        model = Albef(AlbefConfig.of_size(size, dropout=0.0))
        initialise(model, 0)
        pixels = Pixels((0.5,) * 3, (0.25,) * 3)
        method = AlbefMethod(model, pixels, Distillation(ramp=0.0), 1, 1, queue, duplicates="ignore")
        super().__init__(method, published_from(method), autocast, device)
        self.peer_autocast: Callable[[], AbstractContextManager] | None = None  # None: as ours

    def blocks(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The transformer blocks of both, student's and teacher's, for compilation one by one."""
        theirs: list[nn.Module] = [part for part in self.peer.modules() if isinstance(part, ViTLayer | BertLayer)]
        return [*self.method.model.blocks(), *self.method.teacher.blocks()], theirs

    def case(self, modality: str, rows: int, inputs: str) -> tuple[Batch, dict[str, Any]]:
        """A batch for both sides, who take the same inputs."""
        batch = make_batch(self.method.model.config, rows)
        return batch, self.inputs(batch)

    def flops(self, batch: Batch) -> float:
        return useful_flops(self.method, batch)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The batch as the peer takes it, and the draws of ours."""
        text, targets, key = batch.texts[0], batch.targets, Key(0, batch.stream, 0)
        inputs = {
            "pixels_BCHW": self.method.pixels(batch.images[0].pixels_BCHW), "ids_BT": text.ids_BT,
            "mask_BT": text.mask_BT, "masked_ids_BT": targets["masked_ids"],
            "labels_BT": text.ids_BT.masked_fill(~targets["selected"], -100),
            "image_draw_B": key.uniform("negative image", batch.rows_B),
            "text_draw_B": key.uniform("negative text", batch.rows_B),
        }  # fmt: skip
        return {name: value.to(self.method.mean.device) for name, value in inputs.items()}

    def peer_losses(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The average of weights moves in training alone: losses are compared without."""
        alpha, training = self.method.distillation.itc, torch.is_grad_enabled()
        with (self.peer_autocast or self.autocast)():
            losses: dict[str, Tensor] = self.peer(Inputs(**inputs), alpha, update=training)
        return losses | {"total": torch.stack([loss.float() for loss in losses.values()]).sum()}

    def same_losses(self, batch: Batch, inputs: dict[str, Any]) -> None:
        queues = {name: buffer.clone() for name, buffer in self.peer.named_buffers()}
        super().same_losses(batch, inputs)
        for name, buffer in self.peer.named_buffers():
            buffer.copy_(queues[name])


# ---------------------------------------------------------------------------------------- steps without one trick


@contextmanager
def patched(target: Any, name: str, value: Any) -> Iterator[None]:
    with mock.patch.object(target, name, value):
        yield


def four_passes(
    self: Albef,
    image: Encoded,
    masked: Encoded | None,
    rows: Tensor | None,
    text: Encoded | None,
    negatives: Negatives | None,
) -> tuple[Encoded | None, Encoded | None]:
    """Keys and values anew for each: true pairs, both kinds of false ones, masked words."""
    assert masked is not None and text is not None and negatives is not None
    words = self.fuse(image, masked, rows, pads=False)
    true = self.fuse(image, text, 1)
    other_mask = None if text.mask is None else text.mask.repeat(2, 1)
    if other_mask is not None and text.mask is not None:
        other_mask = torch.cat([text.mask, text.mask[negatives.text_B]])
    texts = Encoded(torch.cat([text.states, text.states[negatives.text_B]]), other_mask, nn.Identity(), None)
    pictures = torch.cat([image.tokens[negatives.image_B], image.tokens])
    false = self.fuse(Encoded(pictures, None, nn.Identity(), None), texts, 1)
    return words, Encoded(torch.cat([true.states, false.states]), None, nn.Identity(), None)


def every_position(*parts: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    (selected_BT,) = parts
    B, T = selected_BT.shape
    return torch.arange(T).expand(B, T).contiguous(), (selected_BT.flatten().nonzero()[:, 0],)


def words_at_every_position(positions: int) -> Callable[[Albef, Tensor], Tensor]:
    """The head on as many rows as there are positions; those that are asked for come first."""

    def predict(self: Albef, rows: Tensor) -> Tensor:
        padding = rows.new_zeros(positions - len(rows), rows.shape[-1])
        every: Tensor = self.mlm_head(torch.cat([rows, padding]), self.text.embeddings.word.weight)
        return every[: len(rows)]

    return predict


def average_by_tensor(average: nn.Module, module: nn.Module, momentum: float) -> None:
    for mine, theirs in zip(average.parameters(), module.parameters(), strict=True):
        mine.data = mine.data * momentum + theirs.data * (1 - momentum)


def joined_queue(
    query: Tensor, teacher: Tensor, keys: Any, temperature: Tensor, answer: Tensor, same: Any, alpha: float, _: Any
) -> tuple[Tensor, Tensor]:
    everyone = torch.cat([keys[0].t(), keys[1].t().clone()], dim=1)
    with torch.no_grad():
        labels = torch.zeros(len(query), everyone.shape[1]).scatter_(1, answer[:, None], 1.0)
        targets = alpha * F.softmax(teacher @ everyone / temperature, dim=1) + (1 - alpha) * labels
    loss = -(F.log_softmax(query @ everyone / temperature, dim=1) * targets).sum(1)
    return loss, torch.zeros_like(loss.detach())


def one_by_one(logits: Tensor, allowed: Tensor, uniform: Tensor) -> Tensor:
    weights = logits.softmax(1) * allowed
    drawn = []
    for weight, number in zip(weights, uniform, strict=True):
        reached = weight.double().cumsum(0)
        drawn.append(int(torch.searchsorted(reached, number * reached[-1], right=True).item()))
    return torch.tensor(drawn)


# Each trick taken away: how our step is patched.
WITHOUT: dict[str, Callable[[Batch], AbstractContextManager]] = {
    "keys and values of a picture once, one pass of fusion": lambda _: patched(Albef, "fuse_pairs", four_passes),
    "masked words: last block at their positions only": lambda _: patched(method_module, "needed", every_position),
    "masked words: head at their positions only": lambda batch: patched(
        Albef, "predict_words", words_at_every_position(batch.texts[0].ids_BT.numel())
    ),
    "fused scaled-dot-product attention": lambda _: patched(attention, "attend", eager_attention),
    "false pairs drawn at once": lambda _: patched(method_module, "hard_negatives", one_by_one),
    "average of weights in one call": lambda _: patched(method_module, "follow", average_by_tensor),
    PADS: lambda _: with_pads(),
    "queue not joined to the batch": lambda _: patched(method_module, "distilled_contrastive", joined_queue),
}


GIVEN_BACK = "memory of a step kept for the next"  # a trick that is not taken away by a patch


class Ours:
    """Our step, in a process of its own. keeps: as the trainer does, the memory of a step for the next one."""

    def __init__(self, size: str, rows: int, keeps: bool) -> None:
        if keeps:
            keep_freed()
        self.kind = precision.choose("auto", CPU)
        self.pair = Pair(size, lambda: precision.autocast(CPU, self.kind), CPU, queue_of(size, rows))
        self.batch = make_batch(self.pair.method.model.config, rows)
        del self.pair.peer, self.pair.peer_optimizer
        gc.collect()

    def precision(self) -> str:
        return self.kind

    def step(self) -> None:
        self.pair.step(self.batch)

    def without(self, trick: str) -> None:
        with WITHOUT[trick](self.batch):
            self.pair.step(self.batch)

    def memory(self) -> int:
        return self.pair.memory(self.batch)


class Peer:
    """The public code's step, in a process of its own, with the allocator as it comes."""

    def __init__(self, size: str, rows: int) -> None:
        self.kind = precision.choose("auto", CPU)
        self.pair = Pair(size, lambda: precision.autocast(CPU, self.kind), CPU, queue_of(size, rows))
        batch = make_batch(self.pair.method.model.config, rows)
        self.inputs = self.pair.inputs(batch)
        self.pair.same_losses(batch, self.inputs)  # before any step: afterwards weights may drift apart
        del self.pair.optimizer, self.pair.method.model, self.pair.method.teacher
        gc.collect()

    def step(self, as_published: bool) -> None:
        self.pair.peer_autocast = nullcontext if as_published else None
        self.pair.peer_step(self.inputs)

    def memory(self, as_published: bool) -> int:
        self.pair.peer_autocast = nullcontext if as_published else None
        return self.pair.memory(self.inputs)


def queue_of(size: str, rows: int) -> int:
    return QUEUE if size == "base" else 64 * rows


def compare_case(ours: side_by_side.Apart, peer: side_by_side.Apart, case: str, rounds: int | None) -> dict[str, Any]:
    as_published = case == "as_published"
    steps = partial(ours, "step"), partial(peer, "step", as_published)
    return compare(case, *steps, lambda: (ours("memory"), peer("memory", as_published)), rounds)


def ladder(size: str, rows: int, ours: side_by_side.Apart) -> dict[str, float]:
    """Of the fastest steps."""
    given_back = side_by_side.Apart(Ours, size, rows, False)
    without = {trick: partial(ours, "without", trick) for trick in WITHOUT} | {GIVEN_BACK: partial(given_back, "step")}
    timed = partial(side_by_side.interleaved, rounds=LADDER_ROUNDS)
    rungs = side_by_side.ladder(partial(ours, "step"), without, of=min, timed=timed)
    given_back.end()
    return rungs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=("tiny", "base"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--case", choices=CASES, help="of these alone")
    parser.add_argument("--rounds", type=int, help="of each case; None: 5, or 3 where a round takes over 30 s")
    parser.add_argument("--no-ladder", action="store_true")
    arguments = parser.parse_args()
    size, rows = arguments.size, arguments.batch
    if size == "base":
        side_by_side.refuse_a_busy_machine()
    print("losses", flush=True)
    peer, ours = side_by_side.Apart(Peer, size, rows), side_by_side.Apart(Ours, size, rows, True)
    kind, results = ours("precision"), {}
    print(f"ours in {kind}", flush=True)
    for case in CASES if arguments.case is None else (arguments.case,):
        results[case] = compare_case(ours, peer, case, arguments.rounds)
    peer.end()
    rungs = {} if arguments.no_ladder else ladder(size, rows, ours)
    if size == "base":
        same = {"precision": kind, "batch": rows, "tokens": TOKENS, "queue": queue_of(size, rows)}
        name = side_by_side.of_this_class("albef_step")
        results, rungs, command = side_by_side.beside_what_is_there(name, results, rungs, **same)
        side_by_side.write(name, results, command=command, ladder=rungs, **same)


if __name__ == "__main__":
    main()
