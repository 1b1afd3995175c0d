"""Full training steps of FLAVA against transformers.FlavaForPreTraining: forward, backward, optimizer.

    python benchmarks/flava_step.py                 # base size, batch 8: 15 to 30 minutes on two cores
    python benchmarks/flava_step.py --size tiny     # a minute, to see that it runs

Same weights, same pictures and words, same masks, same optimizer, threads and precision on both sides; the losses of
both agree to 1e-5 in float32, or nothing is timed. Three sets of rows:

    as_used   each as it is used: the peer with 77 tokens and codes made in the step, ours with the captions' real
              length and cached codes (`trivium data codes`)
    equal     real length and cached codes for both
    online    77 tokens and codes made in the step for both

The ladder takes one trick away at a time: its factor is the time without the trick over the time with all.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import side_by_side
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import FlavaConfig as PeerConfig
from transformers import FlavaForPreTraining

from trivium.convert.dalle import to_hf as codebook_to_hf
from trivium.convert.flava import config_to_hf, to_hf
from trivium.data.masking import block_mask
from trivium.data.order import keyed_generator
from trivium.layers import attention, embeddings, transformer
from trivium.methods.flava import FlavaMethod, Pixels
from trivium.models.dvae import DVae, DVaeConfig
from trivium.models.flava import Flava, FlavaConfig
from trivium.train import precision
from trivium.train.initial import initialise
from trivium.train.protocol import Batch, Images, Key, Texts
from trivium.train.step import backward, step

MODALITIES = ("multimodal", "image", "text")
PADDED = 77  # tokens
LADDER_BATCH = 4  # of the ladder, which times 21 cases
LENGTHS = (9, 12, 13, 15, 16, 17, 20, 26)  # tokens of eight captions: 16 on average, as 12 words have (FLAVA Table 2)


def make_batches(config: FlavaConfig, batch: int, length: int | None, with_codes: bool) -> dict[str, Batch]:
    """One batch of each modality. length: pad texts to it; None: to the longest caption.

    The pictures and words are noise: no step here takes another time for meaning.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([LENGTHS[row % len(LENGTHS)] for row in range(batch)])
    width = length or int(lengths.max())
    mask_BT = torch.arange(width) < lengths[:, None]
    ids_BT = torch.randint(1000, config.vocab_size, (batch, PADDED), generator=generator)[:, :width] * mask_BT
    selected_BT = (torch.rand(batch, PADDED, generator=generator)[:, :width] < 0.15) & mask_BT
    selected_BT[:, 1] = True
    pixels = torch.randint(0, 256, (batch, 3, config.image_size, config.image_size), generator=generator)
    half = config.image_size // config.patch_size * 8
    codebook = torch.randint(0, 256, (batch, 3, half, half), generator=generator)
    masks = [block_mask(keyed_generator("benchmark", row), config.grid, config.grid) for row in range(batch)]
    rows_B = torch.arange(batch)
    images = (Images(pixels.to(torch.uint8), rows_B), Images(codebook.to(torch.uint8), rows_B))
    targets = {
        "image_mask": torch.stack([torch.as_tensor(mask) for mask in masks]),
        "masked_ids": torch.where(selected_BT, 103, ids_BT),
        "selected": selected_BT,
        "matched": torch.arange(batch) != 3,  # one false pair
    }
    if with_codes:
        targets["codes"] = torch.randint(0, config.num_codes, (batch, config.grid**2), generator=generator)
    texts = (Texts(ids_BT, mask_BT, rows_B),)
    return {
        "multimodal": Batch("pairs", rows_B, rows_B, images, texts, targets),
        "image": Batch("images", rows_B, rows_B, images, (), targets),
        "text": Batch("text", rows_B, rows_B, (), texts, targets),
    }


def peer_inputs(batch: Batch, method: FlavaMethod, modality: str) -> dict[str, Tensor]:
    """The same batch as FlavaForPreTraining takes it."""
    inputs: dict[str, Tensor] = {}
    targets = batch.targets
    if modality != "text":
        inputs["pixel_values"] = method.pixels(batch.images[0].pixels_BCHW)
        inputs["bool_masked_pos"] = targets["image_mask"].long()
        if "codes" in targets:
            inputs["mim_labels"] = targets["codes"].clone()  # the peer writes into it
        else:
            inputs["codebook_pixel_values"] = batch.images[1].pixels_BCHW.to(method.mean.device) / 255 * 0.8 + 0.1
    if modality != "image":
        text = batch.texts[0]
        inputs["input_ids"] = text.ids_BT
        inputs["input_ids_masked"] = targets["masked_ids"]
        inputs["attention_mask"] = text.mask_BT.long()
        inputs["mlm_labels"] = torch.where(targets["selected"], text.ids_BT, -100)
    if modality == "multimodal":
        inputs["itm_labels"] = targets["matched"].long()
    return {name: value.to(method.mean.device) for name, value in inputs.items()}


class Pair:
    """The two models with the same weights, and a step of each."""

    def __init__(self, size: str, autocast: Callable[[], AbstractContextManager], device: torch.device) -> None:
        config = FlavaConfig.of_size(size)
        if size != "base":  # the peer's codebook has a stride of 8 and half of the picture's size
            config = replace(config, image_size=64, patch_size=16)
        codebook = DVaeConfig() if size == "base" else DVaeConfig(width=16, num_codes=config.num_codes)
        tokenizer = DVae(codebook)
        model = Flava(config)
        initialise(model, 0)
        codebook_state, codebook_config = codebook_to_hf(tokenizer)
        peer_config = config_to_hf(config, codebook_config)
        self.peer = FlavaForPreTraining(PeerConfig.from_dict(peer_config)).train().to(device)
        state = to_hf(model.state_dict(), config)
        state |= {f"image_codebook.{name}": tensor for name, tensor in codebook_state.items()}
        self.peer.load_state_dict(state, strict=False)
        self.method = FlavaMethod(model, tokenizer.frozen(), Pixels((0.5,) * 3, (0.25,) * 3)).to(device)
        options: dict[str, Any] = {"lr": 1e-6, "weight_decay": 0.1, "fused": True}
        self.optimizer = torch.optim.AdamW(model.parameters(), **options)
        self.peer_optimizer = torch.optim.AdamW([p for p in self.peer.parameters() if p.requires_grad], **options)
        self.autocast = autocast

    def step(self, batch: Batch) -> dict[str, float]:
        return step(self.method, [batch], Key(0, batch.stream, 0), self.optimizer, autocast=self.autocast).losses

    def peer_step(self, inputs: dict[str, Tensor]) -> dict[str, float]:
        self.peer_optimizer.zero_grad(set_to_none=True)
        losses = self.peer_losses(inputs)
        losses["total"].backward()
        self.peer_optimizer.step()
        return {name: value.item() for name, value in losses.items()}

    def peer_losses(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if "mim_labels" in inputs:
            inputs = inputs | {"mim_labels": inputs["mim_labels"].clone()}
        with self.autocast():
            output = self.peer(**inputs, return_loss=True)
        names = {"global_contrastive": "contrastive"}
        found = {names.get(name, name): loss for name, loss in output.loss_info.items() if loss is not None}
        return found | {"total": output.loss}

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
            mine, other = float(value / counts[name].clamp(min=1)), float(theirs[name])
            assert abs(mine - other) <= 1e-5 * max(1.0, abs(other)), f"{name}: {mine} against the peer's {other}"
            print(f"  {name}: {mine:.6f} = {other:.6f}")


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


def compare(pair: Pair, ours: dict[str, Batch], theirs: dict[str, Batch]) -> dict[str, Any]:
    rows = {}
    for modality in MODALITIES:
        inputs = peer_inputs(theirs[modality], pair.method, modality)
        times = side_by_side.interleaved(partial(pair.step, ours[modality]), partial(pair.peer_step, inputs))
        memory = (forward_backward_memory(pair, ours[modality]), forward_backward_memory(pair, inputs))
        rows[modality] = side_by_side.row(*times, memory)
        print(
            f"  {modality}: ours {rows[modality]['ours']:.2f} s, peer {rows[modality]['peer']:.2f} s, "
            f"ratio {rows[modality]['ratio']:.2f}, memory ratio {rows[modality]['memory_ratio']:.2f}",
            flush=True,
        )
    return rows


def forward_backward_memory(pair: Pair, batch: Batch | dict[str, Tensor]) -> int:
    if isinstance(batch, Batch):
        key = Key(0, batch.stream, 0)
        return memory_above_state(lambda: backward(pair.method, [batch], key, pair.autocast), pair.optimizer)
    return memory_above_state(lambda: pair.peer_losses(batch)["total"].backward(), pair.peer_optimizer)


# --------------------------------------------------------------------------------------------------- the ladder


def eager_attention(query: Tensor, key: Tensor, value: Tensor, mask_BL: Tensor | None, dropout: float) -> Tensor:
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if mask_BL is not None:
        scores = scores.masked_fill(~mask_BL[:, None, None, :], float("-inf"))
    return F.dropout(scores.softmax(-1), dropout) @ value


def every_row(self: nn.Module, x: Tensor, mask: Tensor | None = None, rows: Tensor | int | None = None) -> Tensor:
    for block in self.blocks:  # type: ignore[union-attr]
        x = block(x, mask)
    return x if rows is None else attention.take_rows(x, rows)


def patches_by_convolution(self: embeddings.PatchEmbedding, pixels: Tensor) -> Tensor:
    size = self.patch_size
    weight = self.projection.weight.view(-1, 3, size, size)
    return F.conv2d(pixels, weight, self.projection.bias, stride=size).flatten(2).transpose(1, 2)


def three_projections(self: attention.SelfAttention, x: Tensor, mask: Any = None, rows: Any = None) -> Tensor:
    weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
    asked = x if rows is None else attention.take_rows(x, rows)
    parts = [F.linear(a, w, b) for a, w, b in zip((asked, x, x), weights, biases, strict=True)]
    heads = [part.view(len(x), part.shape[1], self.num_heads, -1).transpose(1, 2) for part in parts]
    attended = attention.attend(heads[0], heads[1], heads[2], mask, 0.0)
    return self.out(attended.transpose(1, 2).reshape(len(x), -1, x.shape[2]))


@contextmanager
def unused_pass() -> Iterator[None]:
    """The unmasked pass that the public ports also run in batches of one modality."""
    embed = FlavaMethod.embed

    def with_unmasked(self: FlavaMethod, batch: Batch) -> Any:
        if batch.images and not batch.texts:
            self.model.encode_image(self.pixels(batch.images[0].pixels_BCHW))
        if batch.texts and not batch.images:
            text = batch.texts[0]
            self.model.encode_text(text.ids_BT.to(self.mean.device), text.mask_BT.to(self.mean.device))
        return embed(self, batch)

    with mock.patch.object(FlavaMethod, "embed", with_unmasked):
        yield


def ladder(pair: Pair, cached: dict[str, Batch], padded: dict[str, Batch], online: dict[str, Batch]) -> dict[str, Any]:
    """Factor of each trick on each modality: the time without it over the time with all."""
    patches: dict[str, Callable[[], AbstractContextManager]] = {
        "no unused unmasked pass": unused_pass,
        "last block at needed rows only": lambda: mock.patch.object(transformer.PreNormEncoder, "forward", every_row),
        "fused scaled-dot-product attention": lambda: mock.patch.object(attention, "attend", eager_attention),
        "one projection for queries, keys and values": lambda: mock.patch.object(
            attention.SelfAttention, "forward", three_projections
        ),
        "patches as a linear map": lambda: mock.patch.object(
            embeddings.PatchEmbedding, "forward", patches_by_convolution
        ),
    }
    rungs: dict[str, Any] = {}
    for trick, context, batches in [
        *((trick, patch, cached) for trick, patch in patches.items()),
        ("real-length text", nullcontext, padded),
        ("cached image codes", nullcontext, online),
    ]:
        rungs[trick] = {}
        for modality in MODALITIES:

            def without(batch: Batch = batches[modality], patch: Callable = context) -> None:
                with patch():
                    pair.step(batch)

            times = side_by_side.interleaved(partial(pair.step, cached[modality]), without, rounds=2)
            rungs[trick][modality] = round(statistics.median(times[1]) / statistics.median(times[0]), 3)
        print(f"  {trick}: {rungs[trick]}", flush=True)
    return rungs


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

    real = make_batches(config, arguments.batch, None, with_codes=True)
    online = make_batches(config, arguments.batch, PADDED if config.max_length >= PADDED else None, with_codes=False)
    results = {}
    for name, batches in (("equal", real), ("online", online)):  # before any step: afterwards weights may drift apart
        print(f"losses, {name}", flush=True)
        for modality in MODALITIES:
            pair.same_losses(batches[modality], peer_inputs(batches[modality], pair.method, modality))
    for name, ours, theirs in (("equal", real, real), ("online", online, online), ("as_used", real, online)):
        print(f"{name} ({kind})", flush=True)
        results[name] = compare(pair, ours, theirs)
    few = min(arguments.batch, LADDER_BATCH)
    rungs = (
        {}
        if arguments.no_ladder
        else ladder(
            pair,
            make_batches(config, few, None, with_codes=True),
            make_batches(config, few, PADDED if config.max_length >= PADDED else None, with_codes=True),
            make_batches(config, few, None, with_codes=False),
        )
    )
    if arguments.size == "base":
        side_by_side.write(
            "flava_step",
            results,
            ladder=rungs,
            precision=kind,
            batch=arguments.batch,
            ladder_batch=few,
            token_lengths=LENGTHS,
        )


if __name__ == "__main__":
    main()
