"""Useful floating-point operations of an ALBEF training step: what counts stands in flops.py.

The teacher's forward counts where its shares are read, and has no backward; the keys of ITC have no gradient either.
Keys and values of a picture count once for all the texts that read it.

B rows, S tokens of a picture. Suffix B: one number for each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trivium.methods.albef import AlbefMethod
from trivium.methods.flops import blocks, masked_head, num_patches, patches
from trivium.models.albef import AlbefConfig
from trivium.train.protocol import Batch


def useful_flops(method: AlbefMethod, batch: Batch, global_rows: int | None = None) -> float:
    """Forward and backward of one micro-batch, in FLOPs. Reads the batch's masks, which lie on CPU.

    Args:
        global_rows: of the global batch, which ITC takes as columns beside the queue; None: those of this batch.
    """
    config, weights, rows = method.model.config, method.weights, len(batch)
    text_B, one_B = batch.texts[0].mask_BT.sum(1), torch.ones(rows)
    selected_B = batch.targets["selected"].sum(1)
    patches_B = num_patches(batch, config.patch_size).expand(rows)
    words, pairs = bool(weights["mlm"]), bool(weights["itm"])
    columns = (global_rows or rows) + len(method.queue_same)
    pixels = patches(patches_B, config.patch_size, config.width)
    image_B = 1 + patches_B
    projections = 2 * 2 * rows * config.width * config.projection_width
    scores = 2 * 2 * rows * columns * config.projection_width * bool(weights["itc"])

    def image_tower(read_B: Tensor) -> float:
        return blocks(config.width, config.mlp_width, config.image_layers, image_B, read_B)

    def text_tower(read_B: Tensor) -> float:
        return blocks(config.width, config.mlp_width, config.text_layers, text_B, read_B)

    def fused(length_B: Tensor, read_B: Tensor) -> float:
        return _fused(config, length_B, read_B, image_B)

    def predicted() -> float:
        return fused(text_B, selected_B) + masked_head(config.width, selected_B, config.vocab_size)

    forward = image_tower(image_B if words or pairs else one_B) + text_tower(text_B if pairs else one_B) + projections
    if words or pairs:
        forward += _memory(config, image_B)
    if words:
        forward += text_tower(text_B) + predicted()
    if pairs:  # the true ones, other texts and other pictures, whose texts are as long as all together
        forward += 3 * (fused(text_B, one_B) + 2 * rows * config.width * 2)
    taught = pixels + text_tower(one_B) + projections
    if words and method.alpha("mlm"):
        taught += image_tower(image_B) + text_tower(text_B) + _memory(config, image_B) + predicted()
    else:
        taught += image_tower(one_B)
    if method.alpha("itc"):
        taught += scores
    return 2 * pixels + 3 * forward + 2 * scores + taught


def _fused(config: AlbefConfig, length_B: Tensor, read_B: Tensor, image_B: Tensor) -> float:
    """Texts through the fusion, but for the keys and values of their pictures."""
    D = config.width
    asked_B = (config.fusion_layers - 1) * length_B.double() + read_B.double()  # queries of all cross-attentions
    cross = float((4 * D * D * asked_B + 4 * D * asked_B * image_B).sum())
    return blocks(D, config.mlp_width, config.fusion_layers, length_B, read_B) + cross


def _memory(config: AlbefConfig, image_B: Tensor) -> float:
    """Keys and values that the fusion reads of a picture, in every block."""
    return config.fusion_layers * 2 * float(image_B.sum()) * config.width * 2 * config.width
