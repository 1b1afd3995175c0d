"""Useful floating-point operations of a training step, by formula from a config and the real positions of a batch.

Counted are the matrix products without which the losses and their gradients cannot be had; a multiply-add is two.
Hence one figure for every implementation of the same step, and what one of them does beside it shows as time alone:

* pads are no positions, and the last block works only where a loss reads it (keys and values stand everywhere);
* the backward pass is two products for each of the forward's, but one for the patches, whose pixels want no gradient;
* nothing counts that is done again (GradCache, checkpoints), nor what is no product (norms, GELU, softmax, optimizer).

Here are the parts that families share, forward alone; flava_flops.py and its neighbours add them up.

B rows, D width, M width of the feed-forward's inside. Suffix B: one number for each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trivium.train.protocol import Batch


def blocks(
    width: int, mlp_width: int, num_layers: int, length_B: Tensor, read_B: Tensor, *, causal: bool = False
) -> float:
    """Forward of a stack of blocks over sequences of these lengths.

    Args:
        read_B: positions of the last block that are read.
        causal: each position sees those up to itself alone; what is read of the last block sees all of them.
    """
    D, M = width, mlp_width
    length_B, read_B = length_B.double(), read_B.double()

    def block(query_B: Tensor, seen_B: Tensor) -> float:
        products_B = 2 * D * (2 * D * length_B + 2 * D * query_B + 2 * M * query_B)  # k, v; q, output; feed-forward
        return float((products_B + 4 * D * query_B * seen_B).sum())  # scores, and their mean of values

    return (num_layers - 1) * block(length_B, (length_B + 1) / 2 if causal else length_B) + block(read_B, length_B)


def patches(num_patches_B: Tensor, patch_size: int, width: int) -> float:
    """Forward of the linear map of patches; its backward is as much again, no more."""
    return 2 * float(num_patches_B.sum()) * 3 * patch_size**2 * width


def masked_head(width: int, masked_B: Tensor, num_classes: int) -> float:
    return 2 * float(masked_B.sum()) * width * (width + num_classes)


def num_patches(batch: Batch, patch_size: int) -> Tensor:
    """Of each picture of a batch, 0-dim."""
    height, width = batch.images[0].pixels_BCHW.shape[2:]
    return torch.tensor((height // patch_size) * (width // patch_size))
