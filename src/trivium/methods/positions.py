"""Which positions of a sequence a loss reads. Indices are made on CPU: indexing by a mask on a device would wait for it
to count them. B rows, L positions, Q of them asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from trivium.layers.attention import padded_index


def places(mask: Tensor) -> Tensor:
    """Flat places where a mask on CPU is True."""
    return mask.flatten().nonzero()[:, 0]


def needed(*parts: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Which positions of a sequence the last block must compute, and where each part's positions stand then.

    Args:
        parts: bool [B, L_i], side by side the sequence; True = needed. On CPU.

    Returns:
        index_BQ: positions, padded (see padded_index), and for each part the flat int64 places of its needed
        positions in [B * Q], in row-major order.
    """
    needed_BL = torch.cat(parts, dim=1)
    index_BQ = padded_index(needed_BL)
    Q = index_BQ.shape[1]
    valid_BQ = torch.arange(Q) < needed_BL.sum(1, keepdim=True)
    ends = torch.tensor([0, *[part.shape[1] for part in parts]]).cumsum(0).tolist()
    found = tuple(
        places(valid_BQ & (index_BQ >= first) & (index_BQ < last))
        for first, last in zip(ends[:-1], ends[1:], strict=True)
    )
    return index_BQ, found
