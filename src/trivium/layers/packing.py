"""Sequences of a padded batch without their pads, one after the other.

Norms, linear maps and activations know nothing of neighbours, so they take the real positions alone; attention gets the
batch with zeros for those that were left out, which nobody may attend, and what it gives there is dropped. Of captions
a third and more of a padded batch are pads.

Sequences of several lengths may also come in runs, each of one length, and then nothing is padded.

B batch, L positions, N positions that are taken of all samples, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WORTH_IT = 1 / 8  # share of pads from which on leaving them out saves more than taking apart and putting together costs
# Some pads are taken along, so that their number is a multiple of a power of two, about this part of all positions: for
# each number that it has not met a library of matrix products makes a program anew, which takes longer than it saves.
COARSE = 16


@dataclass(frozen=True)
class Packing:
    """Where the real positions lie, and a few pads beside them."""

    mask_BL: Tensor  # bool, True = real
    index_N: Tensor  # int64, of B * L: all real positions in order, then pads

    @classmethod
    def of(cls, mask: Tensor | None) -> Packing | None:
        """None where there is little to leave out, and on a GPU, which would have to be waited for to know how much.

        mask: bool [B, L], True = a real position. One that says more, [B, L, L], is not packed.
        """
        if mask is None or mask.ndim != 2 or mask.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        real = int(mask.sum())
        coarse = 1 << max(4, (mask.numel() // COARSE).bit_length() - 1)
        taken = -(-real // coarse) * coarse
        if taken >= (1 - WORTH_IT) * mask.numel():
            return None
        return cls(mask, mask.flatten().argsort(descending=True, stable=True)[:taken])

    def pack(self, x_BLD: Tensor) -> Tensor:
        """[N, D]."""
        return x_BLD.flatten(0, 1).index_select(0, self.index_N)

    def unpack(self, x_ND: Tensor) -> Tensor:
        """[B, L, D], zeros where nothing was taken."""
        padded = x_ND.new_zeros(self.mask_BL.numel(), x_ND.shape[1]).index_copy_(0, self.index_N, x_ND)
        return padded.unflatten(0, self.mask_BL.shape)


Runs = Sequence[tuple[int, int]]  # of each run: how many sequences, how many positions


def packed(states: Sequence[Tensor]) -> Tensor:
    """[n, L, D] of each run -> [N, D]."""
    return torch.cat([x_BLD.flatten(0, 1) for x_BLD in states])


def unpacked(x_ND: Tensor, runs: Runs) -> list[Tensor]:
    """[N, D] -> [n, L, D] of each run."""
    parts = x_ND.split([number * length for number, length in runs])
    return [x.unflatten(0, run) for x, run in zip(parts, runs, strict=True)]
