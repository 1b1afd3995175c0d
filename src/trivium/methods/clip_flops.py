"""Useful floating-point operations of a CLIP training step: what counts stands in flops.py.

A text ends at its end token, and each of its positions sees those up to itself: half of the scores.

B rows. Suffix B: one number for each row.
"""

from __future__ import annotations

import torch

from trivium.methods.clip import ClipMethod
from trivium.methods.flops import blocks, num_patches, patches
from trivium.train.protocol import Batch


def useful_flops(method: ClipMethod, batch: Batch, global_rows: int | None = None) -> float:
    """Forward and backward of one micro-batch, in FLOPs. Reads the batch's ids, which lie on CPU.

    Args:
        global_rows: of the global batch, which the contrastive loss takes as columns; None: those of this batch.
    """
    config, rows = method.model.config, len(batch)
    one_B = torch.ones(rows)
    patches_B = num_patches(batch, config.patch_size).expand(rows)
    length_B = 1 + method.model.ends(batch.texts[0].ids_BT)
    forward = (
        blocks(config.image_width, config.image_mlp_width, config.image_layers, 1 + patches_B, one_B)
        + blocks(config.text_width, config.text_mlp_width, config.text_layers, length_B, one_B, causal=True)
        + 2 * rows * config.projection_width * (config.image_width + config.text_width + (global_rows or rows))
    )
    return 2 * patches(patches_B, config.patch_size, config.image_width) + 3 * forward
