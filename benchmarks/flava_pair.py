"""FLAVA and transformers.FlavaForPreTraining as one pair: same weights, same batches, a step of each.

What benchmarks of the two have in common: flava_step.py times them on a processor, gpu.py on a GPU.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import torch
from step_pair import StepPair, Trick
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import FlavaConfig as PeerConfig
from transformers import FlavaForPreTraining
from transformers.models.flava.modeling_flava import FlavaLayer

from trivium.convert.dalle import to_hf as codebook_to_hf
from trivium.convert.flava import config_to_hf, to_hf
from trivium.data.masking import block_mask
from trivium.data.order import keyed_generator
from trivium.layers import attention, embeddings, packing, transformer
from trivium.methods.flava import FlavaMethod, Pixels
from trivium.methods.flava_flops import useful_flops
from trivium.models.dvae import DVae, DVaeConfig, map_pixels
from trivium.models.flava import Flava, FlavaConfig
from trivium.train.initial import initialise
from trivium.train.protocol import Batch, Images, Texts

MODALITIES = ("multimodal", "image", "text")
PADDED = 77  # tokens
ROWS = {"multimodal": 128, "image": 128, "text": 48}  # of a step at size base on a GPU of 80 GB; halved where too many
COMPARED = ("equal",)  # inputs on which the losses of both sides are compared
# Whether texts are padded to 77 tokens, and whether codes of the pictures come with the batch.
INPUTS = {"equal": (False, True), "padded": (True, True), "online": (False, False), "padded, online": (True, False)}
LENGTHS = (9, 26, 12, 13, 15, 16, 17, 20)  # tokens of eight captions: 16 on average, as 12 words have (FLAVA Table 2)


def make_batches(
    config: FlavaConfig, batch: int, length: int | None, with_codes: bool, lengths: Sequence[int] = LENGTHS
) -> dict[str, Batch]:
    """One batch of each modality. length: pad texts to it; None: to the longest caption. lengths: of texts, in turn.

    The pictures and words are noise: no step here takes another time for meaning.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = (batch, max(PADDED, *lengths))
    length_B = torch.tensor([lengths[row % len(lengths)] for row in range(batch)])
    width = length or int(length_B.max())
    mask_BT = torch.arange(width) < length_B[:, None]
    ids_BT = torch.randint(1000, config.vocab_size, drawn, generator=generator)[:, :width] * mask_BT
    selected_BT = (torch.rand(drawn, generator=generator)[:, :width] < 0.15) & mask_BT
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


def batch_of(config: FlavaConfig, modality: str, rows: int, inputs: str) -> Batch:
    """One batch of captions' length. inputs: a name in INPUTS."""
    padded, with_codes = INPUTS[inputs]
    length = PADDED if padded and config.max_length >= PADDED else None
    return make_batches(config, rows, length, with_codes)[modality]


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


class Pair(StepPair):
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
        with device:  # where its own initial weights are drawn in no time
            peer = FlavaForPreTraining(PeerConfig.from_dict(peer_config))
        state = to_hf(model.state_dict(), config)
        state |= {f"image_codebook.{name}": tensor for name, tensor in codebook_state.items()}
        peer.load_state_dict(state, strict=False)
        method = FlavaMethod(model, tokenizer.frozen(), Pixels((0.5,) * 3, (0.25,) * 3))
        super().__init__(method, peer, autocast, device)

    def blocks(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The transformer blocks of both, for compilation one by one."""
        return self.method.model.blocks(), [layer for layer in self.peer.modules() if isinstance(layer, FlavaLayer)]

    def case(self, modality: str, rows: int, inputs: str) -> tuple[Batch, dict[str, Tensor]]:
        """A batch for both sides. inputs: "as_used" or "equal" (see flava_step.py), "padded" or "online" for ours.

        Text alone is running text of the model's full length, as in the paper, not captions.
        """
        config = self.method.model.config
        if modality == "text":
            batch = make_batches(config, rows, None, True, lengths=(config.max_length,))["text"]
            return batch, peer_inputs(batch, self.method, modality)
        ours = batch_of(config, modality, rows, "equal" if inputs == "as_used" else inputs)
        theirs = ours if inputs == "equal" else batch_of(config, modality, rows, "padded, online")
        return ours, peer_inputs(theirs, self.method, modality)

    def ready(self, kind: str) -> None:
        """The image tokenizer in the precision that autocast gives the peer's (`--data.image-tokenizer-precision`)."""
        if kind == "bf16":
            self.method.image_tokenizer.frozen(torch.bfloat16)

    def flops(self, batch: Batch) -> float:
        return useful_flops(self.method, batch)

    def peer_losses(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if "mim_labels" in inputs:
            inputs = inputs | {"mim_labels": inputs["mim_labels"].clone()}
        with self.autocast():
            output = self.peer(**inputs, return_loss=True)
        names = {"global_contrastive": "contrastive"}
        found = {names.get(name, name): loss for name, loss in output.loss_info.items() if loss is not None}
        return found | {"total": output.loss}


# ---------------------------------------------------------------------------------------- steps without one trick


def eager_attention(query: Tensor, key: Tensor, value: Tensor, mask_BL: Tensor | None, dropout: float) -> Tensor:
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if mask_BL is not None:
        scores = scores.masked_fill(~mask_BL[:, None, None, :], float("-inf"))
    return F.dropout(scores.softmax(-1), dropout) @ value


def attention_of_torch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    mask = None if mask is None else mask[:, None, None] if mask.ndim == 2 else mask[:, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


def keeping_activations() -> AbstractContextManager:
    return mock.patch.object(transformer, "RECOMPUTE_FROM", sys.maxsize)


@cache  # made in the round that warms up
def as_published(tokenizer: DVae) -> nn.Module:
    """Its encoder in float32, and as convolutions come."""
    encoder = copy.deepcopy(tokenizer.encoder).float()
    for parameter in encoder.parameters():
        parameter.data = parameter.data.contiguous()
    return encoder


@torch.no_grad()
def codes_in_float32(self: DVae, pixels: Tensor) -> Tensor:
    logits: Tensor = as_published(self)(map_pixels(pixels.float()))
    return logits.argmax(1).flatten(1)


@contextmanager
def every_row() -> Iterator[None]:
    def whole(self: Any, x: Tensor, mask: Any = None, rows: Any = None, pads: bool = True) -> Tensor:
        x = transformer.through(self.blocks, x, mask, None, pads)
        return x if rows is None else attention.take_rows(x, rows)

    def both(self: Any, x: Tensor, mask: Tensor | None, first: int, pads: bool = True) -> tuple[Tensor, Tensor]:
        x = whole(self, x, mask, None, pads)
        return x[:first, :1], x[first:]

    with mock.patch.multiple(transformer.PreNormEncoder, forward=whole, both=both):
        yield


def patches_by_convolution(self: embeddings.PatchEmbedding, pixels: Tensor) -> Tensor:
    size = self.patch_size
    weight = self.projection.weight.view(-1, 3, size, size)
    return F.conv2d(pixels, weight, self.projection.bias, stride=size).flatten(2).transpose(1, 2)


def three_projections(self: attention.SelfAttention, x: Tensor, mask: Any = None, rows: Any = None) -> Tensor:
    weights, biases = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
    packed = mask if isinstance(mask, packing.Packing) else None
    asked = x if rows is None else attention.take_rows(x, rows)
    if rows is not None and mask is not None and mask.ndim == 3:
        mask = attention.take_rows(mask.expand(len(x), -1, -1), rows)
    parts = [F.linear(a, w, b) for a, w, b in zip((asked, x, x), weights, biases, strict=True)]
    if packed is not None:
        parts, mask = [packed.unpack(part) for part in parts], packed.mask_BL
    heads = [part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in parts]
    attended = attention.attend(heads[0], heads[1], heads[2], mask, 0.0).transpose(1, 2).flatten(2)
    return self.out(attended if packed is None else packed.pack(attended))


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


def with_pads() -> AbstractContextManager:
    return mock.patch.object(packing, "WORTH_IT", 2.0)


PADS = "pads left out"  # on a processor alone
PICTURES, WORDS, ALONE = ("multimodal", "image"), ("multimodal", "text"), ("image", "text")
WITHOUT: dict[str, Trick] = {
    "no unused unmasked pass": Trick(unused_pass, modalities=ALONE),
    "last block at needed rows only": Trick(every_row),
    "both passes of a tower at once": Trick(
        lambda: mock.patch.object(FlavaMethod, "_both_at_once", return_value=False), modalities=("multimodal",)
    ),
    "fused scaled-dot-product attention": Trick(lambda: mock.patch.object(attention, "attend", eager_attention)),
    "backward of attention by whole products": Trick(
        lambda: mock.patch.object(attention, "attend", attention_of_torch)
    ),
    "activation computed again": Trick(keeping_activations),
    "one projection for queries, keys and values": Trick(
        lambda: mock.patch.object(attention.SelfAttention, "forward", three_projections)
    ),
    "patches as a linear map": Trick(
        lambda: mock.patch.object(embeddings.PatchEmbedding, "forward", patches_by_convolution), modalities=PICTURES
    ),
    "real-length text": Trick(with_pads, "padded", WORDS),
    PADS: Trick(with_pads, modalities=("text",)),  # pads are too few a part of what is fused
    "image tokenizer in the step's precision, channels last": Trick(
        lambda: mock.patch.object(DVae, "encode", codes_in_float32), "online", PICTURES, whole="online"
    ),
    "cached image codes": Trick(nullcontext, "online", PICTURES),
}
