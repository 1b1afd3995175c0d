"""Useful floating-point operations of a FLAVA training step: what counts stands in flops.py.

The image tokenizer doesn't: its codes can be cached (`trivium data codes`).

B rows, R rows of the masked pass, N patches, T text tokens, D width. Suffix B or R: one number for each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trivium.methods.flava import FlavaMethod
from trivium.methods.flops import blocks, masked_head, num_patches, patches
from trivium.models.flava import FlavaConfig
from trivium.train.protocol import Batch


def useful_flops(method: FlavaMethod, batch: Batch, global_rows: int | None = None) -> float:
    """Forward and backward of one micro-batch. Reads the batch's masks, which lie on CPU, and nothing of the device.

    Args:
        global_rows: of the global batch, which the contrastive loss takes as columns; None: those of this batch.

    Returns:
        FLOPs. Divide by seconds and by the FLOP/s of a matrix product on this device: model FLOPs utilisation.
    """
    config, targets = method.model.config, batch.targets
    if not batch.texts:
        masked_B = targets["image_mask"].sum(1)
        image = _image_tower(config, _num_patches(config, batch).expand(len(batch)), masked_B)
        return image + 3 * _masked_head(config, masked_B, config.num_codes)
    if not batch.images:
        selected_B = targets["selected"].sum(1)
        return 3 * (
            _encoder(config, config.text_layers, _lengths(config, batch), selected_B)
            + _masked_head(config, selected_B, config.vocab_size)
        )
    return _unmasked_pass(method, batch, global_rows or len(batch)) + _masked_pass(method, batch)


def _unmasked_pass(method: FlavaMethod, batch: Batch, global_rows: int) -> float:
    """Both towers down to their class tokens, projected, and each row against every column in one product."""
    if not method.weights["contrastive"]:
        return 0.0
    config, rows = method.model.config, len(batch)
    one_B = torch.ones(rows)
    image = _image_tower(config, _num_patches(config, batch).expand(rows), one_B)
    text = _encoder(config, config.text_layers, _lengths(config, batch), one_B)
    projections = 2 * 2 * rows * config.width * config.projection_width
    scores = 2 * rows * global_rows * config.projection_width
    return image + 3 * (text + projections + scores)


def _masked_pass(method: FlavaMethod, batch: Batch) -> float:
    """Both towers whole, the multimodal encoder down to what its heads read, and the heads."""
    config, targets, weights = method.model.config, batch.targets, method.weights
    if not any(weights[name] for name in ("itm", "mmm_image", "mmm_text")):
        return 0.0
    masked_R = method._masked_rows(batch)
    matched_B = targets["matched"]
    kept_R = matched_B[masked_R] | ~matched_B.any()
    patches_R = targets["image_mask"][masked_R].sum(1) * kept_R * bool(weights["mmm_image"])
    words_R = targets["selected"][masked_R].sum(1) * kept_R * bool(weights["mmm_text"])
    matching = bool(weights["itm"])
    num_patches_R, text_R = _num_patches(config, batch).expand(len(masked_R)), _lengths(config, batch)[masked_R]
    image_R = 1 + num_patches_R
    forward = (
        _encoder(config, config.text_layers, text_R, text_R)
        + 2 * config.width**2 * float((image_R + text_R).sum())  # into the multimodal encoder
        + _encoder(config, config.multimodal_layers, 1 + image_R + text_R, matching + patches_R + words_R)
        + _masked_head(config, patches_R, config.num_codes)
        + _masked_head(config, words_R, config.vocab_size)
        + matching * 2 * len(masked_R) * config.width * (config.width + 2)
    )
    projected = 0.0 if weights["contrastive"] else _projection(config, num_patches_R)  # else the unmasked pass did
    return projected + 3 * (_encoder(config, config.image_layers, image_R, image_R) + forward)


def _image_tower(config: FlavaConfig, num_patches_B: Tensor, read_B: Tensor) -> float:
    """Forward and backward. read_B: positions of the last block that are read."""
    return _projection(config, num_patches_B) + 3 * _encoder(config, config.image_layers, 1 + num_patches_B, read_B)


def _projection(config: FlavaConfig, num_patches_B: Tensor) -> float:
    """Forward and backward of pixels into patches, whose own gradient nobody wants."""
    return 2 * patches(num_patches_B, config.patch_size, config.width)


def _encoder(config: FlavaConfig, num_layers: int, length_B: Tensor, read_B: Tensor) -> float:
    return blocks(config.width, config.mlp_width, num_layers, length_B, read_B)


def _masked_head(config: FlavaConfig, masked_B: Tensor, num_classes: int) -> float:
    return masked_head(config.width, masked_B, num_classes)


def _num_patches(config: FlavaConfig, batch: Batch) -> Tensor:
    return num_patches(batch, config.patch_size)


def _lengths(config: FlavaConfig, batch: Batch) -> Tensor:
    """Tokens of each text; with its pads where the multimodal encoder attends them."""
    mask_BT = batch.texts[0].mask_BT
    return torch.ones_like(mask_BT).sum(1) if config.pads_visible else mask_BT.sum(1)
