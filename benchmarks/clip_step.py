"""Full training steps of CLIP against transformers.CLIPModel: forward, backward, optimizer.

    python benchmarks/clip_step.py                 # ViT-B/16, batch 8: four minutes on two cores
    python benchmarks/clip_step.py --size tiny     # seconds, to see that it runs

Same weights, same pictures and words, same optimizer, threads and precision on both sides; the losses agree to 1e-5 in
float32, or nothing is timed. Two cases:

    real_length    each as it is used: the peer with texts padded to 77 tokens, ours to the longest caption
    equal_length   texts of 77 tokens, padding counted, for both

The ladder takes one trick away at a time: its factor is the time without the trick over the time with all, both with
texts of real length.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import side_by_side
import torch
from flava_pair import (
    LENGTHS,
    PADDED,
    attention_of_torch,
    every_row,
    keeping_activations,
    patches_by_convolution,
    three_projections,
)
from step_pair import StepPair
from torch import Tensor, nn
from transformers import CLIPConfig as PeerConfig
from transformers import CLIPModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from trivium.convert.clip import config_to_hf, to_hf
from trivium.layers import activations, attention, embeddings
from trivium.methods.clip import ClipMethod
from trivium.methods.clip_flops import useful_flops
from trivium.methods.pixels import Pixels
from trivium.models.clip import Clip, ClipConfig
from trivium.train import precision
from trivium.train.initial import initialise
from trivium.train.protocol import Batch, Images, Texts

LADDER_BATCH = 4  # of the ladder, which times 14 cases
ROWS = {"pairs": 256}  # of a step at size base on a GPU of 80 GB; halved where too many
COMPARED = ("equal", "as_used")  # inputs on which the losses of both sides are compared


def make_batch(config: ClipConfig, rows: int, length: int | None) -> Batch:
    """Pairs of noise. length: pad texts to it; None: to the longest caption."""
    draw = torch.Generator().manual_seed(0)
    end_B = torch.tensor([LENGTHS[row % len(LENGTHS)] - 1 for row in range(rows)])
    row_B = torch.arange(rows)
    position_T = torch.arange(length or int(end_B.max()) + 1)
    drawn_BT = torch.randint(1, config.vocab_size - 2, (rows, PADDED), generator=draw)
    mask_BT = position_T <= end_B[:, None]
    ids_BT = drawn_BT[:, : len(position_T)] * mask_BT
    ids_BT[:, 0], ids_BT[row_B, end_B] = config.vocab_size - 2, config.vocab_size - 1
    shape = (rows, 3, config.image_size, config.image_size)
    images = Images(torch.randint(0, 256, shape, generator=draw).to(torch.uint8), row_B)
    matched = {"matched": torch.ones(rows, dtype=torch.bool)}
    return Batch("pairs", row_B, row_B, (images,), (Texts(ids_BT, mask_BT, row_B),), matched)


class Pair(StepPair):
    """The two models with the same weights, and a step of each."""

    def __init__(self, size: str, autocast: Callable[[], AbstractContextManager], device: torch.device) -> None:
        config = ClipConfig.of_size(size, max_length=PADDED, end_id=None)
        model = Clip(config)
        initialise(model, 0)
        peer = CLIPModel(PeerConfig.from_dict(config_to_hf(config)))
        peer.load_state_dict(to_hf(model.state_dict(), config))
        super().__init__(ClipMethod(model, Pixels((0.5,) * 3, (0.25,) * 3)), peer, autocast, device)

    def blocks(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The transformer blocks of both, for compilation one by one."""
        return self.method.model.blocks(), [m for m in self.peer.modules() if isinstance(m, CLIPEncoderLayer)]

    def case(self, modality: str, rows: int, inputs: str) -> tuple[Batch, dict[str, Tensor]]:
        """A batch for both sides. inputs: "as_used", the peer's texts padded to 77 tokens; "equal", for both."""
        config = self.method.model.config
        theirs = make_batch(config, rows, PADDED)
        return theirs if inputs == "equal" else make_batch(config, rows, None), self.inputs(theirs)

    def flops(self, batch: Batch) -> float:
        return useful_flops(self.method, batch)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The same batch as CLIPModel takes it."""
        text = batch.texts[0]
        inputs = {"pixel_values": self.method.pixels(batch.images[0].pixels_BCHW), "input_ids": text.ids_BT,
                  "attention_mask": text.mask_BT.long()}  # fmt: skip
        return {name: value.to(self.method.mean.device) for name, value in inputs.items()}

    def peer_losses(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with self.autocast():
            loss = self.peer(**inputs, return_loss=True).loss
        return {"contrastive": loss, "total": loss}


# ---------------------------------------------------------------------------------------- steps without one trick


@contextmanager
def sigmoid_written_out() -> Any:
    plain = activations.Activation(lambda x: x * torch.sigmoid(1.702 * x), activations._quick_gelu_backward)
    with mock.patch.dict(activations.ACTIVATIONS, quick_gelu=plain):
        yield


# Each trick taken away: how our step is patched, and whether its texts are padded.
WITHOUT: dict[str, tuple[Callable[[], AbstractContextManager], bool]] = {
    "last block at the pooled position only": (every_row, False),
    "backward of attention by whole products": (
        lambda: mock.patch.object(attention, "attend", attention_of_torch),
        False,
    ),
    "activation computed again": (keeping_activations, False),
    "QuickGELU by way of SiLU": (sigmoid_written_out, False),
    "one projection for queries, keys and values": (
        lambda: mock.patch.object(attention.SelfAttention, "forward", three_projections),
        False,
    ),
    "patches as a linear map": (
        lambda: mock.patch.object(embeddings.PatchEmbedding, "forward", patches_by_convolution),
        False,
    ),
    "real-length text": (nullcontext, True),
}


def ladder(pair: Pair, real: Batch, padded: Batch) -> dict[str, float]:
    without = {
        trick: partial(side_by_side.under, patch, partial(pair.step, padded if is_padded else real))
        for trick, (patch, is_padded) in WITHOUT.items()
    }
    return side_by_side.ladder(partial(pair.step, real), without)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=("tiny", "base"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--no-ladder", action="store_true")
    arguments = parser.parse_args()
    if arguments.size == "base":
        side_by_side.refuse_a_busy_machine()
    device = precision.choose_device("auto")
    kind = precision.choose("auto", device)
    pair = Pair(arguments.size, lambda: precision.autocast(device, kind), device)
    config = pair.method.model.config

    real, padded = make_batch(config, arguments.batch, None), make_batch(config, arguments.batch, PADDED)
    for batch in (real, padded):  # before any step: afterwards weights may drift apart
        pair.same_losses(batch, pair.inputs(padded))
    results = {
        "real_length": pair.compare(f"real_length ({kind})", real, pair.inputs(padded)),
        "equal_length": pair.compare(f"equal_length ({kind})", padded, pair.inputs(padded)),
    }
    few = min(arguments.batch, LADDER_BATCH)
    rungs = {}
    if not arguments.no_ladder:
        rungs = ladder(pair, make_batch(config, few, None), make_batch(config, few, PADDED))
    if arguments.size == "base":
        side_by_side.write(
            side_by_side.of_this_class("clip_step"), results, ladder=rungs, precision=kind, batch=arguments.batch,
            ladder_batch=few, token_lengths=LENGTHS,
        )  # fmt: skip


if __name__ == "__main__":
    main()
